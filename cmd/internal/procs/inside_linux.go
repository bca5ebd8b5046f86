package procs

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun/podnet"
)

// netlinkTimeout bounds one request to the kernel.
const netlinkTimeout = 5 * time.Second

// identify names an open namespace.
func identify(ns *os.File) (id nsID, err error) {
	rc, err := ns.SyscallConn()
	if err != nil {
		return id, err
	}
	var st unix.Stat_t
	var statErr error
	if err := rc.Control(func(fd uintptr) { statErr = unix.Fstat(int(fd), &st) }); err != nil {
		return id, err
	}
	return nsID{st.Dev, st.Ino}, statErr
}

// identifyPath names the namespace that a link of /proc leads to.
func identifyPath(dir int, path string) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, path, &st, 0); err != nil {
		return nsID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return nsID{st.Dev, st.Ino}, nil
}

// dumpTries is how often a list is asked for again that changed while it was read.
const dumpTries = 8

// addresses lists those of all interfaces of a namespace.
func addresses(ns *os.File) (out []netip.Addr, err error) {
	var h *netlink.Handle
	err = podnet.Inside(ns, func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer h.Close()
	if err := h.SetSocketTimeout(netlinkTimeout); err != nil {
		return nil, err
	}
	list, err := h.AddrList(nil, netlink.FAMILY_ALL)
	for try := 1; errors.Is(err, netlink.ErrDumpInterrupted) && try < dumpTries; try++ {
		list, err = h.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			out = append(out, addr.Unmap())
		}
	}
	return out, nil
}
