package standin

import (
	"encoding/binary"
	"net/netip"
)

// What is used of IP and TCP headers.
const (
	protoTCP   = 6
	ipv4Header = 20
	ipv6Header = 40
	tcpHeader  = 20

	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagACK = 0x10
)

// packet is a TCP segment.
type packet struct {
	src, dst netip.AddrPort
	flags    byte
}

// parsePacket reads a plain TCP segment: no fragment, no options of IPv4, no
// further headers of IPv6. Probes have none, and whatever else might hide what a
// packet is stays out.
func parsePacket(b []byte) (p packet, ok bool) {
	if len(b) == 0 {
		return p, false
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b)
	case 6:
		return parseIPv6(b)
	}
	return p, false
}

func parseIPv4(b []byte) (p packet, ok bool) {
	if len(b) < ipv4Header || b[0] != 0x45 || b[9] != protoTCP {
		return p, false
	}
	const moreFragments, offset = 0x2000, 0x1fff
	if binary.BigEndian.Uint16(b[6:])&(moreFragments|offset) != 0 || int(binary.BigEndian.Uint16(b[2:])) != len(b) {
		return p, false
	}
	return parseTCP(netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[ipv4Header:])
}

func parseIPv6(b []byte) (p packet, ok bool) {
	if len(b) < ipv6Header || b[6] != protoTCP || ipv6Header+int(binary.BigEndian.Uint16(b[4:])) != len(b) {
		return p, false
	}
	src, dst := netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
	if src.Is4In6() || dst.Is4In6() {
		return p, false // Never on a wire.
	}
	return parseTCP(src, dst, b[ipv6Header:])
}

func parseTCP(src, dst netip.Addr, b []byte) (p packet, ok bool) {
	if len(b) < tcpHeader {
		return p, false
	}
	if n := int(b[12]>>4) * 4; n < tcpHeader || n > len(b) {
		return p, false
	}
	return packet{
		src:   netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)),
		dst:   netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
		flags: b[13],
	}, true
}

// isSYN says that the segment asks for a new connection.
func (p *packet) isSYN() bool { return p.flags&(flagSYN|flagACK|flagRST) == flagSYN }
