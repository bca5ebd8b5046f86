package netstack

import (
	"encoding/binary"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tun"
)

// gVisor acknowledges every batch at once. The answer to a small request is
// ready a moment later and says the same, so the ACK of a small segment waits
// for data of its flow to carry it: two packets in and two out per request,
// from 2.5 and 3.4, and the peer is woken once, not twice. What keeps this from
// harming bulk, or an app that sends in small pieces and waits for each ACK
// (Nagle):
//   - only the ACK of new, in-order data of at most one segment waits, and only
//     one for a flow: the next goes out at once and stands for both (RFC 9293
//     section 3.8.6.3 asks for every second segment);
//   - an ACK that repeats itself, opens the window or carries SACK blocks never
//     waits;
//   - the flow's next ACKs do not wait after one that repeated itself, or that
//     waited in vain.
const (
	// ackDelay is how long an ACK waits, rounded up to a millisecond.
	ackDelay = time.Millisecond
	// quickAcks is how many ACKs do not wait then.
	quickAcks = 8
	// maxHeld bounds the ACKs of one reader that wait.
	maxHeld = 1024
	// maxPureACK is the length of the longest ACK that may wait: IPv6, and TCP
	// with timestamps.
	maxPureACK = ipv6Header + tcpHeaderMin + timestampOption
	// timestampOption is the length of the only option that such an ACK may
	// have, padded; with SACK blocks it would be longer.
	timestampOption = 12
)

// A heldACK waits in a reader's list. It is void once its flow holds another,
// or none.
type heldACK struct {
	flow   *Flow
	serial uint32
	due    time.Time
	header tun.Header
	n      int
	b      [maxPureACK]byte
}

// heldACKs are in the order in which they are due.
type heldACKs struct {
	delay  time.Duration // ackDelay
	list   []heldACK
	serial uint32
}

// ackState is what a flow remembers of its ACKs.
type ackState struct {
	held   uint32 // serial in the reader's list; 0: none
	number uint32 // what it acknowledges
	quick  uint8  // ACKs that must not wait
}

// holds reports that pkt is an ACK of f that waits instead of leaving now. It
// runs while the reader handles f's segments, with the endpoint locked.
func (f *Flow) holds(pkt *stack.PacketBuffer, h header.TCP) bool {
	r := f.stack.reader
	fresh := h.AckNumber() - f.acked.Load()
	switch {
	case pkt.Data().Size() > 0 || h.Flags() != header.TCPFlagAck || pkt.Size() > maxPureACK,
		fresh > f.stack.dev.MTU(),
		f.ep.EndpointState() != tcp.StateEstablished:
		return false
	case fresh == 0, f.ack.held != 0 && h.AckNumber() == f.ack.number:
		// Something is missing, or came twice: "an ACK [...] SHOULD be sent
		// immediately when the incoming segment fills in all or part of a gap"
		// (RFC 5681 section 4.2).
		f.ack.quick = quickAcks
		return false
	case f.ack.quick > 0:
		f.ack.quick--
		return false
	case f.ack.held != 0 || len(r.held.list) >= maxHeld:
		return false
	}
	r.held.add(f, h.AckNumber(), pkt, r.now.Add(r.held.delay))
	return true
}

func (l *heldACKs) add(f *Flow, number uint32, pkt *stack.PacketBuffer, due time.Time) {
	if l.serial++; l.serial == 0 {
		l.serial = 1
	}
	f.ack.held, f.ack.number = l.serial, number
	l.list = append(l.list, heldACK{flow: f, serial: l.serial, due: due, header: virtioHeader(pkt)})
	a := &l.list[len(l.list)-1]
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		n := min(skip, len(b))
		skip -= n
		a.n += copy(a.b[a.n:], b[n:])
	}
}

// carried forgets the ACK that f holds if what left since says as much.
func (f *Flow) carried() {
	if f.ack.held != 0 && int32(f.acked.Load()-f.ack.number) >= 0 {
		f.ack.held = 0
	}
}

// next returns how long the first ACK that waits may still wait, and false if
// there is none.
func (l *heldACKs) next(now time.Time) (time.Duration, bool) {
	void := 0
	for void < len(l.list) && l.list[void].isVoid() {
		void++
	}
	l.forget(void)
	if len(l.list) == 0 {
		return 0, false
	}
	return max(0, l.list[0].due.Sub(now)), true
}

func (a *heldACK) isVoid() bool { return a.flow.ack.held != a.serial || a.flow.stack.closed }

// forget takes the first n out of the list.
func (l *heldACKs) forget(n int) {
	if n == 0 {
		return
	}
	rest := copy(l.list, l.list[n:])
	clear(l.list[rest:])
	l.list = l.list[:rest]
}

// sendDue sends what has waited long enough.
func (l *heldACKs) sendDue(now time.Time) {
	sent := 0
	for ; sent < len(l.list) && !l.list[sent].due.After(now); sent++ {
		a := &l.list[sent]
		if a.isVoid() {
			continue
		}
		f := a.flow
		f.ack.held, f.ack.quick = 0, quickAcks
		f.acked.Store(f.ack.number)
		f.stack.send(a.header, a.b[:a.n])
	}
	l.forget(sent)
}

// waits takes note of what a packet of a flow that the reader works on
// acknowledges, and reports that the packet is an ACK that waits.
func (l *link) waits(pkt *stack.PacketBuffer) bool {
	f, locked := l.handling.Load(), true
	if f == nil {
		if f, locked = l.writing.Load(), false; f == nil {
			return false
		}
	}
	h := header.TCP(pkt.TransportHeader().Slice())
	// gVisor's timers send for other flows meanwhile.
	if len(h) < tcpHeaderMin || !f.sends(pkt.NetworkHeader().Slice(), h) {
		return false
	}
	if locked && f.holds(pkt, h) {
		return true
	}
	f.acked.Store(h.AckNumber())
	return false
}

// sends says that a packet with these headers is one of f.
func (f *Flow) sends(ip []byte, h header.TCP) bool {
	if binary.BigEndian.Uint16(h) != f.key.dstPort || binary.BigEndian.Uint16(h[2:]) != f.key.srcPort {
		return false
	}
	if len(ip) >= ipv6Header {
		return [16]byte(ip[8:24]) == f.key.dst && [16]byte(ip[24:40]) == f.key.src
	}
	return len(ip) >= ipv4HeaderMin && [4]byte(ip[12:16]) == [4]byte(f.key.dst[12:]) && [4]byte(ip[16:20]) == [4]byte(f.key.src[12:])
}
