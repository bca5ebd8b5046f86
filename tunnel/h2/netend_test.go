package h2

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A netEnd makes a splice.End of a socket, with a goroutine for each direction.
type netEnd struct {
	loop *splicetest.Loop
	conn *net.TCPConn
	task splice.Task

	// Owned by the loop.
	ready      func()
	in         []byte
	inErr      error
	out        []byte // being written
	next       []byte // to be written after it
	outErr     error
	writing    bool
	closeWrite bool

	more chan struct{} // the loop wants more
	work chan []byte   // nil: close the write side
	end  sync.Once
	done chan struct{}
}

const netEndBuffer = 256 << 10

var _ splice.End = (*netEnd)(nil)

func newNetEnd(loop *splicetest.Loop, conn net.Conn) *netEnd {
	e := &netEnd{loop: loop, conn: conn.(*net.TCPConn), more: make(chan struct{}, 1), work: make(chan []byte, 1), done: make(chan struct{})}
	e.task.Run = func() {
		if e.ready != nil {
			e.ready()
		}
	}
	e.more <- struct{}{}
	go e.reader()
	go e.writer()
	return e
}

func (e *netEnd) reader() {
	buf := make([]byte, 64<<10)
	for {
		select {
		case <-e.more:
		case <-e.done:
			return
		}
		n, err := e.conn.Read(buf)
		e.loop.Post(func() {
			e.in, e.inErr = buf[:n], err
			e.loop.Soon(&e.task)
		})
		if err != nil {
			return
		}
	}
}

func (e *netEnd) writer() {
	for {
		select {
		case p := <-e.work:
			var err error
			if p == nil {
				err = e.conn.CloseWrite()
			} else {
				_, err = e.conn.Write(p)
			}
			e.loop.Post(func() { e.wrote(err) })
		case <-e.done:
			return
		}
	}
}

func (e *netEnd) wrote(err error) {
	e.writing = false
	if err != nil && e.outErr == nil {
		e.outErr = fmt.Errorf("netend: %w: %w", splice.ErrReset, err)
	}
	e.out, e.next = e.next, e.out[:0]
	e.start()
	e.loop.Soon(&e.task)
}

func (e *netEnd) start() {
	if e.writing || e.outErr != nil {
		return
	}
	switch {
	case len(e.out) > 0:
		e.writing = true
		e.work <- e.out
	case e.closeWrite:
		e.closeWrite, e.writing = false, true
		e.work <- nil
	}
}

func (e *netEnd) Read(p []byte) (int, error) {
	n := copy(p, e.in)
	if e.in = e.in[n:]; n > 0 {
		if len(e.in) == 0 && e.inErr == nil {
			e.more <- struct{}{}
		}
		return n, nil
	}
	switch {
	case e.inErr == io.EOF:
		return 0, io.EOF
	case e.inErr != nil:
		return 0, fmt.Errorf("netend: %w: %w", splice.ErrReset, e.inErr)
	}
	return 0, splice.ErrAgain
}

func (e *netEnd) Write(p []byte) (int, error) {
	if e.outErr != nil {
		return 0, e.outErr
	}
	into := &e.out
	if e.writing {
		into = &e.next
	}
	n := min(len(p), netEndBuffer-len(*into))
	*into = append(*into, p[:n]...)
	e.start()
	if n < len(p) {
		return n, splice.ErrAgain
	}
	return n, nil
}

func (e *netEnd) CloseWrite() error {
	e.closeWrite = true
	e.start()
	return e.outErr
}

func (e *netEnd) Reset(error) {
	e.conn.SetLinger(0)
	e.Close()
}

func (e *netEnd) Close() {
	if e.outErr == nil {
		e.outErr = errors.New("netend: closed")
	}
	e.ready = nil
	e.end.Do(func() { close(e.done); e.conn.Close() })
}

func (e *netEnd) Notify(ready func()) {
	e.ready = ready
	e.loop.Soon(&e.task)
}
