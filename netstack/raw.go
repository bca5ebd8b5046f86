package netstack

import (
	"encoding/binary"
	"net/netip"
)

// The few packets that are made here and not by a gVisor endpoint: answers to
// SYNs that were never accepted, and replies to captured datagrams.

const rawTTL = 64

// appendIP appends an IP header for a payload of n bytes from src to dst.
func appendIP(b []byte, src, dst netip.Addr, proto uint8, n int) []byte {
	if src.Is4() {
		at := len(b)
		b = append(b, 0x45, 0, 0, 0, 0, 0, 0x40, 0, rawTTL, proto, 0, 0)
		b = append(b, src.AsSlice()...)
		b = append(b, dst.AsSlice()...)
		h := b[at:]
		binary.BigEndian.PutUint16(h[2:], uint16(ipv4HeaderMin+n))
		binary.BigEndian.PutUint16(h[10:], ^fold(sum(h, 0)))
		return b
	}
	b = append(b, 0x60, 0, 0, 0, 0, 0, proto, rawTTL)
	binary.BigEndian.PutUint16(b[len(b)-4:], uint16(n))
	b = append(b, src.AsSlice()...)
	return append(b, dst.AsSlice()...)
}

// appendRST appends the answer to a SYN that is refused.
// "If the ACK bit is off, sequence number zero is used,
// <SEQ=0><ACK=SEG.SEQ+SEG.LEN><CTL=RST,ACK>"
// https://www.rfc-editor.org/rfc/rfc9293#section-3.10.7.1
func appendRST(b []byte, from, to netip.AddrPort, ack uint32) []byte {
	b = appendIP(b, from.Addr(), to.Addr(), protoTCP, tcpHeaderMin)
	at := len(b)
	b = append(b, make([]byte, tcpHeaderMin)...)
	h := b[at:]
	binary.BigEndian.PutUint16(h[0:], from.Port())
	binary.BigEndian.PutUint16(h[2:], to.Port())
	binary.BigEndian.PutUint32(h[8:], ack)
	h[12] = tcpHeaderMin / 4 << 4
	h[13] = flagRST | flagACK
	binary.BigEndian.PutUint16(h[16:], ^fold(sum(h, pseudo(from.Addr(), to.Addr(), protoTCP, len(h)))))
	return b
}

// ICMP codes of destination unreachable.
const (
	icmp4Unreachable     = 3
	icmp4HostUnreachable = 1
	icmp4Prohibited      = 13
	icmp6Unreachable     = 1
	icmp6AddrUnreachable = 3
	icmp6Prohibited      = 1
)

// appendUnreachable appends an ICMP error from one address to another about
// the packet that orig begins.
func appendUnreachable(b []byte, from, to netip.Addr, prohibited bool, orig []byte) []byte {
	typ, code, proto := uint8(icmp4Unreachable), uint8(icmp4HostUnreachable), uint8(protoICMP)
	if prohibited {
		code = icmp4Prohibited
	}
	if from.Is6() {
		typ, code, proto = icmp6Unreachable, icmp6AddrUnreachable, protoICMPv6
		if prohibited {
			code = icmp6Prohibited
		}
	}
	n := 8 + len(orig)
	b = appendIP(b, from, to, proto, n)
	at := len(b)
	b = append(b, typ, code, 0, 0, 0, 0, 0, 0)
	b = append(b, orig...)
	var s uint32
	if from.Is6() {
		s = pseudo(from, to, protoICMPv6, n)
	}
	binary.BigEndian.PutUint16(b[at+2:], ^fold(sum(b[at:], s)))
	return b
}

// appendUDP appends a whole datagram.
func appendUDP(b []byte, from, to netip.AddrPort, payload []byte) []byte {
	n := udpHeader + len(payload)
	b = appendIP(b, from.Addr(), to.Addr(), protoUDP, n)
	at := len(b)
	b = append(b, make([]byte, udpHeader)...)
	b = append(b, payload...)
	h := b[at:]
	binary.BigEndian.PutUint16(h[0:], from.Port())
	binary.BigEndian.PutUint16(h[2:], to.Port())
	binary.BigEndian.PutUint16(h[4:], uint16(n))
	c := ^fold(sum(h, pseudo(from.Addr(), to.Addr(), protoUDP, n)))
	if c == 0 {
		c = 0xffff // 0 means none
	}
	binary.BigEndian.PutUint16(h[6:], c)
	return b
}

// transportChecksumOK verifies the TCP or UDP checksum of a packet.
func transportChecksumOK(p *packet, b []byte, proto uint8) bool {
	seg := b[p.l4:p.total]
	src, dst := netip.AddrFrom16(p.tuple.src), netip.AddrFrom16(p.tuple.dst)
	if !p.v6 {
		src, dst = src.Unmap(), dst.Unmap()
		if proto == protoUDP && seg[6] == 0 && seg[7] == 0 {
			return true
		}
	}
	return fold(sum(seg, pseudo(src, dst, proto, len(seg)))) == 0xffff
}

func pseudo(src, dst netip.Addr, proto uint8, n int) uint32 {
	return sum(src.AsSlice(), sum(dst.AsSlice(), uint32(proto)+uint32(n)))
}

func sum(b []byte, s uint32) uint32 {
	for len(b) >= 2 {
		s += uint32(b[0])<<8 | uint32(b[1])
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
