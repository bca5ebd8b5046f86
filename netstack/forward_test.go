package netstack

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/tun"
)

var old = Tuple{Local: netip.AddrPortFrom(pod, 40000), Remote: service}

// passes writes a packet and reports whether it came back unchanged.
func (r *rawRig) passes(b []byte) bool {
	r.t.Helper()
	r.write(tun.Header{}, b)
	r.sync()
	got, _, ok := r.tryRead(0)
	return ok && bytes.Equal(got, b)
}

func TestOlderFlowsAreForwardedUntilTheyEnd(t *testing.T) {
	r := newRawRig(t, StackConfig{Older: []Tuple{old}})
	out := func(flags uint8) []byte { return segment(old.Local, old.Remote, flags, 1, 1, []byte("plain")) }
	in := func(flags uint8) []byte { return segment(old.Remote, old.Local, flags, 1, 1, []byte("plain")) }
	if !r.passes(out(flagACK)) || !r.passes(in(flagACK)) {
		t.Error("an older flow was not forwarded")
	}
	other := segment(netip.AddrPortFrom(pod, 40001), service, flagACK, 1, 1, []byte("plain"))
	if r.passes(other) {
		t.Error("a segment of no known flow left in plaintext")
	}
	if !r.passes(out(flagACK|flagFIN)) || !r.passes(in(flagACK|flagFIN)) || !r.passes(out(flagACK)) {
		t.Error("the flow's end was not forwarded")
	}
	if list := do(r.stack.Loop(), r.stack.Older); len(list) != 0 {
		t.Errorf("still listed: %v", list)
	}
}

func TestSYNEndsAnOlderFlow(t *testing.T) {
	r := newRawRig(t, StackConfig{Older: []Tuple{old}})
	asked := make(chan *Request, 1)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { asked <- q; q.Refuse(RefuseSilent) } })
	if r.passes(segment(old.Local, old.Remote, flagSYN, 1, 0, nil)) {
		t.Error("a new connection was forwarded")
	}
	<-asked
	if r.passes(segment(old.Local, old.Remote, flagACK, 2, 2, []byte("plain"))) {
		t.Error("the tuple is still forwarded")
	}
}

func TestCutOlderFlowGetsRST(t *testing.T) {
	r := newRawRig(t, StackConfig{Older: []Tuple{old}})
	do(r.stack.Loop(), func() int { r.stack.CutOlder(old.Local, old.Remote); return 0 })
	r.write(tun.Header{}, segment(old.Local, old.Remote, flagACK, 1, 9, []byte("plain")))
	if b, _ := r.read(); flagsOf(b)&flagRST == 0 {
		t.Errorf("flags %#x, want RST", flagsOf(b))
	}
}

func TestBypassedInboundIsForwardedBothWays(t *testing.T) {
	r := newRawRig(t, StackConfig{BypassInbound: true})
	server := netip.AddrPortFrom(pod, 80)
	if !r.passes(segment(client, server, flagSYN, 1, 0, nil)) {
		t.Error("inbound SYN was not forwarded")
	}
	if !r.passes(segment(server, client, flagSYN|flagACK, 1, 2, nil)) {
		t.Error("the app's answer was not forwarded")
	}
	// What the app opens is still captured, and tunnels still end here.
	asked := make(chan bool, 1)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { asked <- q.Inbound(); q.Refuse(RefuseSilent) } })
	r.write(tun.Header{}, segment(podPort, service, flagSYN, 1, 0, nil))
	if <-asked {
		t.Error("outbound taken for inbound")
	}
	r.write(tun.Header{}, segment(client, netip.AddrPortFrom(pod, TunnelPort), flagSYN, 1, 0, nil))
	if b, _ := r.read(); flagsOf(b) != flagSYN|flagACK {
		t.Errorf("tunnel port: flags %#x, want SYN-ACK", flagsOf(b))
	}
}

func TestBypassSurvivesARestart(t *testing.T) {
	r := newRawRig(t, StackConfig{BypassInbound: true})
	server := netip.AddrPortFrom(pod, 80)
	if !r.passes(segment(client, server, flagACK, 5, 5, []byte("x"))) {
		t.Error("a segment of an old bypassed connection was not forwarded")
	}
	if !r.passes(segment(server, client, flagACK, 5, 6, []byte("y"))) {
		t.Error("its answer was not forwarded")
	}
}

func TestSuperSegmentIsForwardedWhole(t *testing.T) {
	r := newRawRig(t, StackConfig{Older: []Tuple{old}})
	b := segment(old.Local, old.Remote, flagACK, 1, 1, bytes.Repeat([]byte("0123456789abcdef"), 4000))
	h := tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCPv4, GSOSize: 1448, HdrLen: 40, CsumStart: 20, CsumOffset: 16}
	r.write(h, b)
	got, gh := r.read()
	if !bytes.Equal(got, b) || gh != h {
		t.Errorf("got %d bytes with %+v, want %d with %+v", len(got), gh, len(b), h)
	}
}

// Spoofed SYNs, which nobody answers, fill the table of bypassed flows; the
// next connection gets its place all the same, and older flows keep theirs.
func TestFloodOfBypassedSYNsKeepsNobodyOut(t *testing.T) {
	r := newRawRig(t, StackConfig{BypassInbound: true, Older: []Tuple{old}})
	do(r.stack.Loop(), func() int {
		for i := range maxBypass + 100 {
			src := netip.AddrFrom4([4]byte{172, byte(i >> 16), byte(i >> 8), byte(i)})
			r.stack.bypass.learn(tupleOf(netip.AddrPortFrom(pod, 80), netip.AddrPortFrom(src, 9)))
		}
		if n := len(r.stack.bypass.flows); n > maxBypass {
			t.Errorf("%d flows are remembered, at most %d", n, maxBypass)
		}
		return 0
	})
	server := netip.AddrPortFrom(pod, 80)
	if !r.passes(segment(client, server, flagSYN, 1, 0, nil)) || !r.passes(segment(server, client, flagSYN|flagACK, 1, 2, nil)) {
		t.Error("a connection was kept out")
	}
	if !r.passes(segment(old.Local, old.Remote, flagACK, 1, 1, []byte("plain"))) {
		t.Error("an older flow was forgotten")
	}
}
