package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	cgroupMount  = "/sys/fs/cgroup"
	cgroupPrefix = "ztun-e2e-" // then the pid of the run's owner, "-" and the node
)

// unified says whether the machine has cgroup v2 only.
func unified() bool {
	var s unix.Statfs_t
	return unix.Statfs(cgroupMount, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
}

// hierarchies lists the cgroup directories that a node needs a group in.
func hierarchies() []string {
	if unified() {
		return []string{cgroupMount}
	}
	entries, err := os.ReadDir(cgroupMount)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, filepath.Join(cgroupMount, e.Name()))
		}
	}
	return out
}

// makeCgroup makes a group for one node's kubelet. Kernels with v1 want cpuset filled before any process.
func makeCgroup(name string) error {
	for _, h := range hierarchies() {
		dir := filepath.Join(h, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("e2e: cgroup: %w", err)
		}
		if filepath.Base(h) != "cpuset" {
			continue
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			v, err := os.ReadFile(filepath.Join(h, file))
			if err != nil {
				return fmt.Errorf("e2e: cgroup: %w", err)
			}
			if err := os.WriteFile(filepath.Join(dir, file), v, 0o644); err != nil {
				return fmt.Errorf("e2e: cgroup: %w", err)
			}
		}
	}
	return nil
}

// sweepCgroups removes the groups of runs whose owner is gone: the one thing of
// a node that does not end with its namespaces. own is removed whatever lives.
func sweepCgroups(own int) {
	for _, h := range hierarchies() {
		left, _ := filepath.Glob(filepath.Join(h, cgroupPrefix+"*"))
		for _, dir := range left {
			text, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix), "-")
			pid, err := strconv.Atoi(text)
			if err != nil || pid != own && unix.Kill(pid, 0) == nil {
				continue
			}
			removeTree(dir)
		}
	}
}

// removeTree removes a cgroup and its children, deepest first. One that still has a process stays for the next sweep.
func removeTree(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	_ = unix.Rmdir(dir)
}

// leftCgroups lists the groups of a run that are still there.
func leftCgroups(owner int) []string {
	var out []string
	for _, h := range hierarchies() {
		left, _ := filepath.Glob(filepath.Join(h, cgroupPrefix+strconv.Itoa(owner)+"-*"))
		out = append(out, left...)
	}
	return out
}
