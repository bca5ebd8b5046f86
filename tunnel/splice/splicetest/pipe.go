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

	in          []byte // sent by the peer; read up to head
	head        int
	eof         bool  // the peer closed its side
	closedWrite bool  // we closed ours
	err         error // the stream is over
	failure     error // the stream is over because the peer reset it
}

var (
	_ splice.End    = (*PipeEnd)(nil)
	_ splice.Failer = (*PipeEnd)(nil)
)

// Read implements splice.End.
func (e *PipeEnd) Read(p []byte) (int, error) {
	switch {
	case e.err != nil:
		return 0, e.err
	case e.buffered() > 0:
		n := copy(p, e.in[e.head:])
		e.head += n
		if e.head == len(e.in) {
			e.in, e.head = e.in[:0], 0
		}
		e.loop.Soon(&e.peer.task)
		return n, nil
	case e.eof:
		return 0, io.EOF
	}
	return 0, splice.ErrAgain
}

// Write implements splice.End.
func (e *PipeEnd) Write(p []byte) (int, error) {
	if e.err != nil {
		return 0, e.err
	}
	if e.closedWrite {
		return 0, io.ErrClosedPipe
	}
	n := min(len(p), e.size-e.peer.buffered())
	e.peer.deliver(p[:n])
	if n < len(p) {
		return n, splice.ErrAgain
	}
	return n, nil
}

func (e *PipeEnd) buffered() int { return len(e.in) - e.head }

// deliver keeps within the storage it has, so that a Pipe in use does not
// allocate.
func (e *PipeEnd) deliver(p []byte) {
	if len(p) == 0 {
		return
	}
	if len(e.in)+len(p) > cap(e.in) && e.head > 0 {
		e.in = e.in[:copy(e.in, e.in[e.head:])]
		e.head = 0
	}
	e.in = append(e.in, p...)
	e.loop.Soon(&e.task)
}

// CloseWrite implements splice.End.
func (e *PipeEnd) CloseWrite() error {
	if e.err != nil {
		return e.err
	}
	e.closedWrite = true
	e.peer.eof = true
	e.loop.Soon(&e.peer.task)
	return nil
}

// Reset implements splice.End. What the peer has not read yet is lost.
func (e *PipeEnd) Reset(cause error) {
	if e.err != nil {
		return
	}
	e.err = fmt.Errorf("splicetest: reset here: %w", io.ErrClosedPipe)
	if e.peer.err == nil {
		e.peer.err = fmt.Errorf("splicetest: %w: %v", splice.ErrReset, cause)
		e.peer.failure = e.peer.err
		e.peer.in, e.peer.head = nil, 0
		e.loop.Soon(&e.peer.task)
	}
}

// Close implements splice.End.
func (e *PipeEnd) Close() {
	if e.err == nil && (!e.closedWrite || !e.eof) {
		e.Reset(io.ErrClosedPipe)
	}
	if e.err == nil {
		e.err = io.ErrClosedPipe
	}
	e.ready = nil
}

// Failure implements splice.Failer.
func (e *PipeEnd) Failure() error { return e.failure }

// Notify implements splice.End.
func (e *PipeEnd) Notify(ready func()) {
	e.ready = ready
	e.loop.Soon(&e.task)
}
