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
	// apt's own sandbox user cannot write here, and needs not.
	download := exec.CommandContext(ctx, "apt-get", append([]string{"-qq", "-o", "APT::Sandbox::User=root", "download"}, packages...)...)
	download.Dir, download.Stdout, download.Stderr = archives, os.Stderr, os.Stderr
	if err := download.Run(); err != nil {
		return "", fmt.Errorf("e2e: apt-get download %v: %w (are the lists there? apt-get update)", packages, err)
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
