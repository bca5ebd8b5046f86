package netstack

import (
	"encoding/binary"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// gVisor acknowledges every batch at once, before anybody has read it. An ACK
// costs what a full segment costs, since it takes the same way through the
// kernel: a fifth of the CPU of bulk. So ACKs of in-order data wait:
//
//   - that of more than a segment until the reader has nothing else to do, but
//     no longer than maxUnacked bytes or ackDelay. Then it also tells the
//     window that is open once the data was read, and no other has to;
//   - so does the news that a window is open again. gVisor tells it at the first
//     segment's worth that was read, and the peer sends that little;
//   - that of one small segment until data carries it: two packets in and two
//     out per request, from 2.5 and 3.4, and the peer is woken once, not twice. A
//     request's is carried by its answer, within ackDelay or not at all. An
//     answer's is carried by the next request, so it waits for turnDelay, as in
//     Linux, while the two take turns that fast.
//
// What keeps the last from harming an app that sends in small pieces and
// waits for each ACK (Nagle): only one such ACK waits, the next segment's stands
// for both (RFC 9293 section 3.8.6.3 asks for every second segment), after a
// wait in vain the flow's next ACKs do not wait for an answer, and where the end
// of a long wait brought more data at once none waits long again. An ACK that
// repeats itself or carries SACK blocks never waits.
const (
	// ackDelay is how long an ACK waits, rounded up to a millisecond.
	ackDelay = time.Millisecond
	// turnDelay is how long the ACK of a small segment waits on a flow whose two
	// sides have taken turns: TCP_DELACK_MIN of Linux in its pingpong mode.
	turnDelay = 40 * time.Millisecond
	// quickAcks is how many ACKs do not wait for an answer after one that
	// waited in vain.
	quickAcks = 8
	// maxUnacked bounds what has come in and waits for its ACK, in bytes.
	maxUnacked = 128 << 10
	// maxPureACK is the length of the longest ACK that may wait: IPv6, and TCP
	// with timestamps. With SACK blocks it would be longer.
	maxPureACK = ipv6Header + tcpHeaderMin + 12
)

// waitingACKs are those of one reader's flows.
type waitingACKs struct {
	delay time.Duration // ackDelay
	limit uint32        // maxUnacked

	soon      []*Flow // go before the reader waits
	soonSince time.Time
	answer    answerACKs // wait for an answer
	turn      answerACKs // wait for the next request
	serial    uint32
}

// answerACKs are in the order in which they are due.
type answerACKs []answerACK

// An answerACK is void once its flow waits with another, or none.
type answerACK struct {
	flow   *Flow
	serial uint32
	due    time.Time
}

// ackState is what a flow remembers of its ACKs.
type ackState struct {
	number uint32      // that waits, if one does
	answer uint32      // serial among those that wait for an answer; 0: none
	soon   bool        // among those that go soon
	quick  uint8       // ACKs that must not wait for an answer
	turns  bool        // both sides take turns: see turnDelay
	pieces bool        // the other side sends in pieces, each when the last is acknowledged
	heard  time.Time   // when data came in last
	vain   time.Time   // when an ACK had waited for turnDelay in vain
	window atomic.Bool // the news that waits is of the window, which every packet tells
}

func (a *ackState) waits() bool { return a.soon || a.answer != 0 }

// holds reports that pkt is an ACK of f that waits instead of leaving now. It
// runs while the reader handles f's segments, with the endpoint locked.
func (f *Flow) holds(pkt *stack.PacketBuffer, h header.TCP) bool {
	w := &f.stack.reader.acks
	ack := h.AckNumber()
	fresh := ack - f.acked.Load()
	if pkt.Data().Size() > 0 || h.Flags() != header.TCPFlagAck || pkt.Size() > maxPureACK ||
		fresh > w.limit || f.ep.EndpointState() != tcp.StateEstablished {
		return false
	}
	f.hears()
	switch {
	case fresh == 0, f.ack.waits() && ack == f.ack.number:
		// Something is missing, or came twice: "an ACK [...] SHOULD be sent
		// immediately when the incoming segment fills in all or part of a gap"
		// (RFC 5681 section 4.2).
		f.ack.quick = quickAcks
		return false
	case f.ack.waits() || fresh > f.stack.dev.MTU():
		w.addSoon(f)
	case f.ack.quick > 0:
		f.ack.quick--
		return false
	default:
		w.addAnswer(f)
	}
	f.ack.number = ack
	return true
}

// holdsUpdate reports that pkt, which f's Read made gVisor send, only tells of a
// window, and waits.
func (f *Flow) holdsUpdate(pkt *stack.PacketBuffer, h header.TCP) bool {
	w := &f.stack.reader.acks
	if pkt.Data().Size() > 0 || h.Flags() != header.TCPFlagAck || pkt.Size() > maxPureACK ||
		h.AckNumber()-f.acked.Load() > w.limit || f.ep.EndpointState() != tcp.StateEstablished {
		return false
	}
	w.addSoon(f)
	f.ack.number = h.AckNumber()
	f.ack.window.Store(true)
	return true
}

func (w *waitingACKs) addSoon(f *Flow) {
	f.ack.answer = 0
	if f.ack.soon {
		return
	}
	f.ack.soon = true
	if len(w.soon) == 0 {
		w.soonSince = f.stack.reader.now
	}
	w.soon = append(w.soon, f)
}

func (w *waitingACKs) addAnswer(f *Flow) {
	if w.serial++; w.serial == 0 {
		w.serial = 1
	}
	f.ack.answer = w.serial
	list, delay := &w.answer, w.delay
	if f.ack.turns {
		list, delay = &w.turn, max(w.delay, turnDelay)
	}
	*list = append(*list, answerACK{flow: f, serial: w.serial, due: f.stack.reader.now.Add(delay)})
}

// hears takes note that data came in. Where it came because the last was
// acknowledged, after a long wait, none waits for a turn again.
func (f *Flow) hears() {
	now := f.stack.reader.now
	f.ack.heard = now
	if !f.ack.vain.IsZero() && now.Sub(f.ack.vain) < turnDelay/4 {
		f.ack.pieces, f.ack.turns = true, false
	}
}

// speaks takes note that f sends data: soon after the other side did, they
// take turns, and its ACKs are worth to be carried. What comes next is an answer,
// not the piece that an ACK released.
func (f *Flow) speaks() {
	f.ack.vain = time.Time{}
	turns := f.stack.reader.now.Sub(f.ack.heard) < turnDelay && !f.ack.pieces
	if turns != f.ack.turns {
		f.ack.turns = turns
		if turns {
			f.ack.quick = 0
		}
	}
}

// carried forgets the ACK of f that waits if what left since says as much.
func (f *Flow) carried() {
	if f.ack.waits() && int32(f.acked.Load()-f.ack.number) >= 0 && !f.ack.window.Load() {
		f.ack.answer = 0
		f.ack.soon = false // It stays in the list.
	}
}

// next returns how long the first ACK that waits for an answer may still
// wait, and false if there is none.
func (w *waitingACKs) next(now time.Time) (d time.Duration, ok bool) {
	for _, list := range [...]*answerACKs{&w.answer, &w.turn} {
		list.forgetVoid()
		if len(*list) == 0 {
			continue
		}
		if left := max(0, (*list)[0].due.Sub(now)); !ok || left < d {
			d, ok = left, true
		}
	}
	return d, ok
}

func (a *answerACK) isVoid() bool { return a.flow.ack.answer != a.serial }

// forgetVoid takes those at the head that wait no more out of the list.
func (l *answerACKs) forgetVoid() {
	void := 0
	for void < len(*l) && (*l)[void].isVoid() {
		void++
	}
	l.forget(void)
}

// forget takes the first n out of the list.
func (l *answerACKs) forget(n int) {
	if n == 0 {
		return
	}
	rest := copy(*l, (*l)[n:])
	clear((*l)[rest:])
	*l = (*l)[:rest]
}

// sendDue sends what has waited long enough.
func (w *waitingACKs) sendDue(now time.Time) {
	if len(w.soon) > 0 && now.Sub(w.soonSince) >= w.delay {
		w.sendSoon()
	}
	for _, list := range [...]*answerACKs{&w.answer, &w.turn} {
		sent := 0
		for ; sent < len(*list) && !(*list)[sent].due.After(now); sent++ {
			if a := &(*list)[sent]; !a.isVoid() {
				a.flow.ack.answer, a.flow.ack.quick = 0, quickAcks
				if a.flow.ack.turns {
					a.flow.ack.turns, a.flow.ack.vain = false, now
				}
				a.flow.sendACK()
			}
		}
		list.forget(sent)
	}
}

// sendSoon sends what goes before the reader waits.
func (w *waitingACKs) sendSoon() {
	for i, f := range w.soon {
		w.soon[i] = nil
		if f.ack.soon {
			f.ack.soon = false
			f.sendACK()
		}
	}
	w.soon = w.soon[:0]
}

// sendACK acknowledges all that has come in, with the window as it is now.
func (f *Flow) sendACK() {
	if f.over || f.stack.closed {
		return
	}
	f.ep.LockUser()
	f.stack.link.writing.Store(f)
	if isConnected(f.ep.EndpointState()) {
		sendAck(senderOf(f.ep))
	}
	f.stack.link.writing.Store(nil)
	f.ep.UnlockUser()
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
	// gVisor's own goroutines send meanwhile, for other flows and for this one.
	if len(h) < tcpHeaderMin || !f.sends(pkt.NetworkHeader().Slice(), h) {
		return false
	}
	// While the reader has the endpoint's lock nobody else sends for f. In Read it
	// has it only to tell of a window.
	if locked && f.holds(pkt, h) || f.reading.Load() && f.stack.reader.isCaller() && f.holdsUpdate(pkt, h) {
		return true
	}
	f.acked.Store(h.AckNumber())
	f.ack.window.Store(false)
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
