// Package wire listens to a network as a stranger with a tap would, and
// counts what can be told from the outside: TLS records, clear text, and
// whether certain words went by.
package wire

import (
	"encoding/binary"
	"net/netip"
)

// A segment is one TCP segment of an Ethernet frame.
type segment struct {
	src, dst netip.AddrPort
	payload  []byte // Aliases the frame.
}

const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	protoTCP  = 6
)

// parseFrame finds the TCP segment in an Ethernet frame. Fragments and IPv6
// extension headers are nothing that the lab's pods send.
func parseFrame(frame []byte) (segment, bool) {
	if len(frame) < 14 {
		return segment{}, false
	}
	packet := frame[14:]
	switch binary.BigEndian.Uint16(frame[12:14]) {
	case etherIPv4:
		return parseIPv4(packet)
	case etherIPv6:
		return parseIPv6(packet)
	}
	return segment{}, false
}

func parseIPv4(p []byte) (segment, bool) {
	if len(p) < 20 || p[0]>>4 != 4 || p[9] != protoTCP {
		return segment{}, false
	}
	head, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:4]))
	// A total length of 0 is a super-segment too long to say.
	if total == 0 {
		total = len(p)
	}
	if head < 20 || total < head || total > len(p) {
		return segment{}, false
	}
	src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	return parseTCP(src, dst, p[head:total])
}

func parseIPv6(p []byte) (segment, bool) {
	if len(p) < 40 || p[0]>>4 != 6 || p[6] != protoTCP {
		return segment{}, false
	}
	total := 40 + int(binary.BigEndian.Uint16(p[4:6]))
	if total == 40 {
		total = len(p)
	}
	if total > len(p) {
		return segment{}, false
	}
	src, dst := netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	return parseTCP(src, dst, p[40:total])
}

func parseTCP(src, dst netip.Addr, p []byte) (segment, bool) {
	if len(p) < 20 {
		return segment{}, false
	}
	head := int(p[12]>>4) * 4
	if head < 20 || head > len(p) {
		return segment{}, false
	}
	return segment{
		src:     netip.AddrPortFrom(src, binary.BigEndian.Uint16(p[0:2])),
		dst:     netip.AddrPortFrom(dst, binary.BigEndian.Uint16(p[2:4])),
		payload: p[head:],
	}, true
}

// tlsRecord returns the content type of the TLS record that starts at p.
func tlsRecord(p []byte) (kind byte, ok bool) {
	if len(p) < 5 || p[0] < 20 || p[0] > 23 || p[1] != 3 || p[2] > 3 {
		return 0, false
	}
	return p[0], true
}
