package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

// program and realProxy are the real ones; proxy stands in for ztun-proxy in
// labs that have no pod in the mesh.
var program, realProxy, proxy string

type suite struct{ *testing.M }

// Run builds the programs once for all tests.
func (s suite) Run() int {
	dir, err := os.MkdirTemp("", "ztun-lab-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program, realProxy, proxy = filepath.Join(dir, "ztun"), filepath.Join(dir, "ztun-proxy"), filepath.Join(dir, "no-proxy")
	build := exec.Command("go", "build", "-o", dir, "../../ztun", "../../ztun-proxy")
	build.Stdout, build.Stderr = os.Stdout, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build ztun and ztun-proxy:", err)
		return 1
	}
	if err := os.WriteFile(proxy, []byte("#!/bin/sh\nexec sleep 100000\n"), 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return s.M.Run()
}

func TestMain(m *testing.M) { netnstest.Main(suite{m}) }
