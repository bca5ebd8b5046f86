package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// packages are unpacked, never installed. libseccomp is what Debian's runc is linked to.
var packages = []string{"containerd", "runc", "containernetworking-plugins", "libseccomp2"}

// Debian downloads and unpacks what a node needs besides Kubernetes, and returns the root they are unpacked in.
func Debian(ctx context.Context, cache string) (string, error) {
	root := filepath.Join(cache, "debian")
	if _, err := os.Stat(filepath.Join(root, "usr/bin/containerd")); err == nil {
		return root, nil
	}
	progress("downloading %v (once)", packages)
	tmp := root + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return "", err
	}
	archives := filepath.Join(tmp, "archives")
	if err := os.MkdirAll(archives, 0o755); err != nil {
		return "", err
	}
	if err := download(ctx, archives); err != nil {
		return "", err
	}
	found, err := filepath.Glob(filepath.Join(archives, "*.deb"))
	if err != nil {
		return "", err
	}
	for _, archive := range found {
		if out, err := exec.CommandContext(ctx, "dpkg", "-x", archive, tmp).CombinedOutput(); err != nil {
			return "", fmt.Errorf("e2e: dpkg -x %s: %w: %s", archive, err, out)
		}
	}
	if err := os.RemoveAll(archives); err != nil {
		return "", err
	}
	if err := os.RemoveAll(root); err != nil {
		return "", err
	}
	return root, os.Rename(tmp, root)
}

// download gets the packages into dir. Where apt's lists are missing, or name
// versions that are gone, they are fetched and it tries again.
func download(ctx context.Context, dir string) error {
	// apt's own sandbox user cannot write here, and needs not.
	apt := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"}, args...)...)
		cmd.Dir = dir
		return cmd.CombinedOutput()
	}
	want := append([]string{"download"}, packages...)
	if _, err := apt(want...); err == nil {
		return nil
	}
	progress("apt-get update: the lists of packages are missing or old")
	if out, err := apt("update"); err != nil {
		return fmt.Errorf("e2e: apt-get update: %w: %s", err, out)
	}
	if out, err := apt(want...); err != nil {
		return fmt.Errorf("e2e: apt-get %v: %w: %s", want, err, out)
	}
	return nil
}
