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
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// workDir is where a run keeps its files, a tmpfs that only the run sees.
const workDir = "/mnt"

// Names of the images that every node has.
const (
	AppImage   = "e2e.test/app:1"
	ZtunImage  = "e2e.test/ztun:1"
	pauseImage = "e2e.test/pause:1"
)

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
	p.Modes, p.LogDir = modes, logs
	if p.Debian, err = Debian(ctx, cache); err != nil {
		return p, err
	}
	if p.Tools, err = Tools(ctx, cache, filepath.Join(module, "tools")); err != nil {
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

// images builds the test's own program and all of ztun's, and packs each kind.
func images(ctx context.Context, cache, module string) ([]string, error) {
	dir := filepath.Join(cache, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("e2e: images: %w", err)
	}
	app := filepath.Join(dir, "app")
	if err := build(ctx, module, "./app", app, "-s -w"); err != nil {
		return nil, err
	}
	root := filepath.Join(module, "../..")
	mains, err := filepath.Glob(filepath.Join(root, "cmd/*/main.go"))
	if err != nil {
		return nil, err
	}
	ztun := Image{Name: ZtunImage, Files: map[string]string{}, Entrypoint: []string{"/usr/local/bin/ztun-proxy"}, User: "65532:65532"}
	for _, main := range mains {
		name := filepath.Base(filepath.Dir(main))
		to := filepath.Join(dir, name)
		if err := build(ctx, root, "./cmd/"+name, to, "-s -w -X main.version=e2e -X main.release=e2e"); err != nil {
			return nil, err
		}
		ztun.Files["usr/local/bin/"+name] = to
	}
	var archives []string
	files := map[string]string{"app": app}
	for _, i := range []Image{
		{Name: AppImage, Files: files, Entrypoint: []string{"/app"}},
		{Name: pauseImage, Files: files, Entrypoint: []string{"/app", "pause"}},
		ztun,
	} {
		name, _, _ := strings.Cut(filepath.Base(i.Name), ":")
		archive := filepath.Join(dir, name+".tar")
		if err := i.Write(archive); err != nil {
			return nil, err
		}
		archives = append(archives, archive)
	}
	return archives, nil
}

// lock waits until no other run prepares.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("e2e: lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("e2e: lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}
