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

	icmp6DestUnreachable = 1 // RFC 4443
	icmp6PacketTooBig    = 2 // RFC 4443
	icmp6TimeExceeded    = 3 // RFC 4443
	icmp6FilterOption    = 1 // ICMPV6_FILTER at SOL_ICMPV6, linux/icmpv6.h
)

// OpenICMP opens one raw ICMP and one raw ICMPv6 socket in the namespace, for
// the proxy to read: the errors about its connections reach the pod's kernel, which
// knows nothing of them. They receive errors only, and whoever holds them can
// send ICMP from the pod, as the pod itself could. A family that is
// switched off is left out. Without CAP_NET_RAW the error matches EPERM.
func (a *Attachment) OpenICMP() ([]*os.File, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kernel == nil {
		return nil, errClosed
	}
	var files []*os.File
	err := a.kernel.inside(func() (err error) {
		files, err = openICMP(a.kernel.families())
		return err
	})
	return files, err
}

// openICMP opens a socket for each family in the namespace of its thread: all or, with an error, none.
func openICMP(families []uint8) (files []*os.File, err error) {
	for _, family := range families {
		open := openICMP4
		if family == unix.AF_INET6 {
			open = openICMP6
		}
		fd, err := open()
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPROTONOSUPPORT) {
			continue
		}
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
			return nil, fmt.Errorf("podnet: raw ICMP socket: %w", err)
		}
		files = append(files, os.NewFile(uintptr(fd), "icmp"))
	}
	return files, nil
}

func openICMP4() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return -1, err
	}
	// Not ICMP_FILTER, which lets types over 31 through.
	program := []unix.SockFilter{
		{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH},                                    // x = length of the IP header
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_IND},                                     // a = type
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: icmpDestUnreachable, Jt: 1},     // take it
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: icmpTimeExceeded, Jt: 0, Jf: 1}, // take it, else drop it
		{Code: unix.BPF_RET | unix.BPF_K, K: 1<<16 - 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &filter); err != nil {
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
