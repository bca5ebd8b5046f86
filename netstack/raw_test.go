package netstack

import (
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
)

// rawRig is a proxy's stack whose device the test holds the other end of.
type rawRig struct {
	t       *testing.T
	stack   *Stack
	handler *hooks
	dev     *tun.Device
	vector  tun.Vector
	buf     []byte
}

func newRawRig(t *testing.T, cfg StackConfig) *rawRig {
	t.Helper()
	a, b := tuntest.Pair(t, tun.Options{MTU: 1500, Offload: true})
	e, err := New(Config{Readers: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	r := &rawRig{t: t, handler: &hooks{t: t}, dev: b, buf: make([]byte, tun.MaxPacket)}
	r.vector.Set(0, r.buf)
	if cfg.Addrs == nil {
		cfg.Addrs = []netip.Addr{pod, pod6}
	}
	cfg.Name = "test/pod"
	if r.stack, err = e.Add(a, cfg, r.handler.serve); err != nil {
		t.Fatal(err)
	}
	return r
}

// read returns the next packet the stack sent.
func (r *rawRig) read() ([]byte, tun.Header) {
	r.t.Helper()
	b, h, ok := r.tryRead(patience)
	if !ok {
		r.t.Fatal("no packet")
	}
	return b, h
}

func (r *rawRig) tryRead(wait time.Duration) ([]byte, tun.Header, bool) {
	r.t.Helper()
	pfd := []unix.PollFd{{Fd: int32(r.dev.FD()), Events: unix.POLLIN}}
	// A signal of Go's own ends a poll early, often on a machine that is busy.
	for end := time.Now().Add(wait); ; {
		if _, err := unix.Poll(pfd, max(0, int(time.Until(end).Milliseconds()))); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	n, h, err := r.dev.Read(&r.vector)
	if errors.Is(err, tun.ErrEmpty) {
		return nil, h, false
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return r.buf[:n], h, true
}

func (r *rawRig) write(h tun.Header, b []byte) {
	r.t.Helper()
	if err := r.dev.Write(h, b); err != nil {
		r.t.Fatal(err)
	}
}

// sync waits until the stack has handled everything written before.
func (r *rawRig) sync() {
	r.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		// The reader reads until the device is empty before it runs what was posted.
		pending := do(r.stack.Loop(), func() bool {
			pfd := []unix.PollFd{{Fd: int32(r.stack.dev.FD()), Events: unix.POLLIN}}
			n, _ := unix.Poll(pfd, 0)
			return n > 0
		})
		if !pending {
			// What the last batch queued runs behind what was posted with it.
			do(r.stack.Loop(), func() int { return 0 })
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatal("device is never read")
		}
	}
}

// segment makes a TCP packet.
func segment(src, dst netip.AddrPort, flags uint8, seq, ack uint32, payload []byte) []byte {
	return segmentWith(nil, src, dst, flags, seq, ack, payload)
}

// segmentWith makes a TCP packet with options, a multiple of four bytes.
func segmentWith(options []byte, src, dst netip.AddrPort, flags uint8, seq, ack uint32, payload []byte) []byte {
	b := appendIP(nil, src.Addr(), dst.Addr(), protoTCP, tcpHeaderMin+len(options)+len(payload))
	at := len(b)
	b = append(b, make([]byte, tcpHeaderMin)...)
	b = append(append(b, options...), payload...)
	h := b[at:]
	binary.BigEndian.PutUint16(h[0:], src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint32(h[4:], seq)
	binary.BigEndian.PutUint32(h[8:], ack)
	h[12], h[13] = uint8(5+len(options)/4)<<4, flags
	binary.BigEndian.PutUint16(h[14:], 65535)
	binary.BigEndian.PutUint16(h[16:], ^fold(sum(h, pseudo(src.Addr(), dst.Addr(), protoTCP, len(h)))))
	return b
}

// timestamps is the option with a value and the echo of another, with room for
// four more bytes: SACK permitted, or nothing.
func timestamps(sack bool, value, echo uint32) []byte {
	b := []byte{optNOP, optNOP, optNOP, optNOP, optNOP, optNOP, 8, 10}
	if sack {
		b[2], b[3] = 4, 2
	}
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, value), echo)
}

// optionsOf parses the options of a segment.
func optionsOf(b []byte) header.TCPOptions {
	h := tcpOf(b)
	return header.ParseTCPOptions(h[tcpHeaderMin : h[12]>>4*4])
}

// tcpOf returns the TCP header of a packet.
func tcpOf(b []byte) []byte {
	if b[0]>>4 == 4 {
		return b[int(b[0]&15)*4:]
	}
	return b[ipv6Header:]
}

func flagsOf(b []byte) uint8 { return tcpOf(b)[13] & 0x3f }
func seqOf(b []byte) uint32  { return binary.BigEndian.Uint32(tcpOf(b)[4:]) }
func ackOf(b []byte) uint32  { return binary.BigEndian.Uint32(tcpOf(b)[8:]) }

func (r *rawRig) stat(f func(Stats) uint64) uint64 { return f(r.stack.Stats()) }

var (
	podPort  = netip.AddrPortFrom(pod, 40000)
	podPort6 = netip.AddrPortFrom(pod6, 40000)
)

func TestSYNWithWrongChecksumIsNotAnswered(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	b := segment(podPort, service, flagSYN, 1, 0, nil)
	b[len(b)-4] ^= 0xff
	r.write(tun.Header{}, b)
	r.sync()
	if n := r.stat(func(s Stats) uint64 { return s.BadChecksum }); n != 1 {
		t.Errorf("BadChecksum = %d, want 1", n)
	}
	// The same packet is taken when the kernel has yet to fill the checksum in.
	asked := make(chan bool, 1)
	on(r.stack, r.handler, func(h *hooks) {
		h.tcp = func(q *Request) { asked <- true; q.Refuse(RefuseSilent) }
	})
	r.write(tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 16}, b)
	select {
	case <-asked:
	case <-time.After(patience):
		t.Error("SYN with partial checksum was not taken")
	}
}

func TestStraySegmentGetsRST(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	for _, c := range []struct{ src, dst netip.AddrPort }{
		{podPort, service}, {client, netip.AddrPortFrom(pod, 80)},
		{podPort6, netip.MustParseAddrPort("[fd00:96::10]:80")},
	} {
		r.write(tun.Header{}, segment(c.src, c.dst, flagACK, 1000, 2000, []byte("secret")))
		b, _ := r.read()
		if flagsOf(b)&flagRST == 0 || seqOf(b) != 2000 {
			t.Errorf("%v -> %v: flags %#x seq %d, want a RST at 2000", c.src, c.dst, flagsOf(b), seqOf(b))
		}
	}
	if n := r.stat(func(s Stats) uint64 { return s.Stray }); n != 3 {
		t.Errorf("Stray = %d, want 3", n)
	}
	if n := r.stat(func(s Stats) uint64 { return s.Forwarded }); n != 0 {
		t.Errorf("Forwarded = %d: plaintext left", n)
	}
}

func TestRefusalPackets(t *testing.T) {
	const quoted = 28
	for _, c := range []struct {
		name  string
		how   Refusal
		src   netip.AddrPort
		dst   netip.AddrPort
		check func(b []byte) bool
	}{
		{"reset v4", RefuseReset, podPort, service, func(b []byte) bool {
			return flagsOf(b) == flagRST|flagACK && ackOf(b) == 8
		}},
		{"reset v6", RefuseReset, podPort6, netip.MustParseAddrPort("[fd00:96::10]:80"), func(b []byte) bool {
			return flagsOf(b) == flagRST|flagACK && ackOf(b) == 8
		}},
		{"unreachable v4", RefuseUnreachable, podPort, service, func(b []byte) bool {
			return b[9] == protoICMP && b[20] == 3 && b[21] == 1 && len(b) == 20+8+quoted
		}},
		{"prohibited v4", RefuseProhibited, podPort, service, func(b []byte) bool {
			return b[9] == protoICMP && b[20] == 3 && b[21] == 13
		}},
		{"unreachable v6", RefuseUnreachable, podPort6, netip.MustParseAddrPort("[fd00:96::10]:80"), func(b []byte) bool {
			return b[6] == protoICMPv6 && b[40] == 1 && b[41] == 3
		}},
		{"prohibited v6", RefuseProhibited, podPort6, netip.MustParseAddrPort("[fd00:96::10]:80"), func(b []byte) bool {
			return b[6] == protoICMPv6 && b[40] == 1 && b[41] == 1
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRawRig(t, StackConfig{})
			on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { q.Refuse(c.how) } })
			r.write(tun.Header{}, segment(c.src, c.dst, flagSYN, 7, 0, nil))
			b, _ := r.read()
			if !c.check(b) {
				t.Errorf("answer % x", b)
			}
		})
	}
}

func TestSYNIsNotAnsweredBeforeAccept(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	asked := make(chan *Request, 2)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { asked <- q } })
	syn := segment(podPort, service, flagSYN, 7, 0, nil)
	r.write(tun.Header{}, syn)
	q := <-asked
	r.write(tun.Header{}, syn) // the app's kernel repeats it
	r.sync()
	if b, _, ok := r.tryRead(0); ok {
		t.Errorf("answered early: % x", b)
	}
	if len(asked) != 0 {
		t.Error("a repeated SYN made a second request")
	}
	do(r.stack.Loop(), func() int { q.Refuse(RefuseReset); q.Refuse(RefuseReset); return 0 })
	r.read()
	if b, _, ok := r.tryRead(0); ok {
		t.Errorf("refused twice: % x", b)
	}
}

func TestWithheldSYNExpires(t *testing.T) {
	r := newRawRig(t, StackConfig{Limits: Limits{Withheld: 10 * time.Millisecond}})
	asked := make(chan *Request, 2)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { asked <- q } })
	r.write(tun.Header{}, segment(podPort, service, flagSYN, 7, 0, nil))
	<-asked
	deadline := time.Now().Add(patience)
	for r.stack.Stats().Expired == 0 {
		if time.Now().After(deadline) {
			t.Fatal("never expired")
		}
		<-time.After(time.Millisecond)
	}
	if n := r.stack.Stats().Pending; n != 0 {
		t.Errorf("Pending = %d", n)
	}
}

// rule 5: spoofed SYNs stop neither the pod's own connections nor those of
// other sources.
func TestFloodLeavesRoomForOthers(t *testing.T) {
	r := newRawRig(t, StackConfig{Limits: Limits{PendingInbound: 100, PendingPerSource: 10, PendingOutbound: 5}})
	asked := make(chan *Request, 1000)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { asked <- q } })
	server := netip.AddrPortFrom(pod, 80)
	for i := range 50 {
		r.write(tun.Header{}, segment(netip.AddrPortFrom(client.Addr(), uint16(1000+i)), server, flagSYN, 7, 0, nil))
	}
	r.sync()
	if len(asked) != 10 {
		t.Errorf("%d requests from one source, want 10", len(asked))
	}
	for i := range 500 {
		src := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}), 5)
		r.write(tun.Header{}, segment(src, server, flagSYN, 7, 0, nil))
	}
	r.sync()
	if len(asked) != 100 {
		t.Errorf("%d inbound requests, want 100", len(asked))
	}
	r.write(tun.Header{}, segment(podPort, service, flagSYN, 7, 0, nil))
	r.sync()
	if len(asked) != 101 {
		t.Error("the pod's own connection was not asked about")
	}
	if n := r.stack.Stats().LimitPending; n != 40+410 {
		t.Errorf("LimitPending = %d, want 450", n)
	}
}

func TestForeignPacketsAreDropped(t *testing.T) {
	foreign := netip.MustParseAddrPort("192.0.2.1:1")
	r := newRawRig(t, StackConfig{})
	r.write(tun.Header{}, segment(foreign, service, flagSYN, 7, 0, nil))
	r.write(tun.Header{}, appendUDP(nil, podPort, service, []byte("x")))
	r.write(tun.Header{}, appendIP(nil, pod, service.Addr(), protoICMP, 0))
	r.write(tun.Header{}, []byte{0x45, 0, 0})
	r.write(tun.Header{GSOType: tun.GSOTCPv4}, segment(podPort, service, flagSYN, 7, 0, nil))
	r.sync()
	s := r.stack.Stats()
	if s.ForeignSource != 1 || s.NotTCP != 2 || s.Malformed != 1 || s.BadHeader != 1 {
		t.Errorf("foreign %d, not TCP %d, malformed %d, bad header %d; want 1 2 1 1", s.ForeignSource, s.NotTCP, s.Malformed, s.BadHeader)
	}
	if b, _, ok := r.tryRead(0); ok {
		t.Errorf("answered: % x", b)
	}
}

func TestVirtualInterfaceIsOutbound(t *testing.T) {
	r := newRawRig(t, StackConfig{VirtualInterfaces: true})
	asked := make(chan bool, 1)
	on(r.stack, r.handler, func(h *hooks) {
		h.tcp = func(q *Request) { asked <- q.Inbound(); q.Refuse(RefuseSilent) }
	})
	r.write(tun.Header{}, segment(netip.MustParseAddrPort("192.168.122.5:1"), service, flagSYN, 7, 0, nil))
	if <-asked {
		t.Error("a virtual machine's connection was taken for inbound")
	}
}

func TestCapturedDNSIsAnsweredFromTheResolversAddress(t *testing.T) {
	r := newRawRig(t, StackConfig{CaptureDNS: true})
	resolver := netip.MustParseAddrPort("10.96.0.2:53")
	on(r.stack, r.handler, func(h *hooks) {
		h.udp = func(d *Datagram) {
			if string(d.Payload) == "forward" {
				d.Forward()
				return
			}
			d.Reply()(append([]byte("re:"), d.Payload...))
		}
	})
	r.write(tun.Header{}, appendUDP(nil, podPort, resolver, []byte("query")))
	b, _ := r.read()
	p := parsePacket(b, len(b))
	if p.class != classUDP || p.tuple.source() != resolver || p.tuple.destination() != podPort || string(b[p.payload:]) != "re:query" {
		t.Errorf("reply % x", b)
	}
	if !transportChecksumOK(&p, b, protoUDP) {
		t.Error("reply has a wrong checksum")
	}
	q := appendUDP(nil, podPort, resolver, []byte("forward"))
	r.write(tun.Header{}, q)
	if b, _ := r.read(); string(b) != string(q) {
		t.Errorf("forwarded % x, want % x", b, q)
	}
	q[len(q)-1] ^= 1
	r.write(tun.Header{}, q)
	r.sync()
	if n := r.stack.Stats().BadChecksum; n != 1 {
		t.Errorf("BadChecksum = %d, want 1", n)
	}
}

// handshakeAs opens a connection by hand and returns the stack's next
// sequence number.
func (r *rawRig) handshakeAs(src, dst netip.AddrPort, seq uint32) uint32 {
	r.t.Helper()
	r.write(tun.Header{}, segment(src, dst, flagSYN, seq, 0, nil))
	b, h := r.read()
	if flagsOf(b) != flagSYN|flagACK {
		r.t.Fatalf("flags %#x, want SYN-ACK", flagsOf(b))
	}
	// A SYN-ACK without a checksum is dropped by the kernel.
	if p := parsePacket(b, len(b)); h.Flags&tun.NeedsChecksum == 0 && !transportChecksumOK(&p, b, protoTCP) {
		r.t.Fatal("SYN-ACK has no checksum")
	}
	iss := seqOf(b)
	r.write(tun.Header{}, segment(src, dst, flagACK, seq+1, iss+1, nil))
	return iss + 1
}

// The pod's kernel reuses a source port at once after a passive close.
func TestSourcePortIsReusedAfterOurClose(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	accept, ch := accepting(t, r.stack)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = accept })
	next := r.handshakeAs(podPort, service, 100)
	c := <-ch
	c.CloseWrite()
	b, _ := r.read()
	if flagsOf(b)&flagFIN == 0 {
		t.Fatalf("flags %#x, want FIN", flagsOf(b))
	}
	r.write(tun.Header{}, segment(podPort, service, flagACK|flagFIN, 101, next+1, nil))
	if b, _ = r.read(); ackOf(b) != 102 {
		t.Fatalf("ack %d, want 102", ackOf(b))
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("no EOF")
	}
	c.Close()
	// No TIME_WAIT: the endpoint goes at once, and the SYN below is answered
	// although its sequence number is older than the last connection's.
	deadline := time.Now().Add(patience)
	for do(r.stack.Loop(), func() int { return len(r.stack.flows) }) > 0 {
		if time.Now().After(deadline) {
			t.Fatal("the flow stays in TIME_WAIT")
		}
		<-time.After(time.Millisecond)
	}
	r.handshakeAs(podPort, service, 50)
	<-ch
	if n := r.stack.Stats().Flows; n != 1 {
		t.Errorf("Flows = %d, want 1", n)
	}
}

// A FIN that comes twice in a batch finds no TIME_WAIT on the pod leg.
func TestFINTwiceAtOnce(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	accept, ch := accepting(t, r.stack)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = accept })
	for range 1000 {
		next := r.handshakeAs(podPort, service, 100)
		c := <-ch
		c.CloseWrite()
		r.read()
		fin := segment(podPort, service, flagACK|flagFIN, 101, next+1, nil)
		// The reader sleeps until all lie in the device.
		do(r.stack.Loop(), func() int {
			for range 4 {
				r.write(tun.Header{}, fin)
			}
			return 0
		})
		r.sync()
		c.Close()
		eventually(t, "the flow's end", func() bool {
			return do(r.stack.Loop(), func() int { return len(r.stack.flows) }) == 0
		})
		for _, _, ok := r.tryRead(0); ok; _, _, ok = r.tryRead(0) {
		}
	}
}

// rule 10: packets may be cut on the way, since no ICMP error reaches us.
func TestPathMTUDiscoveryIsOff(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	accept, ch := accepting(t, r.stack)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = accept })
	r.handshakeAs(client, netip.AddrPortFrom(pod, 80), 100)
	c := <-ch
	c.Write([]byte("x"))
	b, _ := r.read()
	if b[6]&0x40 != 0 {
		t.Error("don't fragment is set")
	}
}

func TestWhatLiesInTheDeviceIsDrained(t *testing.T) {
	a, b := tuntest.Pair(t, tun.Options{})
	for range 5 {
		if err := b.Write(tun.Header{}, segment(podPort, service, flagACK, 1, 1, []byte("old"))); err != nil {
			t.Fatal(err)
		}
	}
	e, err := New(Config{Readers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	s, err := e.Add(a, StackConfig{Addrs: []netip.Addr{pod}}, (&hooks{t: t}).serve)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.Stats().Drained; n != 5 {
		t.Errorf("Drained = %d, want 5", n)
	}
	if n := s.Stats().Stray; n != 0 {
		t.Errorf("Stray = %d: old packets were answered", n)
	}
}

func TestNoSYNIsAnsweredAfterStopAccepting(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	accept, ch := accepting(t, r.stack)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = accept })
	next := r.handshakeAs(podPort, service, 100)
	c := <-ch
	r.stack.StopAccepting()
	for _, dst := range []netip.AddrPort{netip.AddrPortFrom(pod, TunnelPort), netip.AddrPortFrom(pod, 80)} {
		r.write(tun.Header{}, segment(client, dst, flagSYN, 7, 0, nil))
	}
	r.write(tun.Header{}, segment(netip.AddrPortFrom(pod, 5), service, flagSYN, 7, 0, nil))
	r.sync()
	if b, _, ok := r.tryRead(0); ok {
		t.Errorf("answered: % x", b)
	}
	r.write(tun.Header{}, segment(podPort, service, flagACK, 101, next, []byte("still here")))
	b := make([]byte, 32)
	if n, err := c.Read(b); string(b[:n]) != "still here" || err != nil {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

func TestSYNThatHoldsMuchIsDropped(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	r.write(tun.Header{}, segment(podPort, service, flagSYN, 1, 0, make([]byte, 60_000)))
	r.sync()
	if s := r.stack.Stats(); s.Malformed != 1 || s.Pending != 0 {
		t.Errorf("malformed %d, pending %d, want 1 and 0", s.Malformed, s.Pending)
	}
}

// Where both close at once, the ACK of our FIN may come before the peer's FIN,
// which knows nothing of ours. Nothing comes after that.
func TestFINThatItsSuccessorOvertook(t *testing.T) {
	for name, ends := range map[string][2]netip.AddrPort{"pod": {podPort, service}, "network": {client, netip.AddrPortFrom(pod, 80)}} {
		t.Run(name, func(t *testing.T) {
			r := newACKRig(t, ends[0], ends[1])
			f := r.call.end.(*Flow)
			r.call.CloseWrite()
			if b, _ := r.read(); flagsOf(b)&flagFIN == 0 {
				t.Fatalf("flags %#x, want FIN", flagsOf(b))
			}
			r.write(tun.Header{}, segment(r.src, r.dst, flagACK, r.seq+1, r.ack+1, nil))
			r.sync()
			r.write(tun.Header{}, segment(r.src, r.dst, flagACK|flagFIN, r.seq, r.ack, nil))
			r.seq++
			r.wantACK("of the peer's FIN")
			if _, err := r.call.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("read after the FIN: %v", err)
			}
			r.call.Close()
			eventually(t, "the end", func() bool { return r.stack.Stats().Flows == 0 })
			state := do(r.stack.Loop(), f.ep.EndpointState)
			if want := map[string]tcp.EndpointState{"pod": tcp.StateClose, "network": tcp.StateTimeWait}[name]; state != want {
				t.Errorf("state %v, want %v", state, want)
			}
		})
	}
}

// A FIN that waits behind data is not acknowledged because all before it is.
func TestFINBehindDataIsNotOver(t *testing.T) {
	r := newACKRig(t, podPort, service)
	f := r.call.end.(*Flow)
	shut := segment(r.src, r.dst, flagACK, r.seq, r.ack, nil)
	setWindow(shut, 0)
	r.write(tun.Header{}, shut)
	r.sync()
	r.call.Write([]byte("held back"))
	r.call.CloseWrite()
	fin := segment(r.src, r.dst, flagACK|flagFIN, r.seq, r.ack, nil)
	setWindow(fin, 0)
	r.write(tun.Header{}, fin)
	r.sync()
	if state := do(r.stack.Loop(), f.ep.EndpointState); state != tcp.StateClosing {
		t.Errorf("state %v, want %v", state, tcp.StateClosing)
	}
}

// setWindow changes the window that a segment tells.
func setWindow(b []byte, n uint16) {
	h := tcpOf(b)
	p := parsePacket(b, len(b))
	binary.BigEndian.PutUint16(h[14:], n)
	binary.BigEndian.PutUint16(h[16:], 0)
	src, dst := p.tuple.source().Addr(), p.tuple.destination().Addr()
	binary.BigEndian.PutUint16(h[16:], ^fold(sum(h, pseudo(src, dst, protoTCP, len(h)))))
}

// The window of an ACK that was overtaken may be too small for what was sent
// since: that is sent again all the same.
func TestOldWindowKeepsNothingBack(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.call.Write(make([]byte, 1000))
	b, _ := r.read()
	first := seqOf(b)
	old := segment(r.src, r.dst, flagACK, r.seq, r.ack, nil)
	setWindow(old, 100)
	r.write(tun.Header{}, old)
	for range 3 {
		if b, _ := r.read(); seqOf(b) != first {
			t.Fatalf("sequence number %d, want %d again", seqOf(b), first)
		}
	}
}

// Nor does it where a window of 0 was probed.
func TestOldWindowAfterAProbeKeepsNothingBack(t *testing.T) {
	r := newACKRig(t, podPort, service)
	r.call.Write(make([]byte, 1000))
	b, _ := r.read()
	first := seqOf(b)
	window := func(n uint16) {
		b := segment(r.src, r.dst, flagACK, r.seq, r.ack, nil)
		setWindow(b, n)
		r.write(tun.Header{}, b)
	}
	window(0)
	for {
		if b, _ := r.read(); seqOf(b) == first-1 {
			break // the probe
		}
	}
	window(100)
	if b, _ := r.read(); seqOf(b) != first {
		t.Fatalf("sequence number %d, want %d again", seqOf(b), first)
	}
}
