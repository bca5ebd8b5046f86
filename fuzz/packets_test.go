package fuzz

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tun"
)

// The ports of the well-behaved connection, which no hostile packet has.
const (
	callPort   = 54321
	hiddenPort = 54322
)

// FuzzPackets writes hostile packets to the pod's device, as its kernel and the
// network could. What leaves must be what policy allows in plain text, and
// afterwards a connection of the app, and one to it, must have every byte.
func FuzzPackets(f *testing.F) {
	s := newSite(f)
	for i := range 6 {
		f.Add(noise(uint64(i), 60*(i+1)))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		n := newNode(t, s)
		n.tap.watch(mayLeave)
		script := newScript(in)
		back := script.one(2)
		for script.more() {
			h, b := script.packet()
			for range 1 + script.pick(4)*script.pick(4) {
				n.tap.inject(h, b)
			}
		}
		data := noise(7, 20000)
		n.outbound(netip.AddrPortFrom(appAddr, callPort), netip.AddrPortFrom(peerAddr, appPort), data)
		if back {
			c := n.inbound("friend", friendAddr)
			n.do(func() { c.say(data, true) })
			n.wait("the echo of the app", c.done)
		}
		if err := n.tap.err(); err != nil {
			t.Error(err)
		}
		for _, c := range n.seen() {
			if c.src.Addr() != friendAddr || c.dst.Port() != appPort {
				t.Errorf("%v reached the app at %v", c.src, c.dst)
			}
		}
		bounded(t)
	})
}

// mayLeave is the list of what may leave the proxy's device, less what the
// packet layer forwards and which is not TCP.
func mayLeave(b []byte) error {
	p, ok := readPacket(b)
	if !ok {
		return fmt.Errorf("no IP packet left: %x", b[:min(len(b), 60)])
	}
	ours := func(a netip.Addr) bool { return a == appAddr || a == appAddr6 }
	from := ours(p.src.Addr())
	var why string
	switch {
	case !from && !ours(p.dst.Addr()):
		why = "neither address is the pod's"
	case !p.tcp:
	case p.fragment:
		why = "a fragment of TCP"
	case p.src.Port() == netstack.TunnelPort && from, p.dst.Port() == netstack.TunnelPort && from:
		// TLS, of either role.
	case p.flags&rst != 0 && p.payload == 0:
		// A refusal says nothing.
	case from && p.flags&syn != 0 && p.flags&ack != 0:
		why = "a plaintext connection from the network is accepted"
	case from && meshed(p.dst.Addr()) && (p.payload > 0 || p.flags&syn != 0):
		why = "plain text to the mesh"
	}
	if why == "" {
		return nil
	}
	return errors.New(why + ": " + p.String())
}

// meshed are the addresses that nothing may be sent to in plain text.
func meshed(a netip.Addr) bool {
	return a == peerAddr || a == peerAddr6 || a == friendAddr || a == webVIP || a == emptyVIP
}

// packet draws a packet and its virtio header: a TCP segment between addresses
// that mean something, in any state, or something odd.
func (s *script) packet() (h tun.Header, b []byte) {
	six := s.one(4)
	src, dst := s.endpoint(six), s.endpoint(six)
	if s.one(2) { // of the app
		src = netip.AddrPortFrom(appAddr, uint16(40000+s.pick(4)))
		if six {
			src = netip.AddrPortFrom(appAddr6, src.Port())
		}
	}
	l4 := s.segment(src, dst)
	protocol := byte(6)
	switch s.pick(12) {
	case 11:
		protocol = choose[byte](s, 17, 1, 58, 0, 43, 44, 60, 255)
	case 10:
		l4 = s.bytes(s.pick(60))
	}
	if six {
		b = s.ipv6(src.Addr(), dst.Addr(), protocol, l4)
	} else {
		b = s.ipv4(src.Addr(), dst.Addr(), protocol, l4)
	}
	switch s.pick(16) {
	case 15:
		b = b[:min(len(b), s.pick(80))]
	case 14:
		for range s.pick(4) {
			if i := s.pick(256); i < len(b) {
				b[i] = s.byte()
			}
		}
	case 13:
		b = s.bytes(s.pick(100))
	case 12:
		b = append(b, s.bytes(s.pick(40))...)
	}
	if s.one(4) {
		h = tun.Header{Flags: choose[uint8](s, 0, tun.NeedsChecksum, tun.DataValid, 7), GSOType: choose[uint8](s, 0, tun.GSOTCPv4, tun.GSOTCPv6, tun.GSOUDP, tun.GSOUDPL4, 0x81), HdrLen: uint16(s.pick(256)), GSOSize: uint16(s.pick(256)), CsumStart: uint16(s.pick(64)), CsumOffset: uint16(s.pick(32))}
	}
	if p, ok := readPacket(b); ok && (p.src.Port() == callPort || p.dst.Port() == callPort) {
		return h, nil
	}
	return h, b
}

func (s *script) endpoint(six bool) netip.AddrPort {
	port := choose[uint16](s, 80, appPort, netstack.TunnelPort, 40000, 40001, 443, 15001, 0)
	if six {
		return netip.AddrPortFrom(choose(s, appAddr6, peerAddr6, netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("ff02::1"), netip.MustParseAddr("::1"), netip.MustParseAddr("::ffff:10.0.0.1")), port)
	}
	return netip.AddrPortFrom(choose(s, appAddr, peerAddr, friendAddr, webVIP, emptyVIP, plainAddr, outside, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("255.255.255.255"), netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("224.0.0.1")), port)
}

// segment draws a TCP segment with a good checksum, mostly.
func (s *script) segment(src, dst netip.AddrPort) []byte {
	b := make([]byte, 20, 100)
	binary.BigEndian.PutUint16(b[0:], src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint32(b[4:], choose(s, 1000, 1001, 1005, uint32(s.byte())<<24, s.uint32()))
	binary.BigEndian.PutUint32(b[8:], choose(s, 0, 1, uint32(s.byte())<<24))
	b[12], b[13] = 5<<4, choose[byte](s, syn, syn, ack, psh|ack, fin|ack, rst, rst|ack, syn|ack, syn|fin, 0, 0xff)
	binary.BigEndian.PutUint16(b[14:], choose[uint16](s, 65535, 0, 1))
	if s.one(4) {
		options := s.bytes(s.pick(10) * 4)
		options = append(options, make([]byte, -len(options)&3)...)
		b = append(b, options...)
		b[12] = byte(len(b)/4) << 4
	}
	if s.one(16) {
		b[12] = s.byte()
	}
	b = append(b, s.bytes(s.pick(32))...)
	if !s.one(8) {
		binary.BigEndian.PutUint16(b[16:], ^fold(sum(sum(pseudo(src.Addr(), dst.Addr(), len(b)), nil), b)))
	}
	return b
}

func pseudo(src, dst netip.Addr, n int) uint32 {
	return sum(sum(uint32(6+n), src.AsSlice()), dst.AsSlice())
}

// sum is the sum of the Internet checksum, RFC 1071.
func sum(s uint32, b []byte) uint32 {
	for i := range b {
		s += uint32(b[i]) << (8 * uint(1-i&1))
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func (s *script) ipv4(src, dst netip.Addr, protocol byte, l4 []byte) []byte {
	a, z := src.Unmap().As4(), dst.Unmap().As4()
	b := make([]byte, 20, 20+len(l4))
	b[0], b[8], b[9] = 0x45, 64, protocol
	copy(b[12:], a[:])
	copy(b[16:], z[:])
	if s.one(8) { // a fragment
		binary.BigEndian.PutUint16(b[4:], uint16(s.pick(2)))
		binary.BigEndian.PutUint16(b[6:], choose[uint16](s, 0x2000, 0x2001, 1, 3, 0x1fff, 0x4000, 0x8000))
	}
	if s.one(16) {
		options := make([]byte, 4*(1+s.pick(10)))
		copy(options, s.bytes(len(options)))
		b = append(b, options...)
		b[0] = 0x40 | byte(len(b)/4)
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(l4)))
	binary.BigEndian.PutUint16(b[10:], ^fold(sum(0, b)))
	return append(b, l4...)
}

func (s *script) ipv6(src, dst netip.Addr, protocol byte, l4 []byte) []byte {
	a, z := src.As16(), dst.As16()
	var extension []byte
	next := protocol
	if s.one(6) {
		next = choose[byte](s, 0, 43, 44, 60)
		extension = append([]byte{protocol, 0}, make([]byte, 6)...)
		copy(extension[2:], s.bytes(6))
	}
	b := make([]byte, 40, 48+len(l4))
	b[0], b[6], b[7] = 0x60, next, 64
	binary.BigEndian.PutUint16(b[4:], uint16(len(extension)+len(l4)))
	copy(b[8:], a[:])
	copy(b[24:], z[:])
	return append(append(b, extension...), l4...)
}
