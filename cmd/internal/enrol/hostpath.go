package enrol

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// maxLinks bounds symbolic links from one to the next.
const maxLinks = 8

// hostPath returns the way of this process to a network namespace that the runtime
// names by a path of the host's. The directory of namespaces may be mounted under
// another name than it has there; and a link that leads to a path of the host's
// would lead to one of ours.
func (c *Controller) hostPath(path string) (string, error) {
	path = filepath.Clean(path)
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("enrol: network namespace %q: the path is not absolute", path)
	}
	for range maxLinks {
		at, err := c.seenAt(path)
		if err != nil || strings.HasPrefix(path, "/proc/") { // Links there lead to what has no path.
			return at, err
		}
		target, err := os.Readlink(at)
		if err != nil {
			return at, nil // No link. Who opens it says whether it is there.
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = filepath.Clean(target)
	}
	return "", fmt.Errorf("enrol: network namespace %s: more than %d links to follow", path, maxLinks)
}

// seenAt is where this process sees a path of the host's, links left as they are.
func (c *Controller) seenAt(path string) (string, error) {
	dir, hostDir := c.cfg.NetnsDir, withoutVar(c.cfg.HostNetnsDir)
	if rest, ok := strings.CutPrefix(withoutVar(path), hostDir+"/"); ok && dir != "" {
		return filepath.Join(dir, rest), nil
	}
	at := filepath.Join(c.cfg.HostRoot, path)
	if _, err := os.Lstat(at); errors.Is(err, fs.ErrNotExist) {
		if other := filepath.Join(c.cfg.HostRoot, respelled(path)); exists(other) {
			at = other
		}
	}
	if c.cfg.HostRoot != "" && dir != "" && strings.HasPrefix(at, dir+"/") {
		return "", fmt.Errorf("enrol: network namespace %s: the agent sees %s of the host alone (the chart's cniNetnsDir)", path, c.cfg.HostNetnsDir)
	}
	return at, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// withoutVar spells a path below /var/run, which is a link to /run, as one below
// /run.
func withoutVar(path string) string {
	if rest, ok := strings.CutPrefix(path, "/var/run/"); ok {
		return "/run/" + rest
	}
	return path
}

// respelled is the other spelling of a path below /run.
func respelled(path string) string {
	if short := withoutVar(path); short != path {
		return short
	}
	if strings.HasPrefix(path, "/run/") {
		return "/var" + path
	}
	return path
}
