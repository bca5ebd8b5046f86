package splicetest

import (
	"fmt"
	"io"

	"github.com/ztun/ztun/tunnel/splice"
)

// Pipe returns two connected ends on loop. Each direction holds up to size
// bytes; a Write beyond that is short.
func Pipe(loop splice.Loop, size int) (a, b *PipeEnd) {
	a = &PipeEnd{loop: loop, size: size}
	b = &PipeEnd{loop: loop, size: size}
	a.peer, b.peer = b, a
	for _, e := range []*PipeEnd{a, b} {
		e.task.Run = func() {
			if e.ready != nil {
				e.ready()
			}
		}
	}
	return a, b
}

// PipeEnd is one end of a Pipe.
type PipeEnd struct {
	loop  splice.Loop
	size  int
	peer  *PipeEnd
	task  splice.Task
	ready func()

	in          []byte // sent by the peer, not yet read
	eof         bool   // the peer closed its side
	closedWrite bool
	err         error // the stream is over
}

var _ splice.End = (*PipeEnd)(nil)

func (e *PipeEnd) Read(p []byte) (int, error) {
	switch {
	case e.err != nil:
		return 0, e.err
	case len(e.in) > 0:
		n := copy(p, e.in)
		e.in = e.in[n:]
		e.loop.Soon(&e.peer.task)
		return n, nil
	case e.eof:
		return 0, io.EOF
	}
	return 0, splice.ErrAgain
}

func (e *PipeEnd) Write(p []byte) (int, error) {
	if e.err != nil {
		return 0, e.err
	}
	if e.closedWrite {
		return 0, io.ErrClosedPipe
	}
	n := min(len(p), e.size-len(e.peer.in))
	e.peer.in = append(e.peer.in, p[:n]...)
	if n > 0 {
		e.loop.Soon(&e.peer.task)
	}
	if n < len(p) {
		return n, splice.ErrAgain
	}
	return n, nil
}

func (e *PipeEnd) CloseWrite() error {
	if e.err != nil {
		return e.err
	}
	e.closedWrite = true
	e.peer.eof = true
	e.loop.Soon(&e.peer.task)
	return nil
}

func (e *PipeEnd) Reset(cause error) {
	if e.err != nil {
		return
	}
	e.err = fmt.Errorf("splicetest: reset here: %w", io.ErrClosedPipe)
	if e.peer.err == nil {
		e.peer.err = fmt.Errorf("splicetest: %w: %v", splice.ErrReset, cause)
		e.peer.in = nil
		e.loop.Soon(&e.peer.task)
	}
}

func (e *PipeEnd) Close() {
	if e.err == nil && (!e.closedWrite || !e.eof) {
		e.Reset(io.ErrClosedPipe)
	}
	if e.err == nil {
		e.err = io.ErrClosedPipe
	}
	e.ready = nil
}

func (e *PipeEnd) Notify(ready func()) {
	e.ready = ready
	e.loop.Soon(&e.task)
}
