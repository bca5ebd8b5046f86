// Package hbonetest lets foreign peers, which block on goroutines of their own,
// talk to what runs on a loop.
package hbonetest

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A Conn is a blocking net.Conn over an End. It works inside testing/synctest.
type Conn struct {
	loop *splicetest.Loop
	end  splice.End    // used on the loop only
	wake chan struct{} // something may be written

	// mu guards the fields below.
	mu       sync.Mutex
	cond     *sync.Cond
	in       []byte
	err      error
	deadline time.Time
}

// Pipe returns a Conn and the End it is connected to, with a pipe that holds
// size bytes each way between them.
func Pipe(loop *splicetest.Loop, size int) (*Conn, *splicetest.PipeEnd) {
	var c *Conn
	var ours *splicetest.PipeEnd
	loop.Do(func() {
		var theirs *splicetest.PipeEnd
		theirs, ours = splicetest.Pipe(loop, size)
		c = New(loop, theirs)
	})
	return c, ours
}

// New returns a Conn that owns end. It is called on the loop.
func New(loop *splicetest.Loop, end splice.End) *Conn {
	c := &Conn{loop: loop, end: end, wake: make(chan struct{}, 1)}
	c.cond = sync.NewCond(&c.mu)
	end.Notify(c.pump)
	return c
}

// Buffered returns how many bytes wait to be read.
func (c *Conn) Buffered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.in)
}

// pump runs on the loop.
func (c *Conn) pump() {
	c.mu.Lock()
	defer c.mu.Unlock()
	buf := make([]byte, 16<<10)
	for c.err == nil {
		n, err := c.end.Read(buf)
		c.in = append(c.in, buf[:n]...)
		if errors.Is(err, splice.ErrAgain) {
			break
		}
		if err != nil {
			c.err = err
		}
	}
	c.signalLocked()
}

// signalLocked wakes who reads and who writes.
func (c *Conn) signalLocked() {
	c.cond.Broadcast()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.in) == 0 && c.err == nil {
		if !c.deadline.IsZero() && !time.Now().Before(c.deadline) {
			return 0, os.ErrDeadlineExceeded
		}
		c.cond.Wait()
	}
	if len(c.in) == 0 {
		return 0, c.err
	}
	n := copy(p, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (c *Conn) Write(p []byte) (int, error) {
	total := 0
	for total < len(p) {
		var n int
		err := net.ErrClosed // of a loop that has ended
		c.loop.Do(func() { n, err = c.end.Write(p[total:]) })
		total += n
		if errors.Is(err, splice.ErrAgain) {
			<-c.wake
			continue
		}
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// CloseWrite sends a FIN.
func (c *Conn) CloseWrite() error {
	var err error
	c.loop.Do(func() { err = c.end.CloseWrite() })
	return err
}

func (c *Conn) Close() error {
	c.loop.Post(func() {
		c.end.Reset(net.ErrClosed)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.err == nil {
			c.err = net.ErrClosed
		}
		c.signalLocked()
	})
	return nil
}

func (c *Conn) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
func (c *Conn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2} }
func (c *Conn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	return nil
}
func (c *Conn) SetReadDeadline(t time.Time) error  { return c.SetDeadline(t) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return nil }

var _ net.Conn = (*Conn)(nil)
