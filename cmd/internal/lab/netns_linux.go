package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A space is a network namespace of the lab, held by a file.
type space struct {
	path string // Bind mount of the namespace, in the lab's mount namespace.
	file *os.File
}

// newSpace makes a network namespace, mounts it at path and brings its
// loopback up.
func newSpace(path string) (*space, error) {
	type result struct {
		file *os.File
		err  error
	}
	made := make(chan result)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		file, err := unshareNet(path)
		made <- result{file, err}
	}()
	r := <-made
	if r.err != nil {
		return nil, fmt.Errorf("lab: network namespace %s: %w", path, r.err)
	}
	s := &space{path: path, file: r.file}
	if err := s.prepare(); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func unshareNet(path string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	mountPoint, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, err
	}
	mountPoint.Close()
	if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return os.Open(path)
}

// prepare sets what every namespace of the lab has: loopback up, and IPv6
// addresses that are usable at once.
func (s *space) prepare() error {
	if err := s.sysctl("net/ipv6/conf/default/accept_dad", "0"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return s.link(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
}

// close gives the namespace up. It lives on while a process is in it.
func (s *space) close() error {
	return errors.Join(s.file.Close(), unix.Unmount(s.path, unix.MNT_DETACH), os.Remove(s.path))
}

// do runs f on a thread that is in the namespace.
func (s *space) do(f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("lab: enter %s: %w", s.path, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// start starts cmd in the namespace.
func (s *space) start(cmd *exec.Cmd) error { return s.do(cmd.Start) }

// link runs f with a netlink handle of the namespace.
func (s *space) link(f func(*netlink.Handle) error) error {
	h, err := netlink.NewHandleAt(netns.NsHandle(s.file.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("lab: netlink in %s: %w", s.path, err)
	}
	defer h.Close()
	if err := f(h); err != nil {
		return fmt.Errorf("lab: network of %s: %w", s.path, err)
	}
	return nil
}

// sysctl writes a value below /proc/sys in the namespace.
func (s *space) sysctl(name, value string) error {
	return s.do(func() error {
		return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
	})
}
