package podnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

// answerSYN does what a proxy does to accept the pod's connection: it waits for the SYN at the device and answers it.
func (e *env) answerSYN(to netip.AddrPort) (app netip.AddrPort) {
	e.t.Helper()
	netnstest.Eventually(e.t, "SYN at the device", func() bool { return len(e.dev.matching(packetTo(to))) > 0 })
	syn := e.dev.matching(packetTo(to))[0]
	p, _ := parsePacket(syn)
	e.dev.inject(e.t, tcpPacket(to, p.src, flagSYN|flagACK, 1000, seqOf(syn)+1, ""))
	return p.src
}

func seqOf(b []byte) uint32 {
	at := 20
	if b[0]>>4 == 6 {
		at = 40
	}
	return uint32(b[at+4])<<24 | uint32(b[at+5])<<16 | uint32(b[at+6])<<8 | uint32(b[at+7])
}

// proxied opens a connection of the pod that only the device's reader knows of.
func (e *env) proxied(to netip.AddrPort) net.Conn {
	e.t.Helper()
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result, 1)
	go func() {
		c, err := e.pod.Dial("tcp", to.String(), 10*time.Second)
		done <- result{c, err}
	}()
	e.answerSYN(to)
	r := <-done
	if r.err != nil {
		e.t.Fatal(r.err)
	}
	e.t.Cleanup(func() { _ = r.c.Close() })
	return r.c
}

// injected is a connection to the pod's app that the proxy made with a client's address.
func (e *env) injected(l net.Listener, from netip.AddrPort) net.Conn {
	e.t.Helper()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	e.dev.inject(e.t, tcpPacket(from, to, flagSYN, 5000, 0, ""))
	synAck := func(b []byte) bool {
		p, ok := parsePacket(b)
		return ok && p.dst == from && p.flags == flagSYN|flagACK
	}
	netnstest.Eventually(e.t, "SYN-ACK at the device", func() bool { return len(e.dev.matching(synAck)) > 0 })
	e.dev.inject(e.t, tcpPacket(from, to, flagACK, 5001, seqOf(e.dev.matching(synAck)[0])+1, ""))
	c, err := l.Accept()
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = c.Close() })
	return c
}

// forward makes the device's reader do what the proxy does with older flows: give their packets back.
func (e *env) forward(older []Flow) {
	e.dev.setForward(func(b []byte) bool {
		p, ok := parsePacket(b)
		for _, f := range older {
			if ok && (p.src == f.Local && p.dst == f.Remote || p.src == f.Remote && p.dst == f.Local) {
				return true
			}
		}
		return false
	})
}

// live opens a connection from the pod to an echo server before anything is attached.
func (e *env) live(v int) net.Conn {
	e.t.Helper()
	l := e.peer.Listen("tcp", netip.AddrPortFrom(farAddr[v], 7).String())
	echo(e.t, l)
	c, err := e.pod.Dial("tcp", l.Addr().String(), 5*time.Second)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { _ = c.Close() })
	e.exchange(c, "before")
	return c
}

func (e *env) exchange(c net.Conn, text string) {
	e.t.Helper()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		e.t.Fatalf("write %q: %v", text, err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		e.t.Fatalf("read back %q, %v; want %q", got, err, text)
	}
}

func TestOlderFlowsLiveOn(t *testing.T) {
	for _, v := range bothFamilies {
		t.Run(fmt.Sprintf("IPv%d", v), func(t *testing.T) {
			e := newEnv(t)
			c := e.live(v)
			in := e.pod.Listen("tcp", netip.AddrPortFrom(podAddr[v], 7).String())
			echo(t, in)
			back, err := e.peer.Dial("tcp", in.Addr().String(), 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = back.Close() }()
			e.exchange(back, "before")
			// Loopback flows and listening sockets are nobody's business.
			own := e.pod.Listen("tcp", netip.AddrPortFrom(podAddr[v], 8).String())
			self, err := e.pod.Dial("tcp", own.Addr().String(), 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = self.Close() }()
			// A flow that is still asked for will be asked for again.
			if err := e.connect(e.pod, netip.AddrPortFrom(netip.MustParseAddr(map[int]string{4: "10.1.0.77", 6: "fd01::77"}[v]), 9)); err != nil {
				t.Fatal(err)
			}

			e.attach(Config{})
			older := e.a.Older()
			want := map[netip.AddrPort]bool{
				c.LocalAddr().(*net.TCPAddr).AddrPort(): true, in.Addr().(*net.TCPAddr).AddrPort(): true,
			}
			for _, f := range older {
				if !want[f.Local] || f.Cookie == 0 {
					t.Errorf("unexpected older flow %+v", f)
				}
			}
			if len(older) != 2 {
				t.Fatalf("older flows = %v, want 2", older)
			}
			e.forward(older)
			e.exchange(c, "after attach")
			e.exchange(back, "after attach, inbound")
			if e.onDevice(netip.AddrPortFrom(farAddr[v], 7)) == 0 {
				t.Error("an older flow does not cross the device")
			}

			// A restart keeps those that are still there, and lists no new one.
			e.proxied(netip.AddrPortFrom(farAddr[v], 80))
			_ = back.Close()
			netnstest.Eventually(t, "the closed flow ends", func() bool {
				a, err := Resume(t.Context(), e.pod.File(), Config{}, e.a.State())
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = a.Close() }()
				still := a.Older()
				return len(still) == 1 && still[0].Local == c.LocalAddr().(*net.TCPAddr).AddrPort()
			})
			// Without its state nothing may pass for older.
			e.dev.close()
			a, err := Attach(t.Context(), e.pod.File(), Config{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _, _ = a.Close(), a.File.Close() }()
			if len(a.Older()) != 0 {
				t.Errorf("older flows without a state = %v", a.Older())
			}
		})
	}
}

func TestDetachLetsNoProxiedSegmentOut(t *testing.T) {
	for _, v := range bothFamilies {
		t.Run(fmt.Sprintf("IPv%d", v), func(t *testing.T) { testDetach(t, v, true) })
		// Shows that the test would see such a segment.
		t.Run(fmt.Sprintf("IPv%d without destroying sockets", v), func(t *testing.T) { testDetach(t, v, false) })
	}
}

func testDetach(t *testing.T, v int, destroy bool) {
	e := newEnv(t)
	old := e.live(v)
	e.attach(Config{})
	e.forward(e.a.Older())

	far := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(farAddr[v], port) }
	established := e.proxied(far(80))
	orphan := e.proxied(far(81))
	if _, err := io.WriteString(orphan, "unsent"); err != nil {
		t.Fatal(err)
	}
	_ = orphan.Close()
	if err := e.connect(e.pod, far(82)); err != nil { // SYN_SENT
		t.Fatal(err)
	}
	l := e.pod.Listen("tcp", netip.AddrPortFrom(podAddr[v], 8080).String())
	client := far(40000)
	accepted := e.injected(l, client)
	loop, err := e.pod.Dial("tcp", l.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = loop.Close() }()

	ports := []netip.AddrPort{far(80), far(81), far(82), client}
	for _, to := range ports {
		if n := e.onWire(to); n != 0 {
			t.Fatalf("%d packets to %v on the wire before detach", n, to)
		}
	}
	if !destroy {
		w, err := e.a.kernel.observe(t.Context())
		if err == nil {
			err = e.a.kernel.strip(t.Context(), &e.a.cfg, w)
		}
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(established, "plain")
		e.wire.Wait(t, "a proxied segment in plain text", packetTo(far(80)))
		return
	}

	called := false
	err = Detach(t.Context(), e.pod.File(), e.a.State(), func(context.Context) error {
		called = true
		if err := e.a.Verify(t.Context()); err != nil {
			t.Error("capture was not in force any more when the proxy was asked to reset:", err)
		}
		return nil // a proxy that resets nothing
	})
	if err != nil {
		t.Fatal(allOf(err))
	}
	if !called {
		t.Error("the proxy was not asked")
	}
	for _, c := range []net.Conn{established, accepted} {
		if _, err := io.WriteString(c, "secret"); !errors.Is(err, unix.ECONNABORTED) && !errors.Is(err, unix.EPIPE) {
			t.Errorf("write to a proxied flow after detach = %v", err)
		}
	}
	for _, to := range ports {
		if n := len(e.wire.Packets(packetTo(to))); n != 0 {
			t.Errorf("%d packets of a proxied flow to %v left", n, to)
		}
	}
	e.exchange(old, "after detach")
	if _, err := io.WriteString(loop, "x"); err != nil {
		t.Error("a loopback flow was cut:", err)
	}
	sockets, err := e.a.kernel.flows(t.Context(), &world{families: e.a.kernel.families()})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sockets {
		if s.Remote.Addr() == farAddr[v] && s.Remote.Port() != 7 {
			t.Errorf("socket left: %+v", s.Flow)
		}
	}
	// New connections go out in plain text, as of any pod that is not in the mesh.
	if err := e.connect(e.pod, far(90)); err != nil {
		t.Fatal(err)
	}
	e.wire.Wait(t, "SYN on the wire", packetTo(far(90)))
}

func TestDetachStopsIfTheProxyCannotReset(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	broken := errors.New("broken")
	if err := Detach(t.Context(), e.pod.File(), e.a.State(), func(context.Context) error { return broken }); !errors.Is(err, broken) {
		t.Fatalf("Detach = %v, want the callback's error", err)
	}
	if err := e.a.Verify(t.Context()); err != nil {
		t.Error("capture was ended:", err)
	}
}

// Where the kernel cannot destroy sockets, detach waits for them, and else leaves capture in force.
func TestDetachWithoutSocketDestroy(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	c := e.proxied(netip.AddrPortFrom(farAddr[4], 80))
	k := e.a.kernel
	w, err := k.observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	asked := 0
	k.denyDestroy = func() error {
		if err := e.connect(e.pod, netip.AddrPortFrom(farAddr[4], 81)); err == nil {
			t.Error("something new can begin while sockets are waited for")
		}
		if asked++; asked == 3 {
			cancel() // it does wait
		}
		return unix.EOPNOTSUPP
	}
	err = k.endFlows(ctx, w, nil)
	var left *SocketsError
	if !errors.As(err, &left) || !left.Unsupported || len(left.Left) == 0 {
		t.Fatalf("endFlows = %v, want a SocketsError that names the kernel's lack", err)
	}
	if err := e.a.Verify(t.Context()); err != nil {
		t.Error("capture did not come back:", allOf(err))
	}
	// Once the socket ends by itself, so does the wait.
	if err := c.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if err := k.endFlows(t.Context(), w, nil); err != nil {
		t.Fatal(err)
	}
}
