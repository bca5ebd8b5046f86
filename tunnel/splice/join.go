package splice

import (
	"errors"
	"io"
	"sync/atomic"
)

// Options bound a Join.
type Options struct {
	// Budget is how many bytes, both ways together, a Join moves before it
	// queues itself again behind the others; 0 means DefaultBudget. What a
	// Pusher hands over comes on top: its own reader bounds that.
	Budget int
}

// DefaultBudget is the Budget of zero Options, in bytes.
const DefaultBudget = 256 << 10

// A Side names one of the two ends of a Join.
type Side uint8

// The ends of a Join; NoSide is neither.
const (
	NoSide Side = iota
	SideA
	SideB
)

// String is "a", "b" or "none".
func (s Side) String() string {
	switch s {
	case SideA:
		return "a"
	case SideB:
		return "b"
	}
	return "none"
}

// Result says how a Join ended.
type Result struct {
	AtoB, BtoA uint64 // bytes that the other end took
	Err        error  // nil: both directions ended cleanly
	From       Side   // the end that Err came from; NoSide after Cut
}

// ErrCut is the cause of a Cut that was given none.
var ErrCut = errors.New("splice: cut")

var errAfterEOF = errors.New("splice: bytes after the end of the stream")

// A Join moves bytes between two ends until both directions ended.
//
// An end that closes its side cleanly has the other's CloseWrite called once
// everything before it was taken. An end that fails takes the other with it by
// Reset, as soon as what it had sent and the other takes at once has moved.
type Join struct {
	// Any goroutine may read these.
	toB, toA atomic.Uint64

	// Set by Start, read-only after.
	loop   Loop
	a, b   End
	budget int
	done   func(Result)

	// Owned by the loop.
	task  Task
	ab    flow
	ba    flow
	swap  bool    // which way goes first; alternates
	depth int     // calls of ours into the ends that have not returned
	err   error   // why it ends; set once
	from  Side    // of err
	over  bool    // done was called
	probe [1]byte // see checkEnds
}

// Start joins a and b, which the Join owns from here on: their Notify and Push
// functions are its own, and Close is the last call that each end gets,
// however the Join ends. done is called once, on the loop, never from within
// Start. Start and Cut are called on the loop only.
func Start(loop Loop, a, b End, opt Options, done func(Result)) *Join {
	j := &Join{loop: loop, a: a, b: b, budget: opt.Budget, done: done}
	if j.budget <= 0 {
		j.budget = DefaultBudget
	}
	j.task.Run = j.run
	j.ab = flow{src: a, dst: b, from: SideA, to: SideB, count: &j.toB}
	j.ba = flow{src: b, dst: a, from: SideB, to: SideA, count: &j.toA}
	ready := func() { loop.Soon(&j.task) }
	for _, f := range []*flow{&j.ab, &j.ba} {
		f.lender, _ = f.src.(Lender)
		f.room, _ = f.dst.(Reserver)
		f.health, _ = f.src.(Failer)
		if p, ok := f.src.(Pusher); ok && f.lender == nil {
			p.Push(func(p []byte) int { return j.push(f, p) })
		}
		f.src.Notify(ready)
	}
	loop.Soon(&j.task)
	return j
}

// Cut resets both ends and calls done with cause; before it returns, unless it
// was called from within one of the ends. After the end it does nothing.
func (j *Join) Cut(cause error) {
	if j.over {
		return
	}
	if cause == nil {
		cause = ErrCut
	}
	j.fail(NoSide, cause)
	if j.depth > 0 {
		j.loop.Soon(&j.task)
		return
	}
	j.end()
}

// Counts returns the bytes taken so far. Any goroutine may call it.
func (j *Join) Counts() (aToB, bToA uint64) { return j.toB.Load(), j.toA.Load() }

// run is one turn of the Join.
func (j *Join) run() {
	if j.over {
		return
	}
	more := false
	if j.err == nil {
		j.depth++
		if more = j.turn(); !more {
			j.checkEnds()
		}
		j.depth--
	}
	switch {
	case j.err != nil || j.ab.closed && j.ba.closed:
		j.end()
	case more:
		j.loop.Soon(&j.task)
	}
}

// turn moves up to budget bytes. Neither way starves the other: the first gets
// half, the second the rest, the first again what is left. It reports whether
// only the budget stopped it.
func (j *Join) turn() (more bool) {
	first, second := &j.ab, &j.ba
	if j.swap {
		first, second = second, first
	}
	j.swap = !j.swap
	n, more := j.move(first, (j.budget+1)/2)
	n2, more2 := j.move(second, j.budget-n)
	n += n2
	if more && n < j.budget {
		_, more = j.move(first, j.budget-n)
	}
	return more || more2
}

// checkEnds finds the failure of an end that nothing is read from: it closed
// its side earlier, or the other end takes nothing.
func (j *Join) checkEnds() {
	for _, f := range [...]*flow{&j.ab, &j.ba} {
		if j.err != nil || j.ab.closed && j.ba.closed {
			return
		}
		if f.health != nil {
			if err := f.health.Failure(); err != nil {
				j.fail(f.from, err)
			}
			continue
		}
		if !f.eof {
			continue
		}
		switch n, err := f.src.Read(j.probe[:]); {
		case n > 0:
			j.fail(f.from, errAfterEOF)
		case err != nil && err != io.EOF && !isAgain(err):
			j.fail(f.from, err)
		}
	}
}

func (j *Join) fail(from Side, err error) {
	if j.err == nil {
		j.err, j.from = err, from
	}
}

// end gives both ends back and calls done.
func (j *Join) end() {
	j.over = true
	j.ab.release()
	j.ba.release()
	for _, e := range [...]End{j.a, j.b} {
		if p, ok := e.(Pusher); ok {
			p.Push(nil)
		}
		if j.err != nil {
			e.Reset(j.err)
		}
		e.Close()
	}
	j.done(Result{AtoB: j.toB.Load(), BtoA: j.toA.Load(), Err: j.err, From: j.from})
}

func isAgain(err error) bool { return err == ErrAgain || errors.Is(err, ErrAgain) }
