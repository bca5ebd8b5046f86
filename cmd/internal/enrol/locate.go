package enrol

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/ztun/ztun/cmd/internal/procs"
)

// A locator finds the namespaces of running pods. One look at all processes
// serves every pod that is looked for.
type locator struct {
	finder Finder
	dir    string // Config.NetnsDir.

	// mu guards the field below, and is held through a scan.
	mu    sync.Mutex
	found map[string]*os.File // By a target's UID; not asked for yet.
}

// errNoProcess says that a pod's namespace was looked for, and no process has it.
var errNoProcess = errors.New("enrol: no process has the pod's network namespace")

// isLasting says whether a path still names the same namespace, or none, after
// a restart. Processes and descriptors are numbered anew.
func (c *Controller) isLasting(path string) bool {
	return !strings.HasPrefix(path, "/proc/") && !strings.HasPrefix(path, filepath.Join(c.cfg.HostRoot, "proc")+"/")
}

// find returns the pod's open namespace; the caller owns it. others are looked
// for with it, for whoever asks next.
func (l *locator) find(ctx context.Context, t procs.Target, others func() []procs.Target) (*os.File, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.found[t.UID]; f != nil {
		delete(l.found, t.UID)
		return f, nil
	}
	l.clearLocked()
	targets := []procs.Target{t}
	for _, o := range others() {
		if o.UID != t.UID {
			targets = append(targets, o)
		}
	}
	found, err := l.finder.Find(ctx, targets)
	if err != nil {
		return nil, fmt.Errorf("enrol: find namespaces: %w", err)
	}
	l.found = found
	f := l.found[t.UID]
	if f == nil {
		return nil, fmt.Errorf("%w: pod %s with an address of %v", errNoProcess, t.UID, t.Addresses)
	}
	delete(l.found, t.UID)
	return f, nil
}

// clear lets go of what nobody asked for.
func (l *locator) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clearLocked()
}

func (l *locator) clearLocked() {
	for _, f := range l.found {
		_ = f.Close()
	}
	l.found = nil
}

// path returns the way to an open namespace: its mount, or else the descriptor,
// which then has to stay open.
func (l *locator) path(ns *os.File) (path string, mounted bool) {
	if want, err := ns.Stat(); err == nil && l.dir != "" {
		entries, _ := os.ReadDir(l.dir) // Without it, nothing is mounted there.
		for _, e := range entries {
			path := filepath.Join(l.dir, e.Name())
			if have, err := os.Stat(path); err == nil && os.SameFile(want, have) {
				return path, true
			}
		}
	}
	return fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), false
}
