package tun

import (
	"encoding/binary"
	"fmt"
)

// HeaderSize is the length of struct virtio_net_hdr (linux/virtio_net.h), in
// bytes; it precedes every packet.
const HeaderSize = 10

// Flags of a Header.
const (
	NeedsChecksum = 1 // the transport checksum is to be completed from CsumStart
	DataValid     = 2 // the kernel vouches for the checksum
)

// Segmentation kinds of a Header.
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOUDP   = 3
	GSOTCPv6 = 4
	GSOUDPL4 = 5
	gsoECN   = 0x80
)

// Header is the virtio network header: what the sender left undone.
type Header struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // bytes of IP and TCP header, a hint
	GSOSize    uint16 // bytes of payload in each segment
	CsumStart  uint16 // where the checksummed bytes begin
	CsumOffset uint16 // where, from CsumStart, the checksum goes
}

// HeaderError names the field that makes a packet unusable.
type HeaderError struct {
	Field string
	Value uint32
}

func (e *HeaderError) Error() string {
	return fmt.Sprintf("tun: virtio header: %s %d is not possible", e.Field, e.Value)
}

func decodeHeader(b *[HeaderSize]byte) Header {
	return Header{
		Flags:      b[0],
		GSOType:    b[1],
		HdrLen:     binary.NativeEndian.Uint16(b[2:]),
		GSOSize:    binary.NativeEndian.Uint16(b[4:]),
		CsumStart:  binary.NativeEndian.Uint16(b[6:]),
		CsumOffset: binary.NativeEndian.Uint16(b[8:]),
	}
}

func (h Header) encode(b *[HeaderSize]byte) {
	b[0], b[1] = h.Flags, h.GSOType
	binary.NativeEndian.PutUint16(b[2:], h.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], h.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], h.CsumOffset)
}

// validate checks h against a packet of n bytes. The kernel of the pod wrote
// it, but a process of the pod may have made it do so.
func (h Header) validate(n int) error {
	if n == 0 {
		return &HeaderError{Field: "packet length", Value: 0}
	}
	if h.Flags&NeedsChecksum != 0 && int(h.CsumStart)+int(h.CsumOffset)+2 > n {
		return &HeaderError{Field: "csum_start+csum_offset", Value: uint32(h.CsumStart) + uint32(h.CsumOffset)}
	}
	switch h.GSOType &^ gsoECN {
	case GSONone:
		return nil
	case GSOTCPv4, GSOTCPv6:
	default:
		return &HeaderError{Field: "gso_type", Value: uint32(h.GSOType)}
	}
	if h.GSOSize == 0 {
		return &HeaderError{Field: "gso_size", Value: 0}
	}
	// hdr_len is only a hint, and some kernels leave the whole linear part in it.
	if int(h.HdrLen) > n {
		return &HeaderError{Field: "hdr_len", Value: uint32(h.HdrLen)}
	}
	return nil
}

// ChecksumVouched says that the kernel answers for the transport checksum:
// it either has verified it or has yet to fill it in.
func (h Header) ChecksumVouched() bool { return h.Flags&(NeedsChecksum|DataValid) != 0 }
