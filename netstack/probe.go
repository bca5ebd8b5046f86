package netstack

import "encoding/binary"

// tcpChecksum is where the checksum stands in a TCP header.
const tcpChecksum = 16

// probing asks whether r is a probe of the kubelet's. It reports false if it
// cannot be; else the answer decides, and r is held like any Request.
func (s *Stack) probing(r *Request) bool {
	is, answered := s.cfg.IsProbe, false
	return r.in && is != nil && is(r.Src(), r.Dst(), func(yes bool) {
		s.reader.Post(func() {
			if !answered {
				answered = true
				r.probed(yes)
			}
		})
	})
}

// probed takes the answer to probing.
func (r *Request) probed(yes bool) {
	switch {
	case r.over:
	case yes:
		r.forward()
	case r.stack.quiet:
		r.stack.holdBack(r)
	default:
		r.stack.handler.HandleTCP(r)
	}
}

// forward sends the SYN on at L3, and from now on the connection that it opens.
func (r *Request) forward() {
	defer r.drop()
	s := r.stack
	view := r.pkt.ToView()
	defer view.Release()
	b := view.AsSlice()
	p := parsePacket(b, len(b))
	if p.class != classTCP || p.tuple != r.key {
		s.counters.malformed.Add(1) // Fragments, or headers that no probe has.
		return
	}
	if s.bypass.learn(r.key.reverse()) == nil {
		s.counters.limitPending.Add(1)
		return
	}
	// It was right, or left for the device to fill in.
	src, dst, h := r.Src().Addr(), r.Dst().Addr(), b[p.l4:p.total]
	binary.BigEndian.PutUint16(h[tcpChecksum:], 0)
	binary.BigEndian.PutUint16(h[tcpChecksum:], ^fold(sum(h, pseudo(src, dst, protoTCP, len(h)))))
	s.inject(b[:p.total])
	s.counters.forwarded.Add(1)
}
