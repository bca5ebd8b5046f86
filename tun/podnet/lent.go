package podnet

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// soNetnsCookie is SO_NETNS_COOKIE, Linux 5.14.
const soNetnsCookie = 71

// CheckFiles says what is wrong with files that somebody without privileges says
// are the packet descriptor of this pod's device and its ICMP sockets: another
// pod's would give the one pod's traffic the other's identity. Before Linux 5.14
// only names and kinds can be told.
func (st *State) CheckFiles(device *os.File, icmp []*os.File) error {
	if err := onFD(device, st.checkDevice); err != nil {
		return fmt.Errorf("podnet: device %s: %w", st.Device, err)
	}
	for _, f := range icmp {
		if err := onFD(f, st.checkICMP); err != nil {
			return fmt.Errorf("podnet: ICMP socket: %w", err)
		}
	}
	return nil
}

// onFD calls f with the descriptor, whose flags others share and Fd could change.
func onFD(file *os.File, f func(fd int) error) error {
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = rc.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}

func (st *State) checkDevice(fd int) error {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return fmt.Errorf("the descriptor is of no TUN device: %w", err)
	}
	if ifr.Name() != st.Device || ifr.Uint16()&unix.IFF_TUN == 0 {
		return fmt.Errorf("the descriptor is of device %s with flags %#x", ifr.Name(), ifr.Uint16())
	}
	ns, err := unix.IoctlRetInt(fd, unix.TUNGETDEVNETNS)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) { // Before Linux 5.2.
		return nil
	}
	if err != nil {
		return fmt.Errorf("its network namespace: %w", err)
	}
	f := os.NewFile(uintptr(ns), "netns")
	defer f.Close()
	var cookie uint64
	if err := Inside(f, func() error { cookie = netnsCookie(); return nil }); err != nil {
		return err
	}
	return st.checkCookie(cookie)
}

func (st *State) checkICMP(fd int) error {
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("the descriptor is of no socket: %w", err)
	}
	proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return err
	}
	if typ != unix.SOCK_RAW || proto != unix.IPPROTO_ICMP && proto != unix.IPPROTO_ICMPV6 {
		return fmt.Errorf("the socket is of type %d and protocol %d", typ, proto)
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, soNetnsCookie)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return nil
	}
	if err != nil {
		return err
	}
	return st.checkCookie(cookie)
}

func (st *State) checkCookie(cookie uint64) error {
	if cookie != 0 && st.Netns != 0 && cookie != st.Netns {
		return fmt.Errorf("it is of network namespace %d, not %d", cookie, st.Netns)
	}
	return nil
}
