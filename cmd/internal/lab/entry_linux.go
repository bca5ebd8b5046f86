package lab

import (
	"fmt"
	"os"
)

// Hidden are the subcommands of `ztun lab` that a lab starts itself with.
var Hidden = []string{"init", "supervise", "container", "attach", "nothing"}

// RunHidden runs one of them and returns its exit code.
func RunHidden(name string, args []string) int {
	if name == "nothing" {
		return 0
	}
	if len(args) != 1 {
		fmt.Fprintf(os.Stderr, "ztun lab %s is for the lab itself\n", name)
		return 2
	}
	var err error
	switch name {
	case "init":
		return runInit(args[0])
	case "supervise":
		err = runSupervise(args[0])
	case "container":
		err = runContainer(args[0])
	case "attach":
		err = runAttach(args[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
