// Package cluster starts a Kubernetes cluster of two nodes with istiod inside
// namespaces of this machine: real kubelets, containerd and kube-proxy, no
// image registry, nothing installed. The programs come from the module
// deploy/e2e/tools and from Debian's packages, once, into a cache.
//
// A test program calls Role first thing, then Prepare and Enclose; in the
// process where Role says inside, Up starts the cluster.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// workDir is where a run keeps its files, a tmpfs that only the run sees.
const workDir = "/mnt"

// Prepared is what a run needs and later runs find again.
type Prepared struct {
	Tools  string    // directory of etcd, kube-apiserver ... and the CRDs
	Debian string    // root that Debian's packages are unpacked in
	Images []string  // archives that every node imports
	LogDir string    // directory of this run's logs, kept
	Modes  [2]string // kube-proxy's on each node
	Owner  int       // pid, outside, of the process that everything ends with
}

// Modes reads how kube-proxy is to run: nftables or iptables on both nodes, or
// mixed, one on each. It is mixed unless text says otherwise.
func Modes(text string) ([2]string, error) {
	switch text {
	case "", "mixed":
		return [2]string{"nftables", "iptables"}, nil
	case "nftables", "iptables":
		return [2]string{text, text}, nil
	}
	return [2]string{}, fmt.Errorf("e2e: MODE=%q: kube-proxy runs as nftables, iptables or mixed here", text)
}

// Prepare builds and downloads what is not in the cache yet. module is the
// directory of deploy/e2e, logs the directory to make anew for this run's logs.
func Prepare(ctx context.Context, module, logs string, modes [2]string) (p Prepared, err error) {
	cache, err := CacheDir()
	if err != nil {
		return p, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return p, fmt.Errorf("e2e: cache: %w", err)
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return p, err
	}
	defer unlock()
	// Of a run that was killed.
	if err := os.RemoveAll(goTemp(cache)); err != nil {
		return p, fmt.Errorf("e2e: cache: %w", err)
	}
	p.Modes, p.LogDir = modes, logs
	if p.Debian, err = Debian(ctx, cache); err != nil {
		return p, err
	}
	if p.Tools, err = tools.in(ctx, cache, filepath.Join(module, "tools")); err != nil {
		return p, err
	}
	if p.Images, err = images(ctx, cache, module); err != nil {
		return p, err
	}
	if err := os.RemoveAll(logs); err != nil {
		return p, fmt.Errorf("e2e: logs: %w", err)
	}
	return p, os.MkdirAll(logs, 0o755)
}

// lock waits until no other run prepares.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("e2e: lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		progress("another run prepares in %s: waiting for it", filepath.Dir(path))
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("e2e: lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}
