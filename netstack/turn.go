package netstack

import (
	"errors"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/ztun/ztun/tun"
)

// A device's turn ends after so much, so that a busy pod does not keep the
// others of its reader waiting.
const (
	turnPackets = 32
	turnBytes   = 256 << 10
)

// turn reads a batch from the device and handles it.
func (s *Stack) turn() {
	bytes, n := 0, 0
	for ; n < turnPackets && bytes < turnBytes; n++ {
		size, err := s.receive()
		if err != nil {
			s.failed(err)
			break
		}
		if size == 0 {
			break
		}
		bytes += size
	}
	s.finishBatch()
	if bytes > 0 {
		s.reader.lastPacket = s.reader.now
	}
	if n == turnPackets || bytes >= turnBytes {
		s.reader.more = true
	}
}

// failed takes the error that ended the device.
func (s *Stack) failed(err error) {
	if s.closed {
		return
	}
	if s.source != s.dev {
		s.resume()
		return
	}
	s.reader.engine.log.Error("device cannot be read", "pod", s.cfg.Name, "error", err)
	s.reader.unwatch(s)
	if gone := s.cfg.Gone; gone != nil {
		s.reader.Post(func() { gone(err) })
	}
}

// receive handles one packet and returns its size in bytes, or 0 when none waits.
func (s *Stack) receive() (int, error) {
	r := s.reader
	r.fillViews()
	n, h, err := s.source.Read(&r.vector)
	if err == tun.ErrEmpty {
		return 0, nil
	}
	if err != nil {
		var bad *tun.HeaderError
		if errors.As(err, &bad) {
			s.counters.badHeader.Add(1)
			return max(n, 1), nil
		}
		return 0, err
	}
	s.counters.packetsIn.Add(1)
	s.counters.bytesIn.Add(uint64(n))
	first := r.views[0].AsSlice()
	p := parsePacket(first[:min(n, len(first))], n)
	switch p.class {
	case classTCP:
		s.segment(&p, h, n)
	case classUDP:
		s.datagram(&p, h, n)
	case classOddly:
		// gVisor may answer with an endpoint's lock taken: nothing but plain
		// TCP may meet a lock that the batch holds.
		s.finishBatch()
		if s.isOurs(&p) {
			s.deliver(&p, h, n)
		} else {
			s.counters.foreign.Add(1)
		}
	default:
		if s.source != s.dev && s.passedError(n) {
			break
		}
		if n > 0 && (first[0]>>4 == 4 || first[0]>>4 == 6) && p.total > 0 {
			s.counters.notTCP.Add(1)
		} else {
			s.counters.malformed.Add(1)
		}
	}
	return n, nil
}

// segment handles a plain TCP segment.
func (s *Stack) segment(p *packet, h tun.Header, n int) {
	f := s.flows[p.tuple]
	switch {
	case f != nil:
		if f.pastEnd(p) {
			break
		}
		if !f.locked {
			f.lock()
		}
	case !s.isOurs(p):
		s.counters.foreign.Add(1)
		return
	case s.bypass.takes(s, p):
		s.forward(h, n)
		return
	case p.isSYN():
		if s.source != s.dev {
			return
		}
		if s.noTunnels && p.tuple.dstPort == TunnelPort {
			s.holdTunnel(h, n)
			return
		}
	case s.before != nil && s.isStray(p) && s.handOn(h, n):
		return
	}
	s.deliver(p, h, n)
}

// isOurs says that one of the packet's ends is the pod's, or may be somebody's
// inside the pod.
func (s *Stack) isOurs(p *packet) bool {
	return s.cfg.VirtualInterfaces || s.isPod(p.tuple.src) || s.isPod(p.tuple.dst)
}

// deliver gives the packet in the reader's views to gVisor.
func (s *Stack) deliver(p *packet, h tun.Header, n int) {
	proto := header.IPv4ProtocolNumber
	if p.v6 {
		proto = header.IPv6ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: s.reader.takeViews(n)})
	s.link.vouched.Store(h.ChecksumVouched())
	s.link.dispatcher.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

// finishBatch handles what the batch queued on locked endpoints.
func (s *Stack) finishBatch() {
	r := s.reader
	for i, f := range r.locked {
		r.locked[i] = nil
		f.locked = false
		f.finish()
	}
	r.locked = r.locked[:0]
}

// drain drops what lies in the device from before this reader.
func (s *Stack) drain() {
	s.reader.fillViews()
	// Bounded: the pod may send faster than this.
	for range 16 << 10 {
		if _, _, err := s.dev.Read(&s.reader.vector); errors.Is(err, tun.ErrEmpty) {
			return
		}
		s.counters.drained.Add(1)
	}
}

// fillViews makes sure that there is a buffer at each step of the ladder.
func (r *reader) fillViews() {
	for i, v := range r.views {
		if v == nil {
			v = buffer.NewViewSize(ladder[i])
			r.views[i] = v
			r.vector.Set(i, v.AsSlice())
		}
	}
}

// takeViews returns the first n bytes of the buffers, which become the packet's.
func (r *reader) takeViews(n int) (b buffer.Buffer) {
	for i := 0; n > 0 && i < len(r.views); i++ {
		v := r.views[i]
		r.views[i] = nil
		if n < v.Size() {
			v.CapLength(n)
		}
		n -= v.Size()
		b.Append(v)
	}
	return b
}

// peekViews calls f with the parts of the first n bytes of the buffers.
func (r *reader) peekViews(n int, f func(part []byte)) {
	for i := 0; n > 0 && i < len(r.views); i++ {
		b := r.views[i].AsSlice()
		b = b[:min(n, len(b))]
		n -= len(b)
		f(b)
	}
}

// forward sends the packet in the reader's buffers on at L3: written back, it
// is routed by the pod's kernel to the app or to the network.
func (s *Stack) forward(h tun.Header, n int) {
	t := transmits.Get().(*transmit)
	defer transmits.Put(t)
	t.Reset(h)
	s.reader.peekViews(n, func(b []byte) { t.Append(b) })
	if err := s.dev.WriteVector(&t.Writer); err != nil {
		s.counters.writeFailed.Add(1)
		return
	}
	s.counters.forwarded.Add(1)
}
