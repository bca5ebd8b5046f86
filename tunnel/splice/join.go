package splice

import (
	"errors"
	"sync/atomic"
)

// Options bound a Join.
type Options struct {
	// Budget is how many bytes, both ways together, a Join moves before it
	// queues itself again behind the others; 0 means DefaultBudget.
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

// A Join moves bytes between two ends until both directions ended.
type Join struct {
	toB, toA atomic.Uint64
}

// Start joins a and b, which the Join owns from here on: their Notify and Push
// functions are its own, and Close is the last call that each end gets,
// however the Join ends. done is called once, on the loop, never from within
// Start. Start and Cut are called on the loop only.
func Start(loop Loop, a, b End, opt Options, done func(Result)) *Join { panic("splice: being written") }

// Cut resets both ends and calls done with cause, before it returns unless it
// was called from within one of the ends. After the end it does nothing.
func (j *Join) Cut(cause error) { panic("splice: being written") }

// Counts returns the bytes taken so far. Any goroutine may call it.
func (j *Join) Counts() (aToB, bToA uint64) { return j.toB.Load(), j.toA.Load() }
