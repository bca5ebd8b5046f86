package netstack

import (
	"net/netip"

	"github.com/ztun/ztun/tun"
)

// noOffload is the header of a packet that is whole.
var noOffload = tun.Header{}

const dnsPort = 53

// A Datagram is one captured UDP packet of an app. It is valid only during
// HandleUDP; Reply, which copies what it needs, may be kept.
type Datagram struct {
	Src, Dst netip.AddrPort
	Payload  []byte
	stack    *Stack
	header   tun.Header
	size     int
}

// Reply returns a function that sends a datagram back, from the address the
// app asked. It runs on the loop; more than the device's MTU holds is sent as
// it is and cut by nobody, so the caller truncates.
func (d *Datagram) Reply() func(payload []byte) {
	s, from, to := d.stack, d.Dst, d.Src
	return func(payload []byte) {
		if s.closed || len(payload) > tun.MaxPacket-ipv6Header-udpHeader {
			return
		}
		s.inject(appendUDP(nil, from, to, payload))
	}
}

// Forward sends the datagram on at L3, as the app sent it.
func (d *Datagram) Forward() { d.stack.forward(d.header, d.size) }

// datagram handles a plain UDP packet: only captured DNS comes here.
func (s *Stack) datagram(p *packet, h tun.Header, n int) {
	switch {
	case p.tuple.dstPort != dnsPort:
		s.counters.notTCP.Add(1)
	case !s.isOurs(p):
		s.counters.foreign.Add(1)
	case !s.cfg.CaptureDNS || !s.isPod(p.tuple.src):
		s.forward(h, n)
	default:
		b := s.reader.scratch[:0]
		if p.total > cap(b) {
			s.counters.malformed.Add(1)
			return
		}
		s.reader.peekViews(p.total, func(part []byte) { b = append(b, part...) })
		if !h.ChecksumVouched() && !transportChecksumOK(p, b, protoUDP) {
			s.counters.badChecksum.Add(1)
			return
		}
		s.handler.HandleUDP(&Datagram{
			Src: p.tuple.source(), Dst: p.tuple.destination(), Payload: b[p.payload:],
			stack: s, header: h, size: n,
		})
	}
}
