package tuntest

import (
	"encoding/binary"

	"github.com/ztun/ztun/tun"
)

const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

// cut cuts a super-segment as the kernel would for a device without
// segmentation offload, and calls f with each segment, valid until f returns.
// Checksums are left undone as they were, so that a byte that is lost or moved
// on the way is not hidden by a segment that is sent again. Other packets go
// to f as they are. It reports false, and calls nothing, for a super-segment
// whose headers make no sense.
func cut(p packet, scratch []byte, f func(packet)) bool {
	const ecn = 0x80
	kind := p.h.GSOType &^ ecn
	if kind == tun.GSONone {
		f(p)
		return true
	}
	l4, head, ok := headers(p.b, kind == tun.GSOTCPv6)
	if !ok || p.h.GSOSize == 0 {
		return false
	}
	payload, size := p.b[head:], int(p.h.GSOSize)
	seq := binary.BigEndian.Uint32(p.b[l4+4:])
	flags := p.b[l4+13]
	for off := 0; off == 0 || off < len(payload); off += size {
		part := payload[off:min(off+size, len(payload))]
		b := append(append(scratch[:0], p.b[:head]...), part...)
		binary.BigEndian.PutUint32(b[l4+4:], seq+uint32(off))
		b[l4+13] = flags
		if off+size < len(payload) {
			b[l4+13] &^= tcpFIN | tcpPSH
		}
		if off > 0 {
			b[l4+13] &^= tcpCWR
		}
		setLength(b, l4, off/size)
		f(packet{tun.Header{Flags: tun.NeedsChecksum, CsumStart: uint16(l4), CsumOffset: 16}, b})
	}
	return true
}

// headers finds the TCP header and what follows it. IPv6 extension headers do
// not occur in super-segments.
func headers(b []byte, v6 bool) (l4, payload int, ok bool) {
	l4 = 40
	switch {
	case v6 && len(b) >= l4 && b[0]>>4 == 6 && b[6] == 6:
	case !v6 && len(b) >= 20 && b[0]>>4 == 4 && b[9] == 6:
		l4 = int(b[0]&15) * 4
	default:
		return 0, 0, false
	}
	if l4 < 20 || len(b) < l4+20 {
		return 0, 0, false
	}
	payload = l4 + int(b[l4+12]>>4)*4
	return l4, payload, payload >= l4+20 && payload <= len(b)
}

// setLength writes what depends on the length of the i-th segment into its
// headers: the IP header, and the sum of the pseudo-header that stands in the
// place of a checksum left undone.
func setLength(b []byte, l4, i int) {
	addrs := b[8:40]
	if b[0]>>4 == 4 {
		addrs = b[12:20]
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[4:], binary.BigEndian.Uint16(b[4:])+uint16(i))
		binary.BigEndian.PutUint16(b[10:], 0)
		binary.BigEndian.PutUint16(b[10:], ^sum(0, b[:l4]))
	} else {
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-l4))
	}
	binary.BigEndian.PutUint16(b[l4+16:], sum(uint32(6+len(b)-l4), addrs))
}

// sum is the Internet checksum's sum of an even number of bytes, RFC 1071.
func sum(s uint32, b []byte) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
