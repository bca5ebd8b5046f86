// Package procs finds out from the kernel what only the kernel knows for
// certain: which network namespace is a running pod's, and whether a process
// of the host owns a TCP socket.
//
// A Finder looks at the host's processes. A namespace is a pod's only if all
// agree: a live process is in the pod's cgroup, the process is in the
// namespace, an interface of the namespace has an address of the pod, and
// nothing of that is true of another pod. Owners asks socket diagnosis in the
// host's network namespace.
//
//	f := procs.Finder{Proc: "/host/proc"}
//	found, err := f.Find(ctx, []procs.Target{{UID: uid, Addresses: addrs}})
//	// ... just before it is used:
//	err = f.Verify(ctx, found[uid], target)
//
// What it does not do: change anything, keep anything of a Finder, or know of
// pods whose first process has not started (their runtime says where they are).
// Everything may be called from any goroutine.
package procs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A Target says which pod's namespace is looked for.
type Target struct {
	// UID is the pod's, or of a static pod the kubelet's configuration hash.
	UID string
	// Addresses are the pod's. Without any the pod is not looked for.
	Addresses []netip.Addr
	// Containers are the IDs of the pod's containers, for runtimes whose cgroups
	// do not name the pod. May be nil.
	Containers []string
}

// A Finder reads the processes of a host. It needs the right to look at other
// users' processes (CAP_SYS_PTRACE) and to enter namespaces (CAP_SYS_ADMIN).
type Finder struct {
	// Proc is a /proc that shows the host's processes: "/host/proc" in a
	// container, "/proc" otherwise.
	Proc string
	// Host is the host's network namespace, which no pod has. It stays the
	// caller's. nil: that of process 1.
	Host *os.File
}

// nsID names a namespace while it exists.
type nsID struct{ dev, ino uint64 }

// claim is the oldest process of a pod in a namespace.
type claim struct {
	file    *os.File
	started uint64 // In clock ticks since the host started.
}

// Find returns the open namespace of each pod that it is sure of, by the UID of
// the Target; the caller owns the files. Pods that are not found are left out.
// After an error there are none.
func (f *Finder) Find(ctx context.Context, targets []Target) (map[string]*os.File, error) {
	claims := make([]map[nsID]claim, len(targets))
	defer func() {
		for _, c := range claims {
			for _, one := range c {
				_ = one.file.Close()
			}
		}
	}()
	err := f.scan(ctx, func(p *process) error {
		i := matching(targets, p)
		if i < 0 {
			return nil
		}
		if claims[i] == nil {
			claims[i] = map[nsID]claim{}
		}
		return p.claim(claims[i])
	})
	if err != nil {
		return nil, err
	}
	return settle(targets, claims)
}

// matching returns the only target that the process is of, or -1.
func matching(targets []Target, p *process) int {
	found := -1
	for i := range targets {
		if len(targets[i].Addresses) == 0 || !targets[i].owns(p.cgroup) {
			continue
		}
		if found >= 0 {
			return -1
		}
		found = i
	}
	return found
}

// owns reports whether a cgroup is the pod's.
func (t *Target) owns(c cgroup) bool {
	if c.pod != "" {
		return c.pod == canonical(t.UID)
	}
	return c.container != "" && slices.Contains(t.Containers, c.container)
}

// settle chooses a namespace for each target. A namespace that two pods could
// have is nobody's.
func settle(targets []Target, claims []map[nsID]claim) (map[string]*os.File, error) {
	chosen := make([]nsID, len(targets))
	taken := map[nsID]int{}
	for i, t := range targets {
		var best claim
		for id, c := range claims[i] {
			if holds(c.file, t.Addresses) != nil {
				continue
			}
			taken[id]++
			if best.file == nil || c.started < best.started {
				best, chosen[i] = c, id
			}
		}
	}
	out := map[string]*os.File{}
	for i, t := range targets {
		c, ok := claims[i][chosen[i]]
		if !ok || taken[chosen[i]] > 1 {
			continue
		}
		delete(claims[i], chosen[i]) // The caller's now.
		out[t.UID] = c.file
	}
	return out, nil
}

// Verify says whether an open namespace still is the pod's: a live process of
// the pod's cgroup is in it, and an interface in it has at least one of the
// addresses. nil means yes.
func (f *Finder) Verify(ctx context.Context, ns *os.File, t Target) error {
	if ns == nil {
		return errors.New("procs: no namespace to verify")
	}
	want, err := identify(ns)
	if err != nil {
		return fmt.Errorf("procs: verify pod %s: %w", t.UID, err)
	}
	found := false
	err = f.scan(ctx, func(p *process) error {
		if p.ns == want && t.owns(p.cgroup) {
			found = true
			return errFound
		}
		return nil
	})
	if err != nil && !found {
		return err
	}
	if !found {
		return fmt.Errorf("procs: verify pod %s: no process of its cgroup is in namespace %d", t.UID, want.ino)
	}
	if err := holds(ns, t.Addresses); err != nil {
		return fmt.Errorf("procs: verify pod %s: namespace %d: %w", t.UID, want.ino, err)
	}
	return nil
}

// errFound ends a scan early.
var errFound = errors.New("procs: found")

// holds says why a namespace does not have any of the addresses; nil: it has.
func holds(ns *os.File, want []netip.Addr) error {
	have, err := addresses(ns)
	if err != nil {
		return err
	}
	for _, a := range want {
		if slices.Contains(have, a.Unmap()) {
			return nil
		}
	}
	return fmt.Errorf("no interface has an address of %v", want)
}

// scan calls each for every process of a pod that is in a namespace of its own.
// What each was given is valid until it returns.
func (f *Finder) scan(ctx context.Context, each func(*process) error) error {
	host, err := f.host()
	if err != nil {
		return fmt.Errorf("procs: the host's namespace: %w", err)
	}
	// Nor is our own a pod's to be found, wherever we run.
	own, err := identifyPath(unix.AT_FDCWD, "/proc/self/ns/net")
	if err != nil {
		return fmt.Errorf("procs: our own namespace: %w", err)
	}
	pids, err := listPIDs(f.Proc)
	if err != nil {
		return err
	}
	var denied error
	seen := 0
	for _, pid := range pids {
		if ctx.Err() != nil {
			return fmt.Errorf("procs: scan of %s: %w", f.Proc, context.Cause(ctx))
		}
		p, err := openProcess(f.Proc, pid)
		switch {
		case err == nil:
		case isGone(err):
			continue
		case errors.Is(err, fs.ErrPermission):
			denied = err // It is nobody's then.
			continue
		default:
			return err
		}
		seen++
		err = func() error {
			defer p.close()
			if p.ns == host || p.ns == own || p.readCgroup() != nil || !p.cgroup.isPod() {
				return nil // The host's, gone meanwhile, or not clearly of one pod.
			}
			return each(p)
		}()
		if err != nil {
			return err
		}
	}
	if seen == 0 && denied != nil {
		return denied
	}
	return nil
}

func (f *Finder) host() (nsID, error) {
	if f.Host != nil {
		return identify(f.Host)
	}
	return identifyPath(unix.AT_FDCWD, f.Proc+"/1/ns/net")
}

// isGone says that a process ended while it was looked at.
func isGone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist)
}
