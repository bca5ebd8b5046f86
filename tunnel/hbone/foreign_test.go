package hbone_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A wire is a blocking net.Conn for a foreign peer on a goroutine of its own,
// whose other end is a splice.End on a loop.
type wire struct {
	loop *splicetest.Loop
	end  *splicetest.PipeEnd

	mu       sync.Mutex
	cond     *sync.Cond
	in       []byte
	err      error
	deadline time.Time

	wake chan struct{} // something may be read or written
}

// newWire returns the foreign side and the End of a pipe that holds size bytes
// each way.
func newWire(t testing.TB, loop *splicetest.Loop, size int) (*wire, *splicetest.PipeEnd) {
	w := &wire{loop: loop, wake: make(chan struct{}, 1)}
	w.cond = sync.NewCond(&w.mu)
	var ours *splicetest.PipeEnd
	loop.Do(func() {
		w.end, ours = splicetest.Pipe(loop, size)
		w.end.Notify(w.pump)
	})
	t.Cleanup(func() { w.Close() })
	return w, ours
}

// pump runs on the loop.
func (w *wire) pump() {
	w.mu.Lock()
	defer w.mu.Unlock()
	buf := make([]byte, 16<<10)
	for w.err == nil {
		n, err := w.end.Read(buf)
		w.in = append(w.in, buf[:n]...)
		if errors.Is(err, splice.ErrAgain) {
			break
		}
		if err != nil {
			w.err = err
		}
	}
	w.cond.Broadcast()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *wire) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.in) == 0 && w.err == nil {
		if !w.deadline.IsZero() && !time.Now().Before(w.deadline) {
			return 0, os.ErrDeadlineExceeded
		}
		w.cond.Wait()
	}
	if len(w.in) == 0 {
		return 0, w.err
	}
	n := copy(p, w.in)
	w.in = w.in[n:]
	return n, nil
}

func (w *wire) Write(p []byte) (int, error) {
	total := 0
	for total < len(p) {
		var n int
		var err error
		w.loop.Do(func() { n, err = w.end.Write(p[total:]) })
		total += n
		if errors.Is(err, splice.ErrAgain) {
			<-w.wake
			continue
		}
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// CloseWrite sends a FIN.
func (w *wire) CloseWrite() error {
	var err error
	w.loop.Do(func() { err = w.end.CloseWrite() })
	return err
}

func (w *wire) Close() error {
	w.loop.Post(func() {
		w.end.Reset(net.ErrClosed)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.err == nil {
			w.err = net.ErrClosed
		}
		w.cond.Broadcast()
	})
	return nil
}

func (w *wire) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
func (w *wire) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2} }
func (w *wire) SetDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = t
	return nil
}
func (w *wire) SetReadDeadline(t time.Time) error  { return w.SetDeadline(t) }
func (w *wire) SetWriteDeadline(t time.Time) error { return nil }

var _ net.Conn = (*wire)(nil)

// A reader collects what an End delivers, on its loop.
type reader struct {
	end  splice.End
	data []byte
	err  error // what ended it
	done chan struct{}
	hold bool // do not read
	max  int  // most bytes a Read; 0: no limit
}

// collect reads all that end has until it ends.
func collect(loop *splicetest.Loop, end splice.End) *reader {
	r := &reader{end: end, done: make(chan struct{})}
	loop.Do(func() { end.Notify(r.ready) })
	return r
}

func (r *reader) ready() {
	if r.err != nil || r.hold {
		return
	}
	buf := make([]byte, 32<<10)
	if r.max > 0 {
		buf = buf[:r.max]
	}
	for {
		n, err := r.end.Read(buf)
		r.data = append(r.data, buf[:n]...)
		if errors.Is(err, splice.ErrAgain) {
			return
		}
		if err != nil {
			r.err = err
			close(r.done)
			return
		}
	}
}

// wait returns what was read, and the error that ended it; nil for io.EOF.
func (r *reader) wait(t testing.TB) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	select {
	case <-r.done:
	case <-ctx.Done():
		t.Fatal("the end did not end")
	}
	if r.err == io.EOF {
		return r.data, nil
	}
	return r.data, r.err
}
