package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

// program is the real ztun, and proxy stands in for ztun-proxy: these labs
// have no pod in the mesh.
var program, proxy string

type suite struct{ *testing.M }

// Run builds the programs once for all tests.
func (s suite) Run() int {
	dir, err := os.MkdirTemp("", "ztun-lab-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program, proxy = filepath.Join(dir, "ztun"), filepath.Join(dir, "ztun-proxy")
	build := exec.Command("go", "build", "-o", program, "../../ztun")
	build.Stdout, build.Stderr = os.Stdout, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build ztun:", err)
		return 1
	}
	if err := os.WriteFile(proxy, []byte("#!/bin/sh\nexec sleep 100000\n"), 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return s.M.Run()
}

func TestMain(m *testing.M) { netnstest.Main(suite{m}) }
