package netstack

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
	"github.com/ztun/ztun/tunnel/splice"
)

func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 4)) // two readers and two more
	goleak.VerifyTestMain(m)
}

const patience = 30 * time.Second

var (
	pod     = netip.MustParseAddr("10.0.0.1")
	pod6    = netip.MustParseAddr("fd00::1")
	service = netip.MustParseAddrPort("10.96.0.10:80")
	client  = netip.MustParseAddrPort("10.0.0.7:4711")
)

// hooks is a Handler made of functions; what is nil is not expected.
type hooks struct {
	t      *testing.T
	tcp    func(*Request)
	tunnel func(end splice.End, remote, local netip.AddrPort)
	udp    func(*Datagram)
}

func (h *hooks) serve(*Stack) (Handler, error) { return h, nil }

func (h *hooks) HandleTCP(r *Request) {
	if h.tcp == nil {
		h.t.Errorf("unexpected request %v -> %v", r.Src(), r.Dst())
		r.Refuse(RefuseSilent)
		return
	}
	h.tcp(r)
}

func (h *hooks) HandleTunnel(end splice.End, remote, local netip.AddrPort) {
	if h.tunnel == nil {
		h.t.Errorf("unexpected tunnel from %v", remote)
		end.Reset(nil)
		return
	}
	h.tunnel(end, remote, local)
}

func (h *hooks) HandleUDP(d *Datagram) {
	if h.udp == nil {
		h.t.Errorf("unexpected datagram %v -> %v", d.Src, d.Dst)
		return
	}
	h.udp(d)
}

// rig is a proxy's stack and, at the other end of its device, a stack that
// plays the pod's kernel together with the network behind it.
type rig struct {
	t              *testing.T
	engine         *Engine
	proxy, kernel  *Stack
	onProxy, onPod *hooks
}

func newRig(t *testing.T, cfg StackConfig) *rig {
	t.Helper()
	return newRigWithMTU(t, cfg, 1500)
}

func newRigWithMTU(t *testing.T, cfg StackConfig, mtu uint32) *rig {
	t.Helper()
	// No kernel cuts the super-segments, but a socket pair has no MTU either.
	a, b := tuntest.Pair(t, tun.Options{MTU: mtu, Offload: true})
	e, err := New(Config{Readers: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	r := &rig{t: t, engine: e, onProxy: &hooks{t: t}, onPod: &hooks{t: t}}
	if cfg.Addrs == nil {
		cfg.Addrs = []netip.Addr{pod, pod6}
	}
	cfg.Name = "test/pod"
	if r.proxy, err = e.Add(a, cfg, r.onProxy.serve); err != nil {
		t.Fatal(err)
	}
	if r.kernel, err = e.Add(b, StackConfig{Name: "kernel", Addrs: cfg.Addrs}, r.onPod.serve); err != nil {
		t.Fatal(err)
	}
	return r
}

// on sets what a side's handler does, on its loop.
func on(s *Stack, h *hooks, set func(h *hooks)) {
	do(s.Loop(), func() int { set(h); return 0 })
}

// call is a connection made by the kernel's side, used by test goroutines: one
// may read while another writes.
type call struct {
	t    *testing.T
	loop splice.Loop
	end  splice.End

	// Owned by the loop.
	wake chan struct{} // closed, and replaced, when the end changed
}

func newCall(t *testing.T, loop splice.Loop, end splice.End) *call {
	c := &call{t: t, loop: loop, end: end, wake: make(chan struct{})}
	loop.Post(func() {
		end.Notify(func() {
			close(c.wake)
			c.wake = make(chan struct{})
		})
	})
	return c
}

func do[T any](loop splice.Loop, f func() T) T {
	ch := make(chan T, 1)
	loop.Post(func() { ch <- f() })
	return <-ch
}

type ioResult struct {
	n   int
	err error
}

// block repeats f on the loop until it does not say ErrAgain.
func (c *call) block(f func() (int, error)) (int, error) {
	deadline := time.After(patience)
	for {
		var wake chan struct{}
		r := do(c.loop, func() ioResult {
			wake = c.wake
			n, err := f()
			return ioResult{n, err}
		})
		if r.n > 0 || !errors.Is(r.err, splice.ErrAgain) {
			if errors.Is(r.err, splice.ErrAgain) {
				r.err = nil
			}
			return r.n, r.err
		}
		select {
		case <-wake:
		case <-deadline:
			return 0, errors.New("test: no progress")
		}
	}
}

func (c *call) Read(p []byte) (int, error) {
	return c.block(func() (int, error) { return c.end.Read(p) })
}

func (c *call) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := c.block(func() (int, error) { return c.end.Write(p[done:]) })
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (c *call) CloseWrite() error { return do(c.loop, c.end.CloseWrite) }
func (c *call) Reset()            { do(c.loop, func() int { c.end.Reset(nil); return 0 }) }
func (c *call) Close()            { do(c.loop, func() int { c.end.Close(); return 0 }) }

type dialled struct {
	end splice.End
	err error
}

func dialOn(t *testing.T, s *Stack, src, dst netip.AddrPort, timeout time.Duration) (*call, error) {
	t.Helper()
	ch := make(chan dialled, 1)
	s.Loop().Post(func() {
		s.Dial(src, dst, timeout, func(e splice.End, err error) { ch <- dialled{e, err} })
	})
	select {
	case d := <-ch:
		if d.err != nil {
			return nil, d.err
		}
		return newCall(t, s.Loop(), d.end), nil
	case <-time.After(patience):
		t.Fatal("dial never ended")
		return nil, nil
	}
}

// accepting makes a handler that accepts and hands the calls over.
func accepting(t *testing.T, s *Stack) (func(*Request), chan *call) {
	ch := make(chan *call, 64)
	return func(r *Request) {
		r.Accept(func(e splice.End, err error) {
			if err != nil {
				t.Errorf("accept: %v", err)
				return
			}
			ch <- newCall(t, s.Loop(), e)
		})
	}, ch
}

func (r *rig) establish(src, dst netip.AddrPort) (app, proxy *call) {
	r.t.Helper()
	accept, ch := accepting(r.t, r.proxy)
	on(r.proxy, r.onProxy, func(h *hooks) { h.tcp = accept })
	app, err := dialOn(r.t, r.kernel, src, dst, patience)
	if err != nil {
		r.t.Fatalf("dial %v: %v", dst, err)
	}
	select {
	case proxy = <-ch:
	case <-time.After(patience):
		r.t.Fatal("no request")
	}
	return app, proxy
}

func TestOutboundConnection(t *testing.T) {
	for _, c := range []struct{ name, src, dst string }{
		{"v4", "10.0.0.1:0", "10.96.0.10:80"},
		{"v6", "[fd00::1]:0", "[fd00:96::10]:80"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, StackConfig{})
			app, proxy := r.establish(netip.MustParseAddrPort(c.src), netip.MustParseAddrPort(c.dst))
			if _, err := app.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 16)
			n, err := proxy.Read(b)
			if string(b[:n]) != "hello" || err != nil {
				t.Fatalf("proxy read %q, %v", b[:n], err)
			}
			// Half-close: the app ends its side, and still hears.
			app.CloseWrite()
			if _, err := proxy.Read(b); err != io.EOF {
				t.Fatalf("proxy read after FIN: %v, want EOF", err)
			}
			proxy.Write([]byte("bye"))
			proxy.CloseWrite()
			got, err := io.ReadAll(app)
			if string(got) != "bye" || err != nil {
				t.Fatalf("app read %q, %v", got, err)
			}
			app.Close()
			proxy.Close()
		})
	}
}

func TestBulkArrivesIntact(t *testing.T) {
	r := newRig(t, StackConfig{})
	bulk(r, 64<<20)
}

// A flow for which hardly any memory was left is slow, and that is all. It once
// began with the window of a larger buffer, and two of a kind stopped each other.
func TestBulkThroughTheSmallestBuffers(t *testing.T) {
	for _, mtu := range []uint32{1500, 9000} {
		t.Run(fmt.Sprintf("MTU %d", mtu), func(t *testing.T) {
			r := newRigWithMTU(t, StackConfig{}, mtu)
			for _, s := range []*Stack{r.proxy, r.kernel} {
				do(s.Loop(), func() int { s.take(s.limits.Memory - 2*minBuffer); return 0 })
			}
			app, proxy := bulk(r, 1<<20)
			for _, c := range []*call{app, proxy} {
				if size := c.end.(*Flow).size; size != minBuffer {
					t.Errorf("a buffer of %d bytes, want %d", size, minBuffer)
				}
			}
		})
	}
}

// bulk sends size bytes each way over a new connection.
func bulk(r *rig, size int) (app, proxy *call) {
	t := r.t
	t.Helper()
	app, proxy = r.establish(netip.AddrPortFrom(pod, 0), service)
	var wg sync.WaitGroup
	for _, way := range []struct{ from, to *call }{{app, proxy}, {proxy, app}} {
		sent, got := new([32]byte), new([32]byte)
		wg.Go(func() {
			h := sha256.New()
			src := rand.NewChaCha8([32]byte{1})
			b := make([]byte, 256<<10)
			for left := size; left > 0; {
				n := min(left, 1+rand.IntN(len(b)))
				src.Read(b[:n])
				h.Write(b[:n])
				if _, err := way.from.Write(b[:n]); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				left -= n
			}
			way.from.CloseWrite()
			*sent = [32]byte(h.Sum(nil))
		})
		wg.Go(func() {
			h := sha256.New()
			n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{way.to}, make([]byte, 128<<10))
			if n != int64(size) || err != nil {
				t.Errorf("read %d bytes, %v", n, err)
			}
			*got = [32]byte(h.Sum(nil))
		})
		defer func() {
			if *sent != *got {
				t.Error("bytes differ")
			}
		}()
	}
	wg.Wait()
	return app, proxy
}

func TestRefusalsAreTruthful(t *testing.T) {
	for _, c := range []struct {
		name string
		how  Refusal
		want error
	}{
		{"reset", RefuseReset, syscall.ECONNREFUSED},
		{"unreachable", RefuseUnreachable, syscall.EHOSTUNREACH},
		{"silent", RefuseSilent, syscall.ETIMEDOUT},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, StackConfig{})
			on(r.proxy, r.onProxy, func(h *hooks) { h.tcp = func(q *Request) { q.Refuse(c.how) } })
			_, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, 0), service, 300*time.Millisecond)
			want := c.want
			if c.how == RefuseUnreachable {
				// The other stack takes no ICMP, as designed; the netns tests show
				// what a kernel makes of it.
				want = syscall.ETIMEDOUT
			}
			if !errors.Is(err, want) {
				t.Errorf("dial: %v, want %v", err, want)
			}
		})
	}
}

func TestResetStaysReset(t *testing.T) {
	for _, halfClosed := range []bool{false, true} {
		r := newRig(t, StackConfig{})
		app, proxy := r.establish(netip.AddrPortFrom(pod, 0), service)
		if halfClosed {
			app.CloseWrite()
			if _, err := proxy.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal(err)
			}
		}
		app.Write(nil)
		app.Reset()
		deadline := time.Now().Add(patience)
		for {
			err := do(proxy.loop, proxy.end.(splice.Failer).Failure)
			if errors.Is(err, splice.ErrReset) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("half-closed %v: failure is %v, want a reset", halfClosed, err)
			}
			<-time.After(time.Millisecond)
		}
	}
}

func TestInboundIsDialledWithClientsAddress(t *testing.T) {
	r := newRig(t, StackConfig{})
	accept, ch := accepting(t, r.kernel)
	var seen netip.AddrPort
	on(r.kernel, r.onPod, func(h *hooks) { h.tcp = func(q *Request) { seen = q.Src(); accept(q) } })
	proxy, err := dialOn(t, r.proxy, client, netip.AddrPortFrom(pod, 8080), patience)
	if err != nil {
		t.Fatal(err)
	}
	app := <-ch
	if seen != client {
		t.Errorf("app saw %v, want %v", seen, client)
	}
	app.Write([]byte("x"))
	if n, err := proxy.Read(make([]byte, 9)); n != 1 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
}

func TestTunnelPortIsAccepted(t *testing.T) {
	r := newRig(t, StackConfig{})
	ch := make(chan *call, 1)
	on(r.proxy, r.onProxy, func(h *hooks) {
		h.tunnel = func(e splice.End, remote, local netip.AddrPort) {
			if remote != client || local != netip.AddrPortFrom(pod, TunnelPort) {
				t.Errorf("tunnel %v -> %v", remote, local)
			}
			ch <- newCall(t, r.proxy.Loop(), e)
		}
	})
	peer, err := dialOn(t, r.kernel, client, netip.AddrPortFrom(pod, TunnelPort), patience)
	if err != nil {
		t.Fatal(err)
	}
	tunnel := <-ch
	peer.Write([]byte("abc"))
	b := make([]byte, 8)
	n, err := tunnel.Read(b)
	if !bytes.Equal(b[:n], []byte("abc")) || err != nil {
		t.Errorf("read %q, %v", b[:n], err)
	}
}
