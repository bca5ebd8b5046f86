package netstack

import (
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
	do(r.stack.Loop(), func() int { r.stack.reader.held.delay = d; return 0 })
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

func TestHeldACKsAreBounded(t *testing.T) {
	var l heldACKs
	f := &Flow{stack: &Stack{}}
	for i := range uint32(10) {
		f.ack.held = i + 1
		l.list = append(l.list, heldACK{flow: f, serial: i + 1})
	}
	if _, ok := l.next(time.Time{}); !ok || len(l.list) != 1 {
		t.Errorf("%d ACKs are kept, want the last", len(l.list))
	}
	f.ack.held = 0
	if _, ok := l.next(time.Time{}); ok || len(l.list) != 0 {
		t.Errorf("%d ACKs are kept, want none", len(l.list))
	}
}
