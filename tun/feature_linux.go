package tun

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A Feature is something of Linux that a Device works without, slower.
type Feature uint8

const (
	// NoWait is a read that is told not to wait.
	NoWait Feature = iota
	// VirtioHeader is the header before each packet. Without it there is no
	// Offload either.
	VirtioHeader
	// Offload is checksum and TCP segmentation offload.
	Offload
)

// String is the feature's name in Linux.
func (f Feature) String() string {
	switch f {
	case NoWait:
		return "RWF_NOWAIT on TUN devices (Linux 6.4)"
	case VirtioHeader:
		return "virtio headers (IFF_VNET_HDR)"
	case Offload:
		return "checksum and segmentation offload (TUNSETOFFLOAD)"
	}
	return fmt.Sprintf("feature %d", uint8(f))
}

// Cost says in a few words what it costs to do without.
func (f Feature) Cost() string {
	switch f {
	case NoWait:
		return "one more system call for each packet read"
	case VirtioHeader, Offload:
		return "no packet exceeds the MTU, each checksum is computed in software: bulk takes several times the CPU"
	}
	return ""
}

// Lacks lists what the device does without. NoWait is known from the first
// Read on. It must not be called during a Read.
func (d *Device) Lacks() []Feature {
	var list []Feature
	if d.pollFirst {
		list = append(list, NoWait)
	}
	switch {
	case d.skip != 0:
		list = append(list, VirtioHeader)
	case !d.offload:
		list = append(list, Offload)
	}
	return list
}

// ask finds out what a packet looks like on the descriptor: whoever made the
// device may have been another program, on a kernel that lacks something. What
// is no TUN (the sockets of tuntest) has headers. Linux does not tell a device
// without IFF_NO_PI from one with it.
func (d *Device) ask() error {
	flags, err := flagsOf(d.fd)
	switch {
	case err != nil:
		return nil
	case flags&unix.IFF_TUN == 0:
		return errors.New("not a TUN device")
	case flags&unix.IFF_VNET_HDR == 0:
		d.skip, d.offload = 1, false
		// On since another descriptor of the device, they would come unannounced.
		_ = unix.IoctlSetInt(d.fd, unix.TUNSETOFFLOAD, 0)
		return nil
	}
	size, err := unix.IoctlGetInt(d.fd, unix.TUNGETVNETHDRSZ)
	if err != nil || size == HeaderSize {
		return nil // Before there was the call every header had this size.
	}
	if err := unix.IoctlSetPointerInt(d.fd, unix.TUNSETVNETHDRSZ, HeaderSize); err != nil {
		return fmt.Errorf("virtio headers have %d bytes, not %d: %w", size, HeaderSize, err)
	}
	return nil
}

// flagsOf returns the IFF_ flags of the TUN device that fd is bound to.
func flagsOf(fd int) (uint16, error) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return 0, err
	}
	return ifr.Uint16(), nil
}
