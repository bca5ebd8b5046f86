package hbone_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/ztun/ztun/tunnel/hbone/hbonetest"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// newWire returns a foreign peer's connection and the End of a pipe that holds
// size bytes each way.
func newWire(t testing.TB, loop *splicetest.Loop, size int) (*hbonetest.Conn, *splicetest.PipeEnd) {
	c, end := hbonetest.Pipe(loop, size)
	t.Cleanup(func() { _ = c.Close() })
	return c, end
}

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
