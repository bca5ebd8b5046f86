package netstack

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"

	"github.com/ztun/ztun/tun"
)

var (
	node      = netip.MustParseAddrPort("10.0.0.254:5")
	node6     = netip.MustParseAddrPort("[fd00::fe]:5")
	webPort   = netip.AddrPortFrom(pod, 80)
	webPort6  = netip.AddrPortFrom(pod6, 80)
	nodeHosts = []netip.Addr{node.Addr(), node6.Addr()}
)

// prober is what a stack asks about connections from the node.
type prober struct {
	*rawRig
	asked   chan func(bool)
	handled chan *Request
}

func newProber(t *testing.T) *prober {
	t.Helper()
	p := &prober{asked: make(chan func(bool), 10), handled: make(chan *Request, 10)}
	p.rawRig = newRawRig(t, StackConfig{IsProbe: func(src, _ netip.AddrPort, answer func(bool)) bool {
		if !slices.Contains(nodeHosts, src.Addr()) {
			return false
		}
		p.asked <- answer
		return true
	}})
	on(p.stack, p.handler, func(h *hooks) { h.tcp = func(q *Request) { p.handled <- q } })
	return p
}

// silent fails the test if anything came out of the device.
func (p *prober) silent(why string) {
	p.t.Helper()
	p.sync()
	if b, _, ok := p.tryRead(0); ok {
		p.t.Fatalf("%s: % x came out", why, b)
	}
}

func TestProbesAreForwarded(t *testing.T) {
	p := newProber(t)
	for _, c := range [][2]netip.AddrPort{{node, webPort}, {node6, webPort6}} {
		from, to := c[0], c[1]
		syn := segment(from, to, flagSYN, 1, 0, nil)
		p.write(tun.Header{}, syn)
		answer := <-p.asked
		p.write(tun.Header{}, syn)
		p.silent("held, though repeated")
		answer(true)
		if b, h := p.read(); !bytes.Equal(b, syn) || h != (tun.Header{}) {
			t.Fatalf("forwarded % x with %+v, want % x", b, h, syn)
		}
		for _, s := range [][]byte{
			segment(to, from, flagSYN|flagACK, 7, 2, nil), segment(from, to, flagACK, 2, 8, []byte("GET /")),
			segment(to, from, flagACK|flagFIN, 8, 7, []byte("200")), segment(from, to, flagACK|flagFIN, 7, 12, nil), segment(to, from, flagACK, 12, 8, nil),
		} {
			if !p.passes(s) {
				t.Fatalf("% x was not forwarded", s)
			}
		}
	}
	if len(p.asked)+len(p.handled) != 0 {
		t.Error("somebody was asked once more")
	}
}

func TestWhatIsNoProbeIsARequest(t *testing.T) {
	p := newProber(t)
	p.write(tun.Header{}, segment(client, webPort, flagSYN, 1, 0, nil))
	first := <-p.handled
	on(p.stack, p.handler, func(*hooks) { first.Refuse(RefuseSilent) })
	p.write(tun.Header{}, segment(node, webPort, flagSYN, 1, 0, nil))
	(<-p.asked)(false)
	q := <-p.handled
	if q.Src() != node || q.Dst() != webPort || !q.Inbound() {
		t.Errorf("request of %v to %v", q.Src(), q.Dst())
	}
	on(p.stack, p.handler, func(*hooks) { q.Refuse(RefuseReset) })
	if b, _ := p.read(); flagsOf(b) != flagRST|flagACK {
		t.Errorf("flags %#x, want RST", flagsOf(b))
	}
	// The pod's own connections, and tunnels, are not asked about.
	p.write(tun.Header{}, segment(webPort, node, flagSYN, 1, 0, nil))
	own := <-p.handled
	on(p.stack, p.handler, func(*hooks) { own.Refuse(RefuseSilent) })
	p.write(tun.Header{}, segment(node, netip.AddrPortFrom(pod, TunnelPort), flagSYN, 1, 0, nil))
	if b, _ := p.read(); flagsOf(b) != flagSYN|flagACK {
		t.Errorf("tunnel port: flags %#x, want SYN-ACK", flagsOf(b))
	}
	if len(p.asked) != 0 {
		t.Error("what cannot be a probe was asked about")
	}
}

// A SYN of the node's own kernel has no whole checksum.
func TestProbeWithPartialChecksumIsCompleted(t *testing.T) {
	p := newProber(t)
	want := segment(node, webPort, flagSYN, 1, 0, nil)
	b := bytes.Clone(want)
	b[len(b)-4] ^= 0xff
	p.write(tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 16}, b)
	(<-p.asked)(true)
	if got, _ := p.read(); !bytes.Equal(got, want) {
		t.Errorf("forwarded % x, want % x", got, want)
	}
}

// No probe has IP options; what they would lead to is not known.
func TestOddProbeIsDropped(t *testing.T) {
	p := newProber(t)
	b := segment(node, webPort, flagSYN, 1, 0, nil)
	b = slices.Insert(b, ipv4HeaderMin, 1, 1, 1, 1) // No operation.
	b[0] = 0x46
	b[3] += 4
	b[10], b[11] = 0, 0
	c := ^fold(sum(b[:ipv4HeaderMin+4], 0))
	b[10], b[11] = byte(c>>8), byte(c)
	p.write(tun.Header{}, b)
	(<-p.asked)(true)
	p.silent("with options")
}

func TestLateAnswersCountForNothing(t *testing.T) {
	p := newProber(t)
	p.write(tun.Header{}, segment(node, webPort, flagSYN, 1, 0, nil))
	answer := <-p.asked
	answer(false)
	q := <-p.handled
	answer(true)
	on(p.stack, p.handler, func(*hooks) { q.Refuse(RefuseSilent) })
	answer(true)
	p.silent("answered twice")
	if p.passes(segment(webPort, node, flagSYN|flagACK, 1, 2, nil)) {
		t.Error("a connection that was no probe is forwarded")
	}
	p.tryRead(0) // The RST to it.
	p.write(tun.Header{}, segment(node, webPort, flagSYN, 1, 0, nil))
	answer = <-p.asked
	p.stack.Close()
	answer(true)
	p.stack.Loop().Post(func() {})
	if n := len(p.handled); n != 0 {
		t.Errorf("%d requests after the end", n)
	}
}

// A proxy that takes nothing new lets the kubelet see that the pod is well.
func TestProbesPassWhileNothingIsAccepted(t *testing.T) {
	p := newProber(t)
	p.stack.StopAccepting()
	p.write(tun.Header{}, segment(client, webPort, flagSYN, 1, 0, nil))
	p.write(tun.Header{}, segment(node, netip.AddrPortFrom(pod, TunnelPort), flagSYN, 1, 0, nil))
	p.silent("nobody's probe")
	syn := segment(node, webPort, flagSYN, 1, 0, nil)
	p.write(tun.Header{}, syn)
	(<-p.asked)(false)
	p.silent("no probe")
	syn = segment(netip.AddrPortFrom(node.Addr(), node.Port()+1), webPort, flagSYN, 1, 0, nil)
	p.write(tun.Header{}, syn)
	(<-p.asked)(true)
	if b, _ := p.read(); !bytes.Equal(b, syn) {
		t.Errorf("forwarded % x, want % x", b, syn)
	}
	if len(p.handled)+len(p.asked) != 0 {
		t.Error("a connection was taken")
	}
	do(p.stack.Loop(), func() int { p.stack.Accept(); return 0 })
	if got := (<-p.handled).Src(); got != client && got != node {
		t.Errorf("a request of %v after all", got)
	}
	<-p.handled // The other one.
}
