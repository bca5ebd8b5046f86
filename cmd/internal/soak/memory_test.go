package soak

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
	"github.com/ztun/ztun/tunnel/splice"
)

// memoryWorld is two stacks, each the network of the other, with a Wire in
// between, or with nothing: a round trip is a write and a read then.
type memoryWorld struct {
	// Set by newMemoryWorld, read-only after.
	wire   *tuntest.Wire // nil: nothing in between
	stacks [2]*netstack.Stack
	ways   []memoryRoute

	harsh bool // the weather; set between loads
}

type memoryRoute struct {
	name     string
	from     int
	src, dst netip.Addr
}

func newMemoryWorld(t *testing.T, wo worldOptions) *memoryWorld {
	w := &memoryWorld{}
	o := tun.Options{MTU: 1500, Offload: true}
	var dev [2]*tun.Device
	over := "nothing"
	if wo.wired {
		over = "a wire"
		dev[0], dev[1], w.wire = tuntest.WiredPair(t, tuntest.Options{Seed: wo.seed, Device: o})
	} else {
		dev[0], dev[1] = tuntest.Pair(t, o)
	}
	e, err := netstack.New(netstack.Config{Readers: 2, TCP: wo.tcp})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	addrs := [2][]netip.Addr{
		{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
		{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
	}
	for i := range w.stacks {
		w.stacks[i], err = e.Add(dev[i], netstack.StackConfig{Name: "memory/" + string(rune('a'+i)), Addrs: addrs[i]}, func(s *netstack.Stack) (netstack.Handler, error) {
			return &acceptor{func(end splice.End) { go greet(newEndConn(s, end), wo.serve) }}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, v := range []string{"", ", IPv6"} {
		w.ways = append(w.ways, memoryRoute{"memory over " + over + v, 0, addrs[0][i], addrs[1][i]},
			memoryRoute{"memory back over " + over + v, 1, addrs[1][i], addrs[0][i]})
	}
	return w
}

// acceptor takes every connection to its stack.
type acceptor struct{ serve func(splice.End) }

func (a *acceptor) HandleTCP(r *netstack.Request) {
	r.Accept(func(end splice.End, err error) {
		if err == nil {
			a.serve(end)
		}
	})
}

func (a *acceptor) HandleTunnel(end splice.End, _, _ netip.AddrPort) { end.Reset(nil) }
func (a *acceptor) HandleUDP(*netstack.Datagram)                     {}

func (w *memoryWorld) routes() (names []string) {
	for _, r := range w.ways {
		names = append(names, r.name)
	}
	return names
}

func (w *memoryWorld) dial(route int, _ kind) (conn, error) {
	r := w.ways[route]
	s := w.stacks[r.from]
	type dialled struct {
		end splice.End
		err error
	}
	ch := make(chan dialled, 1)
	s.Loop().Post(func() {
		s.Dial(netip.AddrPortFrom(r.src, 0), netip.AddrPortFrom(r.dst, openPort), dialLimit, func(e splice.End, err error) { ch <- dialled{e, err} })
	})
	d := <-ch
	if d.err != nil {
		return nil, d.err
	}
	return newEndConn(s, d.end), nil
}

func (w *memoryWorld) policed(int) bool         { return false }
func (w *memoryWorld) forgets(int) bool         { return w.harsh }
func (w *memoryWorld) deny(func(), func()) bool { return false }

func (w *memoryWorld) set(ab, ba tuntest.Path) {
	if w.wire != nil {
		w.wire.Set(ab, ba)
		w.harsh = isHarsh(ab) || isHarsh(ba)
	}
}

func (w *memoryWorld) flows() (n int) {
	for _, s := range w.stacks {
		n += int(s.Stats().Flows + s.Stats().Pending)
	}
	return n
}

func (w *memoryWorld) forget() {}

func (w *memoryWorld) state() string {
	s := ""
	for i := range w.stacks {
		s += fmt.Sprintf("  stack %d: %+v\n", i, w.stacks[i].Stats())
		for _, f := range w.stacks[i].Flows() {
			s += fmt.Sprintf("    %+v\n", f)
		}
	}
	if w.wire != nil {
		ab, ba := w.wire.Stats()
		s += fmt.Sprintf("  wire: %+v\n  and back: %+v\n", ab, ba)
	}
	return s
}

// endConn is a conn on a splice.End, for goroutines that block.
type endConn struct {
	stack *netstack.Stack
	loop  splice.Loop
	end   splice.End
	// One slot each: the end has changed since its reader or writer looked.
	readable, writable chan struct{}
	closed             chan struct{}
}

func newEndConn(stack *netstack.Stack, end splice.End) *endConn {
	loop := stack.Loop()
	c := &endConn{stack: stack, loop: loop, end: end, readable: make(chan struct{}, 1), writable: make(chan struct{}, 1), closed: make(chan struct{})}
	loop.Post(func() {
		end.Notify(func() {
			for _, ch := range []chan struct{}{c.readable, c.writable} {
				select {
				case ch <- struct{}{}:
				default:
				}
			}
		})
	})
	return c
}

// State is what the stack knows of the connection.
func (c *endConn) State() string {
	f := c.end.(*netstack.Flow)
	for _, i := range c.stack.Flows() {
		if i.Local == f.Local() && i.Remote == f.Remote() {
			return fmt.Sprintf("%+v", i)
		}
	}
	return fmt.Sprintf("no flow from %v to %v", f.Local(), f.Remote())
}

var errEndClosed = errors.New("soak: end is closed")

type result struct {
	n   int
	err error
}

// on runs f on the loop, again whenever the end has changed, until it does
// not say ErrAgain.
func (c *endConn) on(changed <-chan struct{}, f func() (int, error)) (int, error) {
	for {
		ch := make(chan result, 1)
		c.loop.Post(func() {
			select {
			case <-c.closed:
				ch <- result{0, errEndClosed}
			default:
				n, err := f()
				ch <- result{n, err}
			}
		})
		r := <-ch
		switch {
		case r.n > 0 || r.err == nil:
			return r.n, nil
		case errors.Is(r.err, splice.ErrReset):
			return 0, errors.Join(errReset, r.err)
		case !errors.Is(r.err, splice.ErrAgain):
			return 0, r.err
		}
		select {
		case <-changed:
		case <-c.closed:
			return 0, errEndClosed
		}
	}
}

func (c *endConn) Read(p []byte) (int, error) {
	return c.on(c.readable, func() (int, error) { return c.end.Read(p) })
}

func (c *endConn) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := c.on(c.writable, func() (int, error) { return c.end.Write(p[done:]) })
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (c *endConn) CloseWrite() error {
	_, err := c.on(c.writable, func() (int, error) { return 0, c.end.CloseWrite() })
	return err
}

func (c *endConn) Reset() { c.over(func() { c.end.Reset(nil) }) }

func (c *endConn) Close() error {
	c.over(c.end.Close)
	return nil
}

// over ends the end once.
func (c *endConn) over(f func()) {
	done := make(chan struct{})
	c.loop.Post(func() {
		defer close(done)
		select {
		case <-c.closed:
		default:
			f()
			close(c.closed)
		}
	})
	<-done
}

func (c *endConn) Shrink(int) {}
