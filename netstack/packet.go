package netstack

import (
	"encoding/binary"
	"net/netip"
)

// IP protocol numbers and TCP flags of interest.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58

	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagACK = 0x10
)

const (
	ipv4HeaderMin = 20
	ipv6Header    = 40
	tcpHeaderMin  = 20
	udpHeader     = 8
	// headRoom is how much of a packet is looked at: IPv6, a few extension
	// headers and TCP with all its options.
	headRoom = 256
)

// tuple identifies a flow as a packet from the device shows it: src is who
// sent it. Addresses are in their 16-byte form, so one map serves both families.
type tuple struct {
	src, dst         [16]byte
	srcPort, dstPort uint16
}

func (t tuple) source() netip.AddrPort      { return addrPort(t.src, t.srcPort) }
func (t tuple) destination() netip.AddrPort { return addrPort(t.dst, t.dstPort) }
func (t tuple) reverse() tuple              { return tuple{t.dst, t.src, t.dstPort, t.srcPort} }

func addrPort(a [16]byte, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a).Unmap(), port)
}

func tupleOf(src, dst netip.AddrPort) tuple {
	return tuple{src.Addr().As16(), dst.Addr().As16(), src.Port(), dst.Port()}
}

// class says what the reader does with a packet.
type class uint8

const (
	classDrop  class = iota // neither TCP nor UDP, or malformed
	classTCP                // a plain TCP segment
	classUDP                // a plain UDP datagram
	classOddly              // TCP behind extension headers, IP options or fragmentation
)

// packet is what the reader needs to know of an IP packet.
type packet struct {
	class   class
	v6      bool
	flags   uint8 // of TCP
	tuple   tuple
	payload int // offset of what follows the transport header; classTCP and classUDP only
	l4      int // offset of the transport header
	total   int // length by the IP header
}

// v4prefix makes a 16-byte address of a 4-byte one.
var v4prefix = [16]byte{10: 0xff, 11: 0xff}

// parsePacket reads the headers at the start of a packet of n bytes, of which
// b holds at least the first min(n, headRoom).
func parsePacket(b []byte, n int) (p packet) {
	if len(b) < 1 {
		return p
	}
	switch b[0] >> 4 {
	case 4:
		return parseIPv4(b, n)
	case 6:
		return parseIPv6(b, n)
	}
	return p
}

func parseIPv4(b []byte, n int) (p packet) {
	if len(b) < ipv4HeaderMin {
		return p
	}
	ihl := int(b[0]&0xf) * 4
	p.total = int(binary.BigEndian.Uint16(b[2:]))
	if ihl < ipv4HeaderMin || len(b) < ihl || p.total < ihl || p.total > n {
		return p
	}
	p.tuple.src, p.tuple.dst = v4prefix, v4prefix
	copy(p.tuple.src[12:], b[12:16])
	copy(p.tuple.dst[12:], b[16:20])
	p.l4 = ihl
	fragment := binary.BigEndian.Uint16(b[6:])&0x3fff != 0
	return p.transport(b, b[9], fragment || ihl > ipv4HeaderMin, fragment)
}

func parseIPv6(b []byte, n int) (p packet) {
	if len(b) < ipv6Header {
		return p
	}
	p.v6 = true
	p.total = ipv6Header + int(binary.BigEndian.Uint16(b[4:]))
	if p.total > n {
		return p
	}
	copy(p.tuple.src[:], b[8:24])
	copy(p.tuple.dst[:], b[24:40])
	next, off, oddly, fragment := b[6], ipv6Header, false, false
	for {
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if len(b) < off+8 {
				return packet{}
			}
			next, off, oddly = b[off], off+int(b[off+1])*8+8, true
			continue
		case 44: // fragment
			if len(b) < off+8 {
				return packet{}
			}
			next, off, oddly, fragment = b[off], off+8, true, true
			continue
		}
		break
	}
	if off > p.total {
		return packet{}
	}
	p.l4 = off
	return p.transport(b, next, oddly, fragment)
}

// transport finishes p from its transport header. A fragment need not have one.
func (p packet) transport(b []byte, proto uint8, oddly, fragment bool) packet {
	off := p.l4
	switch {
	case proto == protoTCP && fragment:
		p.class = classOddly
	case proto == protoTCP && p.total >= off+tcpHeaderMin && len(b) >= off+tcpHeaderMin:
		head := int(b[off+12]>>4) * 4
		if head < tcpHeaderMin || off+head > p.total || len(b) < off+head {
			return packet{}
		}
		p.class = classTCP
		if oddly {
			p.class = classOddly
		}
		p.flags = b[off+13]
		p.payload = off + head
		p.tuple.srcPort = binary.BigEndian.Uint16(b[off:])
		p.tuple.dstPort = binary.BigEndian.Uint16(b[off+2:])
	case proto == protoUDP && !oddly && p.total >= off+udpHeader && len(b) >= off+udpHeader:
		if int(binary.BigEndian.Uint16(b[off+4:])) != p.total-off {
			return packet{}
		}
		p.class = classUDP
		p.payload = off + udpHeader
		p.tuple.srcPort = binary.BigEndian.Uint16(b[off:])
		p.tuple.dstPort = binary.BigEndian.Uint16(b[off+2:])
	}
	return p
}

// isSYN says that the segment asks for a new connection.
func (p packet) isSYN() bool { return p.flags&(flagSYN|flagACK|flagRST) == flagSYN }
