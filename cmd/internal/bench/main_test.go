package main

import (
	"fmt"
	"os"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

// TestMain makes this binary what the bench starts: a worker, the attach side
// of a node, or the other proxy.
func TestMain(m *testing.M) {
	run := func() error { return runWorker(os.Stdin, os.Stdout) }
	switch {
	case len(os.Args) == 2 && os.Args[1] == "worker":
	case len(os.Args) == 3 && os.Args[1] == "attach":
		run = func() error { return runHandover(os.Args[2]) }
	case len(os.Args) == 2 && os.Args[1] == "transparent":
		run = runTransparent
	default:
		netnstest.MainLeaks(m)
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}
