package netstack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
	"github.com/ztun/ztun/tunnel/splice"
)

// echo answers what it reads on the loop until the flow ends.
func echo(end splice.End) {
	buf := make([]byte, 32<<10)
	var rest []byte
	end.Notify(func() {
		for {
			if len(rest) > 0 {
				n, err := end.Write(rest)
				if rest = rest[n:]; err != nil {
					return
				}
			}
			n, err := end.Read(buf)
			if errors.Is(err, io.EOF) {
				end.CloseWrite()
				end.Close()
				return
			}
			if err != nil {
				if !errors.Is(err, splice.ErrAgain) {
					end.Reset(nil)
				}
				return
			}
			rest = buf[:n]
		}
	})
}

func acceptEcho(q *Request) {
	q.Accept(func(e splice.End, err error) {
		if err == nil {
			echo(e)
		}
	})
}

// pingPong exchanges small messages until stop says so.
func pingPong(c *call, stop *atomic.Bool) error {
	b := make([]byte, 64)
	for !stop.Load() {
		if _, err := c.Write(b); err != nil {
			return err
		}
		if _, err := io.ReadFull(struct{ io.Reader }{c}, b); err != nil {
			return err
		}
	}
	return nil
}

// rule 1: a busy reader and one that sleeps let the garbage collector stop the
// world. A loop of nothing but raw waits held it up for 4-60 s.
func TestReadersDoNotHoldUpTheCollector(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.proxy, r.onProxy, func(h *hooks) { h.tcp = acceptEcho })
	c, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, 0), service, patience)
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := pingPong(c, &stop); err != nil {
			t.Error(err)
		}
	})
	done := make(chan struct{})
	go func() {
		for range 20 {
			runtime.GC()
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Error("20 collections took more than 30 s")
	}
	stop.Store(true)
	wg.Wait()
}

// rule 2: an ICMP error about a flow whose endpoint the batch has locked must
// not meet that lock. It deadlocked the prototype's reader for ever.
func TestICMPAmongSegmentsDoesNotDeadlock(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.proxy, r.onProxy, func(h *hooks) { h.tcp = acceptEcho })
	src := netip.AddrPortFrom(pod, 41000)
	c, err := dialOn(t, r.kernel, src, service, patience)
	if err != nil {
		t.Fatal(err)
	}
	quoted := segment(service, src, flagACK, 1, 1, nil)[:28]
	icmp := appendUnreachable(nil, netip.MustParseAddr("10.0.0.254"), service.Addr(), false, quoted)
	// Fragmentation needed, with ever smaller MTUs: for each gVisor takes the lock.
	tooBig := func(mtu uint16) []byte {
		e := icmp[ipv4HeaderMin:]
		e[1], e[2], e[3] = 4, 0, 0
		binary.BigEndian.PutUint16(e[6:], mtu)
		binary.BigEndian.PutUint16(e[2:], ^fold(sum(e, 0)))
		return icmp
	}
	fragment := segment(src, service, flagACK, 1, 1, make([]byte, 64))
	fragment[6] |= 0x20 // more fragments
	h := fragment[:20]
	h[10], h[11] = 0, 0
	s := ^fold(sum(h, 0))
	h[10], h[11] = byte(s>>8), byte(s)
	msg := bytes.Repeat([]byte("x"), 4096)
	for i := range 300 {
		do(c.loop, func() int {
			c.end.Write(msg[:2048])
			r.kernel.dev.Write(tun.Header{}, tooBig(1400-uint16(i)))
			r.kernel.dev.Write(tun.Header{}, fragment)
			c.end.Write(msg[2048:])
			return 0
		})
		if _, err := io.ReadFull(struct{ io.Reader }{c}, msg); err != nil {
			t.Fatal(err)
		}
	}
}

// rule 3: a RST right behind data reaches the far end every time. Without the
// whole tail of handleConnected 49 of 60 hung.
func TestEveryResetBehindDataArrives(t *testing.T) {
	r := newRig(t, StackConfig{})
	const n = 60
	ended := make(chan error, n)
	on(r.proxy, r.onProxy, func(h *hooks) {
		h.tcp = func(q *Request) {
			q.Accept(func(e splice.End, err error) {
				if err != nil {
					ended <- err
					return
				}
				buf := make([]byte, 1024)
				over := false
				e.Notify(func() {
					for !over {
						_, err := e.Read(buf)
						if errors.Is(err, splice.ErrAgain) {
							return
						}
						if err != nil {
							over = true
							e.Reset(nil)
							ended <- err
						}
					}
				})
			})
		}
	})
	for range n {
		c, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, 0), service, patience)
		if err != nil {
			t.Fatal(err)
		}
		do(c.loop, func() int {
			c.end.Write([]byte("data"))
			c.end.Reset(nil)
			return 0
		})
	}
	for i := range n {
		select {
		case err := <-ended:
			if !errors.Is(err, splice.ErrReset) {
				t.Errorf("connection ended with %v, want a reset", err)
			}
		case <-time.After(patience):
			t.Fatalf("%d of %d connections hang", n-i, n)
		}
	}
}

// rule 8: a sender to a stalled reader is stopped, and the memory is bounded.
func TestStalledReaderStopsTheSender(t *testing.T) {
	r := newRig(t, StackConfig{})
	app, proxy := r.establish(netip.AddrPortFrom(pod, 0), service)
	total := 0
	buf := make([]byte, 64<<10)
	quiet := 0
	for quiet < 50 {
		res := do(app.loop, func() ioResult { n, err := app.end.Write(buf); return ioResult{n, err} })
		total += res.n
		if res.n == 0 {
			quiet++
			<-time.After(2 * time.Millisecond)
		} else {
			quiet = 0
		}
		if total > 6*firstBuffer { // both stacks' buffers, of which neither has drained
			t.Fatalf("%d bytes were taken without a reader", total)
		}
	}
	t.Logf("%d KiB were taken", total>>10)
	left := total
	for left > 0 {
		n, err := proxy.Read(buf)
		if err != nil {
			t.Fatalf("%d bytes missing: %v", left, err)
		}
		left -= n
	}
}

func TestBudgetIsNeverExceeded(t *testing.T) {
	const budget = 8 << 20
	r := newRig(t, StackConfig{Limits: Limits{Memory: budget}})
	ch := make(chan bool, 1)
	on(r.proxy, r.onProxy, func(h *hooks) {
		h.tcp = func(q *Request) { q.Accept(func(_ splice.End, err error) { ch <- err == nil }) }
	})
	refused := 0
	for range 400 {
		c, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, 0), service, patience)
		if accepted := <-ch; accepted != (err == nil) {
			t.Fatalf("accepted %v, dial %v", accepted, err)
		}
		if err != nil {
			refused++
			continue
		}
		defer c.Reset()
		if got := do(r.proxy.Loop(), func() int64 { return r.proxy.reserved }); got > budget {
			t.Fatalf("reserved %d bytes of %d", got, budget)
		}
	}
	if refused == 0 || r.proxy.Stats().LimitConnections == 0 {
		t.Errorf("%d refused, LimitConnections %d: the budget was never reached", refused, r.proxy.Stats().LimitConnections)
	}
}

// A pod may have as many flows as Limits.Connections says, and a node more than
// 50,000, by the default budgets.
func TestBudgetsAreEnoughForIdleFlows(t *testing.T) {
	r := newRig(t, StackConfig{})
	fill := func(s *Stack, most int) int {
		return do(s.Loop(), func() (n int) {
			for n < most && s.reserve(minBuffer) > 0 {
				n++
			}
			return n
		})
	}
	if n := fill(r.proxy, 1e6); n < r.proxy.limits.Connections {
		t.Errorf("%d flows fit into a pod's budget, want %d", n, r.proxy.limits.Connections)
	}
	for range 5 { // more pods
		do(r.proxy.Loop(), func() int { r.proxy.reserved = 0; return 0 })
		if n := fill(r.proxy, 10_000); n < 10_000 {
			t.Errorf("%d flows fit into one of five pods", n)
		}
	}
	if left := r.engine.cfg.Memory - r.engine.reserved.Load(); left < 0 {
		t.Errorf("the budget of the node is exceeded by %d bytes", -left)
	}
}

func TestConnectionsLeaveNothingBehind(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.proxy, r.onProxy, func(h *hooks) { h.tcp = acceptEcho })
	for i := range 300 {
		c, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, 0), service, patience)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("hello"))
		b := make([]byte, 8)
		c.Read(b)
		if i%3 == 0 {
			c.Reset()
			continue
		}
		c.CloseWrite()
		io.ReadAll(c)
		c.Close()
	}
	deadline := time.Now().Add(patience)
	for {
		s := r.proxy.Stats()
		table := do(r.proxy.Loop(), func() int { return len(r.proxy.flows) })
		if s.Flows == 0 && s.Pending == 0 && table == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %d flows, %d pending, %d in the table", s.Flows, s.Pending, table)
		}
		<-time.After(5 * time.Millisecond)
	}
	if got := do(r.proxy.Loop(), func() int64 { return r.proxy.reserved }); got != 0 {
		t.Errorf("%d bytes still reserved", got)
	}
}

func TestDialErrors(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.kernel, r.onPod, func(h *hooks) { h.tcp = func(q *Request) { q.Refuse(RefuseReset) } })
	if _, err := dialOn(t, r.proxy, client, netip.AddrPortFrom(pod, 81), patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
	if n := r.proxy.Stats().Flows; n != 0 {
		t.Errorf("Flows = %d", n)
	}
}

func TestCloseResetsEverything(t *testing.T) {
	r := newRig(t, StackConfig{})
	app, _ := r.establish(netip.AddrPortFrom(pod, 0), service)
	r.proxy.Close()
	if _, err := app.Read(make([]byte, 1)); !errors.Is(err, splice.ErrReset) {
		t.Errorf("read: %v, want a reset", err)
	}
}

// rule 9: a device's turn ends after so many packets or bytes, so that other
// pods of the reader have theirs.
func TestTurnsAreShort(t *testing.T) {
	for _, c := range []struct {
		name          string
		packets, size int
		most          int // of one device before the other's first
	}{
		{"packets", 200, 10, 32},
		{"bytes", 20, 60_000, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, err := New(Config{Readers: 1})
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			var order []int // Owned by the loop.
			var loop splice.Loop
			var devs []*tun.Device
			for i := range 2 {
				a, b := tuntest.Pair(t, tun.Options{})
				h := &hooks{t: t, udp: func(*Datagram) { order = append(order, i) }}
				s, err := e.Add(a, StackConfig{Addrs: []netip.Addr{pod}, CaptureDNS: true}, h.serve)
				if err != nil {
					t.Fatal(err)
				}
				loop, devs = s.Loop(), append(devs, b)
			}
			// Both devices fill while the reader is kept busy.
			q := appendUDP(nil, podPort, netip.MustParseAddrPort("10.96.0.2:53"), make([]byte, c.size))
			do(loop, func() int {
				for range c.packets {
					for _, d := range devs {
						if err := d.Write(tun.Header{}, q); err != nil {
							t.Error(err)
						}
					}
				}
				return 0
			})
			deadline := time.Now().Add(patience)
			for do(loop, func() int { return len(order) }) < 2*c.packets && time.Now().Before(deadline) {
				runtime.Gosched()
			}
			do(loop, func() int {
				first := slices.IndexFunc(order, func(i int) bool { return i != order[0] })
				if len(order) < 2*c.packets || first > c.most {
					t.Errorf("%d handled; the second device's turn came after %d, want at most %d", len(order), first, c.most)
				}
				return 0
			})
		})
	}
}

// rule 9: bulk streams of one flow do not keep another's messages waiting for
// good, neither on one pod nor between pods of one reader.
func TestBulkLeavesTurnsToOthers(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.proxy, r.onProxy, func(h *hooks) { h.tcp = acceptEcho })
	small, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, 0), service, patience)
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	for range 4 {
		bulk, err := dialOn(t, r.kernel, netip.AddrPortFrom(pod, 0), service, patience)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for b := make([]byte, 256<<10); !stop.Load(); {
				if _, err := bulk.Write(b); err != nil {
					return
				}
			}
			bulk.Reset()
		})
		wg.Go(func() { io.Copy(io.Discard, struct{ io.Reader }{bulk}) })
	}
	b := make([]byte, 64)
	for range 100 {
		if _, err := small.Write(b); err != nil {
			t.Error(err)
			break
		}
		if _, err := io.ReadFull(struct{ io.Reader }{small}, b); err != nil {
			t.Error(err)
			break
		}
	}
	stop.Store(true)
	wg.Wait()
}

// A port that gVisor gave back is free, even if the table still has the flow
// that had it: once in some ten thousand dials the two disagreed.
func TestDialTakesAPortWhoseFlowIsOver(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.kernel, r.onPod, func(h *hooks) { h.tcp = acceptEcho })
	app := netip.AddrPortFrom(pod, 80)
	first, err := dialOn(t, r.proxy, client, app, patience)
	if err != nil {
		t.Fatal(err)
	}
	first.Write([]byte("x"))
	if _, err := first.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	again := make(chan dialled, 1)
	do(r.proxy.Loop(), func() int {
		f := first.end.(*Flow)
		f.ep.Abort() // over, and nothing on the loop has heard of it
		if r.proxy.flows[f.key] != f {
			t.Error("the flow has left the table: the test shows nothing")
		}
		r.proxy.Dial(client, app, patience, func(e splice.End, err error) { again <- dialled{e, err} })
		return 0
	})
	if d := <-again; d.err != nil {
		t.Errorf("dial: %v", d.err)
	}
}
