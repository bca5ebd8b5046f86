package netstack

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/ztun/ztun/tun"
)

// ackRig is an established connection whose far end the test plays.
type ackRig struct {
	*rawRig
	call     *call
	src, dst netip.AddrPort
	seq, ack uint32 // what the test sends next
}

func newACKRig(t *testing.T, src, dst netip.AddrPort) *ackRig {
	t.Helper()
	r := &ackRig{rawRig: newRawRig(t, StackConfig{}), src: src, dst: dst, seq: 101}
	accept, ch := accepting(t, r.stack)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = accept })
	r.ack = r.handshakeAs(src, dst, 100)
	r.call = <-ch
	return r
}

// delay sets how long ACKs wait from now on.
func (r *ackRig) delay(d time.Duration) {
	do(r.stack.Loop(), func() int { r.stack.reader.acks.delay = d; return 0 })
}

// send sends n bytes, and returns once the stack has seen them.
func (r *ackRig) send(n int) {
	r.t.Helper()
	r.write(tun.Header{}, segment(r.src, r.dst, flagACK, r.seq, r.ack, make([]byte, n)))
	r.seq += uint32(n)
	r.sync()
}

// wantACK reads a pure ACK of all that was sent.
func (r *ackRig) wantACK(why string) {
	r.t.Helper()
	b, h := r.read()
	p := parsePacket(b, len(b))
	if flagsOf(b) != flagACK || ackOf(b) != r.seq || p.payload != len(b) {
		r.t.Fatalf("%s: flags %#x, ack %d with %d bytes, want a pure ACK of %d", why, flagsOf(b), ackOf(b), len(b)-p.payload, r.seq)
	}
	if h.Flags&tun.NeedsChecksum == 0 && !transportChecksumOK(&p, b, protoTCP) {
		r.t.Fatalf("%s: the ACK has no checksum", why)
	}
}

func (r *ackRig) wantNothing(why string) {
	r.t.Helper()
	if b, _, ok := r.tryRead(0); ok {
		r.t.Fatalf("%s: a packet with flags %#x left", why, flagsOf(b))
	}
}

func TestACKWaitsForData(t *testing.T) {
	for name, tt := range map[string][2]netip.AddrPort{
		"IPv4": {podPort, service},
		"IPv6": {podPort6, netip.MustParseAddrPort("[fd00::9]:80")},
	} {
		t.Run(name, func(t *testing.T) {
			r := newACKRig(t, tt[0], tt[1])
			r.delay(time.Hour)
			for range 3 {
				r.send(10)
				r.wantNothing("the ACK of a small segment")
				r.call.Write([]byte("answer"))
				b, _ := r.read()
				if p := parsePacket(b, len(b)); ackOf(b) != r.seq || len(b)-p.payload != 6 {
					t.Fatalf("ack %d with %d bytes, want %d with the answer", ackOf(b), len(b)-p.payload, r.seq)
				}
				r.ack += 6
				r.wantNothing("what data has carried")
			}
		})
	}
}

func TestOneACKWaitsAndNoOther(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.delay(time.Hour)
	r.send(10)
	r.wantNothing("the first")
	r.send(10)
	r.wantACK("the second stands for both")
	r.send(10)
	r.wantNothing("the third")
	r.send(2000)
	r.wantACK("more than a segment")
	r.seq -= 10
	r.send(10)
	r.wantACK("a repeated segment")
	r.write(tun.Header{}, segment(r.src, r.dst, flagACK, r.seq+100, r.ack, make([]byte, 10)))
	r.wantACK("a hole")
	r.send(100)
	r.seq += 10
	r.wantACK("the hole is filled")
	r.call.CloseWrite()
	if b, _ := r.read(); flagsOf(b)&flagFIN == 0 {
		t.Errorf("flags %#x, want FIN", flagsOf(b))
	}
	r.ack++
	r.send(10)
	r.wantACK("after our FIN no data follows")
}

// An app that sends in small pieces waits for each ACK: once.
func TestACKThatWaitedInVain(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.send(10)
	r.wantACK("after the delay")
	r.delay(time.Hour)
	for range quickAcks {
		r.send(10)
		r.wantACK("soon after one that waited in vain")
	}
	r.send(10)
	r.wantNothing("later")
}

// The ACK goes with the connection: behind a RST it would draw another.
func TestHeldACKGoesWithItsFlow(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.delay(50 * time.Millisecond)
	r.send(10)
	r.call.Reset()
	if b, _ := r.read(); flagsOf(b)&flagRST == 0 {
		t.Fatalf("flags %#x, want RST", flagsOf(b))
	}
	// The reader's clock has passed the ACK's time when this is answered.
	<-time.After(100 * time.Millisecond)
	r.sync()
	r.wantNothing("the ACK of a flow that was reset")
}

// meanwhile sends segments while the reader is busy, and returns once it has
// seen them.
func (r *ackRig) meanwhile(sizes ...int) {
	r.t.Helper()
	begun, busy := make(chan struct{}), make(chan struct{})
	r.stack.Loop().Post(func() { close(begun); <-busy })
	<-begun
	for _, n := range sizes {
		r.write(tun.Header{}, segment(r.src, r.dst, flagACK, r.seq, r.ack, make([]byte, n)))
		r.seq += uint32(n)
	}
	close(busy)
	r.sync()
}

// What came in while the reader was busy is acknowledged once, when it has
// nothing else to do.
func TestACKOfBulkWaitsWhileThereIsWork(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.delay(time.Hour)
	r.meanwhile(2000, 2000, 2000)
	r.wantACK("of a batch")
	r.wantNothing("after the ACK of a batch")
	// More than a batch: turns alternate with what was posted.
	many := make([]int, 2*turnPackets+6)
	for i := range many {
		many[i] = 100
	}
	r.meanwhile(many...)
	r.wantACK("of several batches")
	r.wantNothing("after the ACK of several batches")
}

func TestUnackedIsBounded(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.delay(time.Hour)
	do(r.stack.Loop(), func() int { r.stack.reader.acks.limit = 2000; return 0 })
	many := make([]int, 2*turnPackets)
	for i := range many {
		many[i] = 100
	}
	r.meanwhile(many...)
	acks := 0
	for last := uint32(0); last != r.seq; acks++ {
		b, _ := r.read()
		last = ackOf(b)
	}
	if acks != 2 {
		t.Errorf("%d ACKs for 6,400 bytes in two batches, want 2", acks)
	}
}

func TestVoidACKsAreForgotten(t *testing.T) {
	var w waitingACKs
	f := &Flow{stack: &Stack{reader: &reader{}}}
	for range 10 {
		w.addAnswer(f)
	}
	if _, ok := w.next(time.Time{}); !ok || len(w.answer) != 1 {
		t.Errorf("%d ACKs are kept, want the last", len(w.answer))
	}
	f.ack.answer = 0
	if _, ok := w.next(time.Time{}); ok || len(w.answer) != 0 {
		t.Errorf("%d ACKs are kept, want none", len(w.answer))
	}
}

// A window that was closed is told of when all that can be read was read, not
// at the first segment's worth of it.
func TestOpenedWindowIsToldOnce(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.delay(time.Hour)
	window := func() uint16 {
		b, _ := r.read()
		return binary.BigEndian.Uint16(tcpOf(b)[14:])
	}
	open := uint16(0)
	for open = 1; open > 0; {
		r.send(2000)
		if open = window(); r.seq > 1<<20 {
			t.Fatal("the window never closed")
		}
	}
	do(r.stack.Loop(), func() int {
		n := 0
		for buf := make([]byte, 1000); ; {
			m, err := r.call.end.Read(buf)
			if n += m; err != nil {
				return n
			}
		}
	})
	r.sync()
	first := window()
	r.wantNothing("after the opened window")
	if first < 10_000 {
		t.Errorf("the window opens with %d bytes after 1,000 and more were read at once, want all of it", first)
	}
}

// takeTurns makes the stack ask and the far end answer until ACKs wait for the
// next request.
func (r *ackRig) takeTurns() *Flow {
	r.t.Helper()
	f := r.call.end.(*Flow)
	r.ask()
	r.send(10)
	// The delay that is usual may pass meanwhile, and the ACK then leaves.
	r.delay(time.Hour)
	r.ask()
	if turns := do(r.stack.Loop(), func() bool { return f.ack.turns }); !turns {
		r.t.Fatal("two that answer each other do not take turns")
	}
	r.delay(ackDelay)
	return f
}

// ask makes the stack send a request, which is read.
func (r *ackRig) ask() {
	r.t.Helper()
	r.call.Write([]byte("request"))
	for {
		b, _ := r.read()
		if p := parsePacket(b, len(b)); len(b) > p.payload {
			break
		}
	}
	r.ack += 7
}

func TestACKOfAnswerWaitsForTheNextRequest(t *testing.T) {
	r := newACKRig(t, podPort, service)
	f := r.takeTurns()
	r.send(10)
	r.wantNothing("the ACK of an answer")
	if n := do(r.stack.Loop(), func() int { return len(r.stack.reader.acks.turn) }); n != 1 {
		t.Fatalf("%d ACKs wait for a turn, want 1", n)
	}
	r.ask()
	if waits := do(r.stack.Loop(), func() bool { return f.ack.waits() }); waits {
		t.Error("the request did not carry the ACK")
	}
	r.wantNothing("what the request has carried")
}

// An app that sends an answer in two pieces, the second when the first is
// acknowledged, has to wait long for that once.
func TestAnswerInPiecesWaitsLongOnce(t *testing.T) {
	r := newACKRig(t, podPort, service)
	f := r.takeTurns()
	r.send(10)
	r.wantNothing("the ACK of the first piece")
	do(r.stack.Loop(), func() int { r.stack.reader.acks.sendDue(time.Now().Add(turnDelay)); return 0 })
	r.wantACK("after turnDelay")
	for range 3 {
		r.send(10)
		r.ask()
	}
	if turns := do(r.stack.Loop(), func() bool { return f.ack.turns }); turns {
		t.Error("ACKs of an answer in pieces wait for a turn again")
	}
}

// A request that comes just after the ACK of the last answer had waited in vain
// brings an answer, and no piece of one: those two go on taking turns.
func TestSlowTurnsAreNoPieces(t *testing.T) {
	r := newACKRig(t, podPort, service)
	f := r.takeTurns()
	r.send(10)
	do(r.stack.Loop(), func() int { r.stack.reader.acks.sendDue(time.Now().Add(turnDelay)); return 0 })
	r.wantACK("after turnDelay")
	r.ask()
	r.send(10)
	if pieces := do(r.stack.Loop(), func() bool { return f.ack.pieces }); pieces {
		t.Error("an answer to a request is taken for a piece of the last one")
	}
}

// What a goroutine of gVisor's sends while the reader reads the same flow leaves
// at once, and nothing of the reader's is touched.
func TestOthersSendWhileTheReaderReads(t *testing.T) {
	r := newACKRig(t, podPort, service)
	f := r.call.end.(*Flow)
	ack := func() {
		f.ep.LockUser()
		defer f.ep.UnlockUser()
		sendAck(senderOf(f.ep))
	}
	// reading runs work as if Read did, on the loop.
	reading := func(work func()) int {
		return do(r.stack.Loop(), func() int {
			f.reading.Store(true)
			f.stack.link.writing.Store(f)
			work()
			f.reading.Store(false)
			f.stack.link.writing.Store(nil)
			return len(r.stack.reader.acks.soon)
		})
	}
	other := func() {
		done := make(chan struct{})
		go func() { defer close(done); ack() }()
		<-done
	}
	if held := reading(other); held != 0 {
		t.Fatalf("%d ACKs of another goroutine wait in the reader's list", held)
	}
	r.wantACK("of another goroutine")
	if held := reading(ack); held != 1 {
		t.Fatalf("%d ACKs of the reader wait, want 1", held)
	}
	r.wantACK("of the reader, later")
}
