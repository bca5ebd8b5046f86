// Command arch fails when an import points up, when a package speaks a
// foreign vocabulary that is another package's business, or when a package
// has no row. The rules are in rules.go. `make arch` runs it.
//
//	go run ./cmd/internal/arch
package main

import (
	"fmt"
	"os"
)

func main() {
	packages, err := list("./...")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	problems := check(packages)
	env, err := envReads(packages)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	problems = append(problems, env...)
	for _, p := range problems {
		fmt.Println(p)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
	fmt.Printf("arch: %d packages, every import points down\n", len(packages))
}
