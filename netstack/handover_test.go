package netstack

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tunnel/splice"
)

// packetPair are the two ends that an agent hands out.
func packetPair(t testing.TB, typ int) (yields, takes *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	yields, takes = os.NewFile(uintptr(fds[0]), "yields"), os.NewFile(uintptr(fds[1]), "takes")
	t.Cleanup(func() { yields.Close(); takes.Close() })
	return yields, takes
}

// sameDevice is another descriptor of d.
func sameDevice(t testing.TB, d *tun.Device) *tun.Device {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(d.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	other, err := tun.New(os.NewFile(uintptr(fd), "same"), tun.Options{MTU: d.MTU(), Offload: d.Offload()})
	if err != nil {
		t.Fatal(err)
	}
	return other
}

// succeed lets a new stack take the device over from old.
func succeed(t testing.TB, e *Engine, old *Stack, h *hooks, cfg StackConfig) *Stack {
	t.Helper()
	yields, takes := packetPair(t, unix.SOCK_SEQPACKET)
	dev := sameDevice(t, old.dev)
	if err := old.Yield(yields); err != nil {
		t.Fatal(err)
	}
	cfg.Name, cfg.Addrs, cfg.Predecessor = "test/pod", old.cfg.Addrs, takes
	s, err := e.Add(dev, cfg, h.serve)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// exchange sends both ways at once and compares.
func exchange(t *testing.T, why string, a, b *call, size int) {
	t.Helper()
	var wg sync.WaitGroup
	for _, d := range []struct {
		from, to *call
		seed     byte
	}{{a, b, 1}, {b, a, 2}} {
		want := bytes.Repeat([]byte{d.seed, 5, 7, 11, 13}, size/5+1)
		wg.Go(func() {
			if _, err := d.from.Write(want); err != nil {
				t.Errorf("%s: write: %v", why, err)
			}
		})
		wg.Go(func() {
			got := make([]byte, len(want))
			if _, err := io.ReadFull(struct{ io.Reader }{d.to}, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: read %v, equal %v", why, err, bytes.Equal(got, want))
			}
		})
	}
	wg.Wait()
}

// TestHandoverKeepsConnections over three generations, of both legs, in both
// directions, and lets new ones be made by the newest only.
func TestHandoverKeepsConnections(t *testing.T) {
	r := newRig(t, StackConfig{PortPart: 1})
	type pair struct{ a, b *call }
	var live []pair
	stacks := []*Stack{r.proxy}
	port := uint16(41000)
	connect := func(s *Stack, h *hooks) {
		t.Helper()
		port++
		accept, ch := accepting(t, s)
		tunnels := make(chan *call, 1)
		on(s, h, func(h *hooks) {
			h.tcp = accept
			h.tunnel = func(e splice.End, _, _ netip.AddrPort) { tunnels <- newCall(t, s.Loop(), e) }
		})
		app, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, port), service, patience)
		if err != nil {
			t.Fatal(err)
		}
		live = append(live, pair{app, <-ch})
		peer, err := dialOn(t, r.kernel, netip.AddrPortFrom(client.Addr(), port), netip.AddrPortFrom(pod, TunnelPort), patience)
		if err != nil {
			t.Fatal(err)
		}
		live = append(live, pair{peer, <-tunnels})
		// From no port in particular, as to a peer's tunnel.
		accept, ch = accepting(t, r.kernel)
		on(r.kernel, r.onPod, func(h *hooks) { h.tcp = accept })
		own, err := dialOn(t, s, netip.AddrPortFrom(pod, 0), service, patience)
		if err != nil {
			t.Fatal(err)
		}
		live = append(live, pair{own, <-ch})
	}
	connect(r.proxy, r.onProxy)
	for generation := 2; generation <= 3; generation++ {
		h := &hooks{t: t}
		s := succeed(t, r.engine, stacks[len(stacks)-1], h, StackConfig{PortPart: generation})
		stacks = append(stacks, s)
		connect(s, h)
		for _, p := range live {
			exchange(t, "after a handover", p.a, p.b, 300<<10)
		}
	}
	for i, s := range stacks {
		st := s.Stats()
		if handed := st.HandedOn > 0; handed != (i > 0) {
			t.Errorf("generation %d handed %d on", i+1, st.HandedOn)
		}
		if st.Stray != 0 || st.Malformed != 0 || st.BadHeader != 0 {
			t.Errorf("generation %d: %+v", i+1, st)
		}
	}
	// The first ends: what belonged to it is reset, all else lives.
	alone := stacks[1].Alone()
	select {
	case <-alone:
		t.Error("alone beside the first")
	default:
	}
	stacks[0].Close()
	<-alone
	for _, p := range live[3:] {
		exchange(t, "after the first's end", p.a, p.b, 1<<10)
	}
	if _, err := live[2].b.Read(make([]byte, 1)); !errors.Is(err, splice.ErrReset) {
		t.Errorf("a connection of the first: %v, want a reset", err)
	}
	stacks[2].Close() // The second reads again.
	for _, p := range live[3:6] {
		exchange(t, "after the third's end", p.a, p.b, 1<<10)
	}
	connect(stacks[1], stacks[1].handler.(*hooks))
	exchange(t, "a new one of the second", live[len(live)-1].a, live[len(live)-1].b, 1<<10)
}

// TestStrayAfterThePredecessorsEnd gets its RST, though nobody has noticed.
func TestStrayAfterThePredecessorsEnd(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	h := &hooks{t: t}
	s := succeed(t, r.stack.reader.engine, r.stack, h, StackConfig{})
	stray := segment(podPort, service, flagACK, 1000, 2000, []byte("secret"))
	r.write(tun.Header{}, stray)
	if b, _ := r.read(); flagsOf(b)&flagRST == 0 {
		t.Errorf("flags %#x of the predecessor, want a RST", flagsOf(b))
	}
	if s.Stats().Stray != 0 || r.stack.Stats().Stray != 1 {
		t.Errorf("stray: %d and %d, want none and 1", s.Stats().Stray, r.stack.Stats().Stray)
	}
	r.stack.Close()
	r.write(tun.Header{}, stray)
	if b, _ := r.read(); flagsOf(b)&flagRST == 0 {
		t.Errorf("flags %#x, want a RST", flagsOf(b))
	}
	if s.Stats().Stray != 1 {
		t.Errorf("stray: %d, want 1", s.Stats().Stray)
	}
}

// TestWithheldSYNGoesToTheSuccessor at once: its sender would repeat it only
// after a second. Who decides about it at the predecessor decides nothing.
func TestWithheldSYNGoesToTheSuccessor(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	first, second := make(chan *Request, 1), make(chan *Request, 2)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { first <- q } })
	syn := segment(podPort, service, flagSYN, 7, 0, nil)
	r.write(tun.Header{}, syn)
	q := <-first
	s := succeed(t, r.stack.reader.engine, r.stack, &hooks{t: t, tcp: func(q *Request) { second <- q }}, StackConfig{})
	got := <-second
	if got.Src() != podPort || got.Dst() != service {
		t.Errorf("request %v -> %v", got.Src(), got.Dst())
	}
	failed := make(chan error, 1)
	do(r.stack.Loop(), func() int { q.Accept(func(_ splice.End, err error) { failed <- err }); return 0 })
	if err := <-failed; err == nil {
		t.Error("both answered")
	}
	do(s.Loop(), func() int { got.Refuse(RefuseReset); return 0 })
	if b, _ := r.read(); flagsOf(b) != flagRST|flagACK || ackOf(b) != 8 {
		t.Errorf("flags %#x ack %d", flagsOf(b), ackOf(b))
	}
	if n := r.stack.Stats().Pending; n != 0 {
		t.Errorf("%d requests wait at the predecessor", n)
	}
}

// TestHeldSYNsGoToTheSuccessor also if they were asked about before, and
// refused without a word.
func TestHeldSYNsGoToTheSuccessor(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	first, second := make(chan *Request, 1), make(chan netip.AddrPort, 4)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { first <- q } })
	r.write(tun.Header{}, segment(podPort, service, flagSYN, 7, 0, nil))
	q := <-first
	r.stack.Hold()
	do(r.stack.Loop(), func() int { q.Refuse(RefuseSilent); return 0 })
	r.stack.StopAccepting()
	r.write(tun.Header{}, segment(client, netip.AddrPortFrom(pod, 80), flagSYN, 7, 0, nil))
	r.write(tun.Header{}, segment(client, netip.AddrPortFrom(pod, TunnelPort), flagSYN, 7, 0, nil))
	r.sync()
	if b, _, ok := r.tryRead(0); ok {
		t.Errorf("answered: % x", b)
	}
	succeed(t, r.stack.reader.engine, r.stack, &hooks{t: t, tcp: func(q *Request) { second <- q.Src() }}, StackConfig{})
	got := map[netip.AddrPort]bool{<-second: true, <-second: true}
	if !got[podPort] || !got[client] {
		t.Errorf("requests of %v", got)
	}
	if b, _ := r.read(); flagsOf(b) != flagSYN|flagACK {
		t.Errorf("flags %#x of the successor's listener", flagsOf(b))
	}
}

// TestAcceptAnswersWhatWasHeld once.
func TestAcceptAnswersWhatWasHeld(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	asked := make(chan *Request, 2)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { asked <- q } })
	r.stack.StopAccepting()
	syn := segment(podPort, service, flagSYN, 7, 0, nil)
	r.write(tun.Header{}, syn)
	r.write(tun.Header{}, syn)
	r.sync()
	if len(asked) != 0 {
		t.Error("asked while nothing is accepted")
	}
	do(r.stack.Loop(), func() int { r.stack.Accept(); return 0 })
	<-asked
	r.sync()
	if len(asked) != 0 {
		t.Error("asked twice")
	}
}

// TestNothingComesBackFromThePredecessor but a SYN: what the two sent each
// other would never end.
func TestNothingComesBackFromThePredecessor(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	yields, takes := packetPair(t, unix.SOCK_SEQPACKET)
	asked := make(chan *Request, 1)
	s, err := r.stack.reader.engine.Add(sameDevice(t, r.stack.dev), StackConfig{
		Name: "test/pod", Addrs: r.stack.cfg.Addrs, Predecessor: takes,
	}, (&hooks{t: t, tcp: func(q *Request) { asked <- q }}).serve)
	if err != nil {
		t.Fatal(err)
	}
	r.stack.StopReading()
	send := func(b []byte) {
		t.Helper()
		if _, err := yields.Write(append(make([]byte, tun.HeaderSize), b...)); err != nil {
			t.Fatal(err)
		}
	}
	send(segment(podPort, service, flagACK, 1000, 2000, []byte("x")))
	send(appendUDP(nil, podPort, service, []byte("x")))
	yields.Write([]byte("x"))
	send(segment(podPort, service, flagSYN, 7, 0, nil))
	<-asked
	if st := s.Stats(); st.HandedOn != 0 || st.Malformed != 2 || st.BadHeader != 1 {
		t.Errorf("%+v", st)
	}
}

// TestHandOnNeverWaits for a predecessor that does not read.
func TestHandOnNeverWaits(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	_, takes := packetPair(t, unix.SOCK_SEQPACKET)
	s, err := r.stack.reader.engine.Add(sameDevice(t, r.stack.dev), StackConfig{
		Name: "test/pod", Addrs: r.stack.cfg.Addrs, Predecessor: takes,
	}, (&hooks{t: t}).serve)
	if err != nil {
		t.Fatal(err)
	}
	r.stack.StopReading()
	for range 100 {
		r.write(tun.Header{}, segment(podPort, service, flagACK, 1000, 2000, make([]byte, 8000)))
		r.sync()
	}
	if st := s.Stats(); st.HandOnFailed == 0 || st.HandedOn == 0 || st.Stray != 0 {
		t.Errorf("%+v", st)
	}
}

// TestWhatCameBetweenTheTwoIsHandled and not dropped.
func TestWhatCameBetweenTheTwoIsHandled(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	yields, takes := packetPair(t, unix.SOCK_SEQPACKET)
	if err := r.stack.Yield(yields); err != nil {
		t.Fatal(err)
	}
	r.write(tun.Header{}, segment(podPort, service, flagACK, 1000, 2000, nil))
	_, err := r.stack.reader.engine.Add(sameDevice(t, r.stack.dev), StackConfig{
		Name: "test/pod", Addrs: r.stack.cfg.Addrs, Predecessor: takes,
	}, (&hooks{t: t}).serve)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := r.read(); flagsOf(b)&flagRST == 0 {
		t.Errorf("flags %#x, want a RST", flagsOf(b))
	}
}

func TestYieldRefuses(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	yields, _ := packetPair(t, unix.SOCK_DGRAM)
	if err := r.stack.Yield(yields); err == nil {
		t.Error("a socket that does not tell of its other end's end was taken")
	}
	if err := r.stack.Yield(nil); err == nil {
		t.Error("no socket was taken")
	}
	r.write(tun.Header{}, segment(podPort, service, flagACK, 1000, 2000, nil))
	r.read() // It still reads the device.
	r.stack.Close()
	yields, _ = packetPair(t, unix.SOCK_SEQPACKET)
	if err := r.stack.Yield(yields); !errors.Is(err, errClosed) {
		t.Errorf("yield of a closed stack: %v", err)
	}
}

// TestResumedAfterTheSuccessorsEnd also when it never began, and tells.
func TestResumedAfterTheSuccessorsEnd(t *testing.T) {
	resumed := make(chan struct{})
	r := newRawRig(t, StackConfig{Resumed: func() { close(resumed) }})
	yields, takes := packetPair(t, unix.SOCK_SEQPACKET)
	if err := r.stack.Yield(yields); err != nil {
		t.Fatal(err)
	}
	r.write(tun.Header{}, segment(podPort, service, flagACK, 1000, 2000, nil))
	if _, _, ok := r.tryRead(20 * time.Millisecond); ok {
		t.Error("the device was read after a yield")
	}
	takes.Close()
	<-resumed
	if b, _ := r.read(); flagsOf(b)&flagRST == 0 {
		t.Errorf("flags %#x, want a RST", flagsOf(b))
	}
}

// TestErrorGoesToThePredecessor whose connection it is about.
func TestErrorGoesToThePredecessor(t *testing.T) {
	r := newRawRig(t, StackConfig{})
	done := make(chan error, 1)
	do(r.stack.Loop(), func() int {
		r.stack.Dial(podPort, service, patience, func(_ splice.End, err error) { done <- err })
		return 0
	})
	b, _ := r.read()
	quoted := append([]byte(nil), b[:28]...)
	s := succeed(t, r.stack.reader.engine, r.stack, &hooks{t: t}, StackConfig{})
	b = appendUnreachable(nil, netip.MustParseAddr("10.0.0.254"), pod, false, quoted)
	do(s.Loop(), func() int {
		s.deliverError(b, networkProtocol(pod), ipv4Quote)
		return 0
	})
	if err := <-done; !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("dial = %v, want EHOSTUNREACH", err)
	}
}

// TestBypassedFlowOfThePredecessor stays forwarded, and its proxied ones are
// not taken for bypassed.
func TestBypassedFlowOfThePredecessor(t *testing.T) {
	r := newRawRig(t, StackConfig{BypassInbound: true})
	app := netip.AddrPortFrom(pod, 80)
	syn := segment(client, app, flagSYN, 7, 0, nil)
	r.write(tun.Header{}, syn)
	r.read()
	s := succeed(t, r.stack.reader.engine, r.stack, &hooks{t: t}, StackConfig{BypassInbound: true})
	for _, b := range [][]byte{
		segment(app, client, flagSYN|flagACK, 1, 8, nil), segment(client, app, flagACK, 8, 2, []byte("x")),
	} {
		r.write(tun.Header{}, b)
		if got, _ := r.read(); !bytes.Equal(got, b) {
			t.Errorf("came out as % x, went in as % x", got, b)
		}
	}
	do(s.Loop(), func() int { return 0 })
	if got := s.Stats().Forwarded; got != 0 {
		t.Errorf("the successor forwarded %d itself, of which it knows nothing", got)
	}
}

func TestPortsOfGenerationsDiffer(t *testing.T) {
	for part := 1; part <= PortParts; part++ {
		r := newRawRig(t, StackConfig{PortPart: part})
		do(r.stack.Loop(), func() int {
			for range 5000 {
				own, err := r.stack.freePort(netip.AddrPortFrom(pod, 0), service)
				if err != nil || (int(own.Port())-firstPort)%PortParts != part%PortParts {
					t.Fatalf("part %d: port %v, %v", part, own, err)
				}
			}
			return 0
		})
	}
}

// againAfter is when TCP would send a segment again.
const againAfter = 200 * time.Millisecond

// FuzzPacketSockets: whatever comes from either side, nothing panics, and the
// stack still works.
func FuzzPacketSockets(f *testing.F) {
	syn := segment(podPort, service, flagSYN, 7, 0, nil)
	for _, b := range [][]byte{
		nil, {0}, make([]byte, tun.HeaderSize), syn, append(make([]byte, tun.HeaderSize), syn...),
		append([]byte{tun.NeedsChecksum, tun.GSOTCPv4, 40, 0, 100, 0, 20, 0, 16, 0}, syn...),
		append(make([]byte, tun.HeaderSize), appendUnreachable(nil, pod, service.Addr(), false, syn[:28])...),
	} {
		f.Add(b, true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, b []byte, up bool) {
		r := newRawRig(t, StackConfig{})
		s := succeed(t, r.stack.reader.engine, r.stack, &hooks{t: t, tcp: func(q *Request) { q.Refuse(RefuseSilent) }}, StackConfig{})
		fd := do(s.Loop(), func() int { return s.before.FD() })
		if up {
			fd = do(r.stack.Loop(), func() int { return r.stack.source.FD() })
		}
		if len(b) > 0 && unix.Send(fd, b, unix.MSG_DONTWAIT) != nil {
			t.Skip("longer than the socket takes")
		}
		stray := segment(podPort, service, flagACK, 1000, 2000, nil)
		// What came before may have been answered too. And what a stack had been handed
		// when its socket ended is lost: TCP sends it again.
		for end := time.Now().Add(patience); time.Now().Before(end); {
			r.write(tun.Header{}, stray)
			for got, _, ok := r.tryRead(againAfter); ok; got, _, ok = r.tryRead(againAfter) {
				if flagsOf(got)&flagRST != 0 && seqOf(got) == 2000 {
					return
				}
			}
		}
		t.Error("no RST for a segment of no connection")
	})
}
