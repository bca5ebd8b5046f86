// Package tun is the waist between the kernel and a pod's stack: a Device
// moves whole IP packets, super-segments included, across a packet descriptor
// with one virtio network header each.
//
// A Device holds no goroutine and no buffer. One reader at a time may call
// Read; Write may be called by anyone. Creating the kernel's device is Create's
// work and needs CAP_NET_ADMIN in the pod; everything else needs only the
// descriptor.
//
// # What Linux may lack
//
// Each is found out by trying, once a device: by Create and Open in the agent,
// by New and the first Read in the proxy. A Device tells with Lacks.
//
//	feature          Linux    found out by                 without it
//	RWF_NOWAIT       6.4      preadv2 says EOPNOTSUPP      poll, then read: one call
//	on a TUN                  (EINVAL < 4.14, ENOSYS <     more a packet
//	                          4.6; EPERM by seccomp)
//	IFF_VNET_HDR     2.6.27   TUNSETIFF says EINVAL;       as without offloads, and no
//	                          TUNGETIFF does not show it   header before the packets
//	TUNSETOFFLOAD    2.6.27   refused                      packets of an MTU with whole
//	(csum, TSO4,6)                                         checksums, both ways
//	TSO of one       -        not found out, nor needed:   the kernel cuts the packets of
//	family, or off            each header says what it is  that family before they arrive
//	(ethtool -K)
//	TUNSETVNETHDRSZ  2.6.34   refused                      the size is 10 then; New
//	                                                       refuses any other
//
// RWF_NOWAIT came to TUN devices with commit 438b406055cd of Linux 6.4, which
// distributions on 5.x and 6.1 lack. What goes out with a header need not be
// agreed on: any kernel with headers takes super-segments and partial checksums
// of both families. UDP segmentation offload is never asked for.
package tun

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// MaxPacket is the largest IP packet that crosses a Device, in bytes: a
// super-segment of the kernel's segmentation offload.
const MaxPacket = 65535

// MaxViews is the number of buffers a Vector holds.
const MaxViews = 8

// ErrEmpty says that no packet waits to be read.
var ErrEmpty = errors.New("tun: no packet waits")

// Options describe a descriptor that somebody else opened.
type Options struct {
	// MTU of the pod's interface, in bytes of an IP packet. Default 1500.
	MTU uint32
	// Offload says that the kernel agreed to checksum and segmentation
	// offload, so both sides may send super-segments. It counts for nothing on
	// a device without virtio headers.
	Offload bool
}

// Device is one TUN device, or anything else that keeps packet boundaries.
type Device struct {
	file    *os.File
	fd      int
	mtu     uint32
	offload bool
	// skip is 1 where packets have no virtio header, else 0: the first part of
	// a Vector or Writer that crosses.
	skip int
	// pollFirst is set by the first Read where a read cannot be told not to wait.
	pollFirst bool
}

// New adopts f, whose reads and writes carry one packet each, behind a 10-byte
// virtio header unless the kernel says that the device has none. It refuses
// devices whose packets look otherwise. The descriptor's flags are left as they
// are: they are shared with whoever else holds it.
func New(f *os.File, o Options) (*Device, error) {
	if f == nil {
		return nil, errors.New("tun: no descriptor")
	}
	if o.MTU == 0 {
		o.MTU = 1500
	}
	if o.MTU < 576 || o.MTU > MaxPacket {
		return nil, fmt.Errorf("tun: MTU %d is not within 576 and %d", o.MTU, MaxPacket)
	}
	// Fd would switch the descriptor to blocking mode.
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("tun: descriptor of %s: %w", f.Name(), err)
	}
	d := &Device{file: f, mtu: o.MTU, offload: o.Offload}
	if err := rc.Control(func(fd uintptr) { d.fd = int(fd) }); err != nil {
		return nil, fmt.Errorf("tun: descriptor of %s: %w", f.Name(), err)
	}
	if err := d.ask(); err != nil {
		return nil, fmt.Errorf("tun: descriptor of %s: %w", f.Name(), err)
	}
	return d, nil
}

// FD is the descriptor, to wait on. It stays the Device's.
func (d *Device) FD() int { return d.fd }

// MTU is the largest packet of the pod's interface, in bytes.
func (d *Device) MTU() uint32 { return d.mtu }

// Offload says whether super-segments and partial checksums may cross.
func (d *Device) Offload() bool { return d.offload }

// Close gives the descriptor back. No Read or Write may be under way.
func (d *Device) Close() error { return d.file.Close() }

// Read takes the next packet into v's buffers without blocking. It returns
// the packet's length and its validated header, ErrEmpty when none waits, a
// *HeaderError for a packet to be dropped, or the kernel's error when the
// device is gone; io.EOF when it was a socket's other end.
func (d *Device) Read(v *Vector) (int, Header, error) {
	n, errno := d.readv(v)
	switch {
	case errno == 0 && n == 0:
		return 0, Header{}, io.EOF
	case errno == 0:
	case errno == unix.EAGAIN, errno == unix.EINTR:
		return 0, Header{}, ErrEmpty
	default:
		return 0, Header{}, fmt.Errorf("tun: read: %w", errno)
	}
	var h Header
	if d.skip == 0 {
		if n < HeaderSize {
			return 0, Header{}, &HeaderError{Field: "length", Value: uint32(n)}
		}
		n -= HeaderSize
		h = decodeHeader(&v.head)
	}
	if err := h.validate(n); err != nil {
		return n, h, err
	}
	return n, h, nil
}

// Write sends one packet made of the parts given. It does not block: what the
// kernel cannot take is lost, as on any wire.
func (d *Device) Write(h Header, parts ...[]byte) error {
	var w Writer
	w.Reset(h)
	for _, p := range parts {
		if !w.Append(p) {
			return fmt.Errorf("tun: write: more than %d parts", maxParts)
		}
	}
	return d.WriteVector(&w)
}
