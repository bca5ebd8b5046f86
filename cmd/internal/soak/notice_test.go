package soak

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A soak that finds nothing is only worth something if it would have. faulty
// is a world of loopback sockets and a relay between them that does wrong.
type faulty struct {
	t     *testing.T
	addr  string
	serve func(uint64, conn)
	fault fault
	over  chan struct{}
}

// A fault wraps what the relay writes on a connection.
type fault struct {
	name, want string
	only       kind
	// tamper returns what to write in place of p, which begins at byte pos.
	tamper func(p []byte, pos int64) []byte
	// ending is what the relay does at the end of a direction: nil mirrors it.
	ending func(to *net.TCPConn)
	// silent: it does nothing at the end of a direction.
	silent bool
}

func newFaulty(t *testing.T, f fault) *faulty {
	w := &faulty{t: t, fault: f, over: make(chan struct{})}
	server := w.listen(func(c *net.TCPConn) { greet(kernelConn{c}, w.serve) })
	w.addr = w.listen(func(c *net.TCPConn) {
		up, err := net.Dial("tcp", server)
		if err != nil {
			_ = c.Close()
			return
		}
		w.relay(c, up.(*net.TCPConn))
	})
	t.Cleanup(func() { close(w.over) })
	return w
}

// listen hands each connection to f, on a goroutine of its own.
func (w *faulty) listen(f func(*net.TCPConn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { f(c.(*net.TCPConn)) })
		}
	})
	w.t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// relay moves bytes both ways, and mirrors ends and resets.
func (w *faulty) relay(a, b *net.TCPConn) {
	var both sync.WaitGroup
	ends := [2]relayed{{TCPConn: a}, {TCPConn: b}}
	for i := range ends {
		both.Go(func() {
			from, to := &ends[i], &ends[1-i]
			room, pos := make([]byte, 4<<10), int64(0)
			for {
				n, err := from.Read(room)
				p := room[:n]
				if i == 1 && n > 0 && w.fault.tamper != nil {
					p = w.fault.tamper(p, pos)
				}
				pos += int64(n)
				if len(p) > 0 {
					_, _ = to.Write(p)
				}
				if err == nil {
					continue
				}
				switch {
				case i == 1 && w.fault.silent:
					<-w.over
				case i == 1 && w.fault.ending != nil:
					w.fault.ending(to.TCPConn)
				case err == io.EOF && !from.wasReset():
					_ = to.CloseWrite()
				default:
					kernelConn{to.TCPConn}.Reset()
				}
				return
			}
		})
	}
	both.Wait()
	_, _ = a.Close(), b.Close()
}

// relayed is an end of the relay. The kernel tells one system call of a reset,
// and any read after it of a clean end: a write that was told remembers it.
type relayed struct {
	*net.TCPConn
	mu    sync.Mutex // held in each write's system call
	reset bool
}

func (c *relayed) Write(p []byte) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	rawErr := raw.Write(func(fd uintptr) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		for n < len(p) {
			var m int
			m, err = unix.Write(int(fd), p[n:])
			switch {
			case err == nil:
				n += m
			case err == unix.EAGAIN:
				return false
			case err != unix.EINTR:
				c.reset = c.reset || errors.Is(asReset(err), errReset)
				return true
			}
		}
		return true
	})
	return n, errors.Join(err, rawErr)
}

// wasReset says whether a write was told so.
func (c *relayed) wasReset() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reset
}

func (w *faulty) routes() []string                   { return []string{"a relay"} }
func (w *faulty) policed(int) bool                   { return false }
func (w *faulty) forgets(int) bool                   { return false }
func (w *faulty) deny(told func(), gone func()) bool { return false }
func (w *faulty) dial(route int, k kind) (conn, error) {
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		return nil, err
	}
	return kernelConn{c.(*net.TCPConn)}, nil
}

var faults = []fault{
	{name: "nothing"},
	{name: "a byte changed", only: requests, want: "wrong from byte", tamper: func(p []byte, pos int64) []byte {
		p[len(p)/2] ^= 1
		return p
	}},
	{name: "bytes lost", only: bulkDown, want: "wrong from byte", tamper: func(p []byte, pos int64) []byte {
		if pos > 20<<10 && len(p) > 100 {
			return append(p[:50:50], p[60:]...)
		}
		return p
	}},
	{name: "bytes doubled", only: bulkDown, want: "wrong from byte", tamper: func(p []byte, pos int64) []byte {
		if pos > 20<<10 {
			return append(p[:len(p):len(p)], p...)
		}
		return p
	}},
	{name: "another connection's bytes", only: bulkDown, want: "of what the server of connection 99 sends", tamper: func(p []byte, pos int64) []byte {
		fill(p, 99, 1, pos)
		return p
	}},
	{name: "the rest withheld", only: bulkDown, want: "stalled: nothing came from the server", silent: true, tamper: func(p []byte, pos int64) []byte {
		if pos > 20<<10 {
			return nil
		}
		return p
	}},
	{name: "cut short", only: bulkDown, want: "the stream ended after", tamper: func(p []byte, pos int64) []byte {
		if pos > 20<<10 {
			return nil
		}
		return p
	}, ending: func(to *net.TCPConn) { _ = to.CloseWrite() }},
	{name: "no end", only: requests, want: "stalled: nothing came from the server", silent: true},
	{name: "a reset for an end", only: clientEnds, want: "reset by nobody", ending: func(to *net.TCPConn) { kernelConn{to}.Reset() }},
	{name: "an end for a reset", only: serverResets, want: "the stream ended after", ending: func(to *net.TCPConn) { _ = to.CloseWrite() }},
	{name: "no reset", only: resetHalf, want: "stalled", silent: true},
}

func TestTheSoakNotices(t *testing.T) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			w := newFaulty(t, f)
			var mu sync.Mutex
			var found []error
			watch := newWatch(500*time.Millisecond, time.Minute, (*play).kill)
			defer watch.close()
			only := func(k kind) bool { return f.name == "nothing" || k == f.only }
			l := &load{
				world: w, deck: newDeck(1, 1, 1, only), watch: watch, tally: &tally{}, plays: map[uint64]*play{},
				measure: measure{bulk: 128 << 10, rest: 20 * time.Millisecond, idle: 20 * time.Millisecond},
				failed: func(err error) {
					mu.Lock()
					defer mu.Unlock()
					found = append(found, err)
				},
			}
			w.serve = l.serve
			l.run(4, 0)
			if f.want == "" {
				if len(found) > 0 {
					t.Errorf("%d failures: %v", len(found), found[0])
				}
				return
			}
			if len(found) == 0 {
				t.Fatal("nothing was noticed")
			}
			if !strings.Contains(found[0].Error(), f.want) {
				t.Errorf("%v, want %q", found[0], f.want)
			}
		})
	}
}

// A first word that is changed leads nowhere.
func TestAServerThatNobodyMeetsIsNoticed(t *testing.T) {
	l := &load{plays: map[uint64]*play{}}
	a, b := net.Pipe()
	defer a.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.serve(binary.LittleEndian.Uint64([]byte("whatever")), pipeConn{b})
	}()
	if _, err := a.Read(make([]byte, 1)); err == nil {
		t.Error("a server plays a script that nobody has")
	}
	<-done
}

type pipeConn struct{ net.Conn }

func (c pipeConn) CloseWrite() error { return c.Close() }
func (c pipeConn) Reset()            { _ = c.Close() }
func (c pipeConn) Shrink(int)        {}
