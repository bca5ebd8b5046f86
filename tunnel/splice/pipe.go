package splice

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"
)

// ErrClosed is returned by an end that was closed or reset on this side.
var ErrClosed = errors.New("splice: end is closed")

// errPipeReset is what the other end of a Pipe finds after a Reset.
var errPipeReset = fmt.Errorf("splice: pipe: %w", ErrReset)

// Pipe makes a byte stream in memory between two loops, which may be one: a
// belongs to loopA, b to loopB. It may be called anywhere; until both ends have
// been handed to their loops nothing else may touch them.
//
// What is written is copied once, into pooled buffers that pass to the other
// loop as they are. A direction takes 64 KiB, and more, up to 512 KiB, while its
// reader keeps up; one that holds no bytes holds no buffer. The buffers of the
// direction from a to b count against budgetA, the others against budgetB; a
// budget may be nil.
//
// A loop is only told of what it waits for: bytes after it found none, room
// after it found none.
func Pipe(loopA, loopB Loop, budgetA, budgetB *Budget) (a, b *PipeEnd) {
	toB, toA := newLane(budgetA), newLane(budgetB)
	a = &PipeEnd{loop: loopA, out: toB, in: toA}
	b = &PipeEnd{loop: loopB, out: toA, in: toB}
	a.peer, b.peer = b, a
	for _, e := range []*PipeEnd{a, b} {
		e.alone = loopA == loopB
		e.task.Run = e.wake
		e.run = e.wake
	}
	return a, b
}

// A PipeEnd is one end of a Pipe.
type PipeEnd struct {
	// Set by Pipe, read-only after.
	loop    Loop
	peer    *PipeEnd
	out, in *lane
	alone   bool   // both ends are on one loop
	run     func() // wake, for Post

	woken atomic.Bool // run is posted, or task queued

	// Owned by the loop.
	task     Task
	ready    func()
	room     *chunk // between Reserve and Commit
	wroteEnd bool
	readEnd  bool
	over     bool // Close or Reset was called
}

var (
	_ End      = (*PipeEnd)(nil)
	_ Reserver = (*PipeEnd)(nil)
	_ Lender   = (*PipeEnd)(nil)
	_ Failer   = (*PipeEnd)(nil)
)

// tell makes the peer's loop run ready.
func (e *PipeEnd) tell() {
	switch p := e.peer; {
	case p.woken.Swap(true):
	case e.alone:
		p.loop.Soon(&p.task)
	default:
		Hand(e.loop, p.loop, p.run)
	}
}

// wake runs on e's loop after it was told.
func (e *PipeEnd) wake() {
	e.woken.Store(false)
	if e.ready != nil {
		e.ready()
	}
}

// Notify implements End.
func (e *PipeEnd) Notify(ready func()) {
	e.ready = ready
	if ready != nil && !e.woken.Swap(true) {
		e.loop.Soon(&e.task)
	}
}

// Reserve implements Reserver.
func (e *PipeEnd) Reserve(max int) []byte {
	var p []byte
	e.room, p = e.out.reserve()
	return p[:min(max, len(p))]
}

// Commit implements Reserver.
func (e *PipeEnd) Commit(n int) {
	c := e.room
	e.room = nil
	if e.out.commit(c, n) {
		e.tell()
	}
}

// Write implements End.
func (e *PipeEnd) Write(p []byte) (int, error) {
	switch {
	case e.over:
		return 0, ErrClosed
	case e.wroteEnd:
		return 0, io.ErrClosedPipe
	}
	done := 0
	for done < len(p) {
		room := e.Reserve(len(p) - done)
		if len(room) == 0 {
			if err := e.Failure(); err != nil {
				return done, err
			}
			return done, ErrAgain
		}
		n := copy(room, p[done:])
		e.Commit(n)
		done += n
	}
	return done, nil
}

// CloseWrite implements End.
func (e *PipeEnd) CloseWrite() error {
	if err := e.Failure(); err != nil {
		return err
	}
	if e.over {
		return ErrClosed
	}
	if !e.wroteEnd {
		e.wroteEnd = true
		if e.out.end(laneEnded) {
			e.tell()
		}
	}
	return nil
}

// Peek implements Lender.
func (e *PipeEnd) Peek() ([]byte, error) {
	if e.over {
		return nil, ErrClosed
	}
	p, state := e.in.peek()
	switch {
	case len(p) > 0:
		return p, nil
	case state == laneReset:
		return nil, errPipeReset
	case state == laneEnded:
		e.readEnd = true
		return nil, io.EOF
	}
	return nil, ErrAgain
}

// Discard implements Lender.
func (e *PipeEnd) Discard(n int) {
	if e.in.discard(n) {
		e.tell()
	}
}

// Read implements End.
func (e *PipeEnd) Read(p []byte) (int, error) {
	from, err := e.Peek()
	if err != nil {
		return 0, err
	}
	n := copy(p, from)
	e.Discard(n)
	return n, nil
}

// Failure implements Failer. It does not wait for what came before the reset
// to be read.
func (e *PipeEnd) Failure() error {
	if e.in.reset.Load() {
		return errPipeReset
	}
	return nil
}

// Reset implements End. What was written before it can still be read. The
// cause stays here: a peer is not told either.
func (e *PipeEnd) Reset(error) {
	if e.over {
		return
	}
	e.over, e.ready = true, nil
	e.in.abandon()
	if e.out.end(laneReset) {
		e.tell()
	}
}

// Close implements End.
func (e *PipeEnd) Close() {
	if !e.wroteEnd || !e.readEnd {
		e.Reset(nil)
		return
	}
	e.over, e.ready = true, nil
}
