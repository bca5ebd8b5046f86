package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// compile builds the programs of the module for one architecture into dir, and
// returns their names.
func compile(ctx context.Context, o Options, arch, dir string) ([]string, error) {
	mains, err := filepath.Glob(filepath.Join(o.Source, "cmd", "*", "main.go"))
	if err != nil {
		return nil, err
	}
	if len(mains) == 0 {
		return nil, fmt.Errorf("%s has no cmd/*/main.go", o.Source)
	}
	var names, packages []string
	for _, m := range mains {
		name := filepath.Base(filepath.Dir(m))
		names, packages = append(names, name), append(packages, "./cmd/"+name)
	}
	out, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	args := []string{
		"build", "-trimpath", "-buildvcs=false",
		"-ldflags", fmt.Sprintf("-s -w -X main.version=%[1]s -X main.release=%[1]s", o.Version),
		"-o", out + string(filepath.Separator),
	}
	cmd := exec.CommandContext(ctx, "go", append(args, packages...)...)
	cmd.Dir = o.Source
	cmd.Env = append(neutral(os.Environ()), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("build for linux/%s: %w\n%s", arch, err, strings.TrimSpace(stderr.String()))
	}
	return names, nil
}

// neutral leaves out what would change the programs from machine to machine.
func neutral(environ []string) []string {
	return slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		switch name {
		case "GOFLAGS", "GOAMD64", "GOARM64", "GOEXPERIMENT", "GOFIPS140", "GOOS", "GOARCH", "CGO_ENABLED", "GOWORK":
			return true
		}
		return false
	})
}
