package podnet

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ICMP types of errors about a packet that was sent.
const (
	icmpDestUnreachable = 3  // linux/icmp.h
	icmpTimeExceeded    = 11 // linux/icmp.h
	icmpFilter          = 1  // ICMP_FILTER at SOL_RAW, linux/icmp.h
	solRaw              = 255

	icmp6DestUnreachable = 1 // RFC 4443
	icmp6PacketTooBig    = 2 // RFC 4443
	icmp6TimeExceeded    = 3 // RFC 4443
	icmp6FilterOption    = 1 // ICMPV6_FILTER at SOL_ICMPV6, linux/icmpv6.h
)

// OpenICMP opens one raw ICMP and one raw ICMPv6 socket in the namespace, for
// the proxy to read: the errors about its connections reach the pod's kernel, which
// knows nothing of them. They receive errors only, and whoever holds them can
// send ICMP from the pod, as the pod itself could. A family that the
// namespace lacks is left out. It needs CAP_NET_RAW.
func (a *Attachment) OpenICMP() ([]*os.File, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kernel == nil {
		return nil, errors.New("podnet: attachment is closed")
	}
	var files []*os.File
	err := a.kernel.inside(func() error {
		for _, open := range []func() (int, error){openICMP4, openICMP6} {
			fd, err := open()
			if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPROTONOSUPPORT) {
				continue
			}
			if err != nil {
				return fmt.Errorf("podnet: raw ICMP socket: %w", err)
			}
			files = append(files, os.NewFile(uintptr(fd), "icmp"))
		}
		return nil
	})
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	return files, nil
}

func openICMP4() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return -1, err
	}
	// A bit set is a type that is kept out.
	mask := ^(1<<icmpDestUnreachable | 1<<icmpTimeExceeded)
	if err := unix.SetsockoptInt(fd, solRaw, icmpFilter, int(int32(mask))); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func openICMP6() (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return -1, err
	}
	filter := unix.ICMPv6Filter{}
	for i := range filter.Data {
		filter.Data[i] = ^uint32(0)
	}
	filter.Data[0] &^= 1<<icmp6DestUnreachable | 1<<icmp6PacketTooBig | 1<<icmp6TimeExceeded
	if err := unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, icmp6FilterOption, &filter); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
