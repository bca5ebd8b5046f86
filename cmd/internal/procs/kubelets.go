package procs

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// kubeletNames are those of programs that are, or have within them, a kubelet.
// k3s starts itself again under the last two.
var kubeletNames = []string{"kubelet", "kubelite", "k3s", "k3s-server", "k3s-agent"}

// rescanAfter is how old the list of kubelets may be when a socket is none of
// theirs: one may have been started since.
const rescanAfter = time.Second

// kubelets are the processes that are a kubelet by name, in the host's network
// namespace, and no pod's.
type kubelets struct {
	proc string
	host nsID

	// mu guards the fields below.
	mu      sync.Mutex
	known   []kubelet
	partial bool // Some process could not be looked at.
	scanned time.Time
}

// kubelet names a process for ever: no later one has its PID and start.
type kubelet struct {
	pid     int
	started uint64
}

func newKubelets(proc string, host nsID) *kubelets { return &kubelets{proc: proc, host: host} }

// own says who of the host owns the socket with an inode, which a process does.
func (k *kubelets) own(inode uint32) Owner {
	k.mu.Lock()
	defer k.mu.Unlock()
	fresh := false
	for {
		o := k.lookLocked(inode)
		if o == OwnerKubelet || fresh || !k.scanned.IsZero() && time.Since(k.scanned) < rescanAfter {
			return o
		}
		k.scanLocked()
		fresh = true
	}
}

// lookLocked looks for the socket among the descriptors of the known kubelets.
func (k *kubelets) lookLocked(inode uint32) Owner {
	unsure := k.partial
	live := 0
	for _, one := range k.known {
		has, err := one.has(k.proc, inode)
		switch {
		case has:
			return OwnerKubelet
		case isGone(err):
		case err != nil:
			unsure = true
		default:
			live++
		}
	}
	if unsure || live == 0 {
		return OwnerUnknown // Nor is it known who a kubelet is where none can be seen.
	}
	return OwnerLocal
}

// scanLocked finds the kubelets among the host's processes.
func (k *kubelets) scanLocked() {
	k.scanned = time.Now()
	k.known, k.partial = nil, false
	pids, err := listPIDs(k.proc)
	if err != nil {
		k.partial = true
		return
	}
	for _, pid := range pids {
		started, is, err := k.isKubelet(pid)
		switch {
		case err == nil && is:
			k.known = append(k.known, kubelet{pid, started})
		case err != nil && !isGone(err):
			k.partial = true
		}
	}
}

// isKubelet looks at one process. A pod's process may have any name.
func (k *kubelets) isKubelet(pid int) (started uint64, is bool, err error) {
	p, err := openDir(k.proc, pid)
	if err != nil {
		return 0, false, err
	}
	defer p.close()
	st, err := p.stat()
	if err != nil || !slices.Contains(kubeletNames, st.name) {
		return 0, false, err
	}
	if ns, err := identifyPath(p.dir, "ns/net"); err != nil || ns != k.host {
		return 0, false, err
	}
	switch err := p.readCgroup(); {
	case errors.Is(err, errManyPods), errors.Is(err, errManyContainers):
		return 0, false, nil
	case err != nil:
		return 0, false, err
	}
	return st.started, !p.cgroup.isPod(), nil
}

// has reports whether the process has a socket open. The error matches
// os.ErrNotExist once it has ended.
func (k kubelet) has(proc string, inode uint32) (bool, error) {
	p, err := openDir(proc, k.pid)
	if err != nil {
		return false, err
	}
	defer p.close()
	st, err := p.stat()
	if err != nil {
		return false, err
	}
	if st.started != k.started {
		return false, fmt.Errorf("procs: process %d: %w", k.pid, os.ErrNotExist)
	}
	fd, err := unix.Openat(p.dir, "fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("procs: descriptors of process %d: %w", k.pid, err)
	}
	d := os.NewFile(uintptr(fd), "fd")
	defer d.Close()
	want := "socket:[" + strconv.FormatUint(uint64(inode), 10) + "]"
	buf := make([]byte, 64)
	for {
		names, err := d.Readdirnames(256)
		for _, n := range names {
			size, err := unix.Readlinkat(fd, n, buf)
			if err == nil && string(buf[:size]) == want {
				return true, nil
			}
			if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
				return false, fmt.Errorf("procs: descriptor %s of process %d: %w", n, k.pid, err)
			}
		}
		if err != nil || len(names) == 0 {
			return false, nil // io.EOF, or it ended meanwhile.
		}
	}
}
