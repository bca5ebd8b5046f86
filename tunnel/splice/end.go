// Package splice joins two half-closable, non-blocking ends of byte streams.
// It is a state machine with counts and a cause: it starts no goroutine and
// knows neither TCP nor HTTP/2.
//
// Everything that belongs to one pod runs on one Loop, so ends, streams and
// joins need no locks: only Loop.Post and Loop.AfterFunc may be called from
// elsewhere.
package splice

import (
	"errors"
	"time"
)

// An End is one end of a byte stream that never blocks. Its methods are
// called on the Loop that owns it and nowhere else.
type End interface {
	// Read moves received bytes into p. It returns n > 0 with a nil error, or
	// 0 with ErrAgain (nothing there yet), io.EOF (the peer closed its side
	// cleanly) or the error that ended the stream, which for a reset matches
	// ErrReset. p must not be empty. A Read after io.EOF returns io.EOF again,
	// or the error that has ended the stream since.
	Read(p []byte) (n int, err error)

	// Write takes bytes to be sent; p may be reused when it returns. It
	// returns n < len(p) only with an error: ErrAgain when there is no room
	// for the rest, else the error that ended the stream.
	Write(p []byte) (n int, err error)

	// CloseWrite says that no more will be written. The read side stays open.
	CloseWrite() error

	// Reset ends both directions at once. The peer sees a reset, not a clean
	// end. Reset after Close, or a second Reset, does nothing.
	Reset(cause error)

	// Close gives the end back once both directions have ended cleanly; with
	// a direction still open it is a Reset. The end must not be used after.
	Close()

	// Notify sets the function that the Loop runs when a Read or Write that
	// returned ErrAgain may go on, or when the stream ended. It may run
	// without need. Setting it runs it once, soon.
	Notify(ready func())
}

// A Reserver is an End whose output can be filled in place. It should be a
// Failer too: a Join writes to it in no other way, and has no error from it.
type Reserver interface {
	// Reserve returns room for up to max bytes, or nil when there is none
	// (Notify's function runs when there is). The room is valid until Commit,
	// which must follow before anything else happens on the Loop.
	Reserve(max int) []byte
	// Commit sends the first n bytes of the reserved room; 0 gives it back.
	Commit(n int)
}

// A Pusher is an End that can hand over what it receives in place.
type Pusher interface {
	// Push makes the end call sink with bytes as they arrive, valid until
	// sink returns. sink returns how many it took; the end keeps the rest and
	// offers it through Read. Push(nil) stops it.
	Push(sink func(p []byte) (n int))
}

// A Lender is an End whose received bytes can be written on from where they
// lie. A Join then neither reads from it nor is pushed to.
type Lender interface {
	// Peek returns bytes that were received, at least one, or the error that
	// Read would return. They are valid until Discard, or until another method
	// of the end takes them.
	Peek() ([]byte, error)
	// Discard takes the first n bytes of what Peek returned.
	Discard(n int)
}

// A Failer is an End that can say without a Read that it has failed. A Join
// then mirrors the failure at once, also while the other end takes nothing.
type Failer interface {
	// Failure returns the error that ended the stream; nil while it lives or
	// after a clean end.
	Failure() error
}

// ErrAgain says that nothing can be read or written now. It is a temporary
// net.Error, so that crypto/tls carries on after it.
var ErrAgain error = again{}

type again struct{}

func (again) Error() string   { return "splice: not ready" }
func (again) Timeout() bool   { return true }
func (again) Temporary() bool { return true }

// ErrReset matches (errors.Is) every error that means the peer reset the stream.
var ErrReset = errors.New("splice: reset by peer")

// A Loop runs everything that belongs to one pod, one piece at a time.
type Loop interface {
	// Post runs f on the loop, in the order of the calls. Any goroutine may
	// call it; it never blocks. After the loop has closed f is dropped.
	Post(f func())

	// Soon queues t to run in this pass of the loop, Last to run at the end
	// of the pass, after all that Soon queued: the place to flush what many
	// streams wrote. A task that is queued already stays where it is. Both
	// are called on the loop only.
	Soon(t *Task)
	Last(t *Task)

	// AfterFunc runs f on the loop once d has passed. Any goroutine may call
	// it. stop, called on the loop, guarantees that f will not run.
	AfterFunc(d time.Duration, f func()) (stop func())

	// Scratch is a buffer of ScratchSize bytes that whatever runs on the loop
	// may use until it returns to the loop, or calls into something that may
	// use it too.
	Scratch() []byte
}

// A Hander is a Loop that can give work to another without waking its thread.
type Hander interface {
	// Hand runs f on the other loop, in one order with what is posted to it: at
	// the latest at the end of this loop's pass, and perhaps on this loop's
	// thread. It is called on the loop only.
	Hand(to Loop, f func())
}

// Hand runs f on the loop to, soon. It is called on the loop from, whose thread
// may do it if that is cheaper than to wake another.
func Hand(from, to Loop, f func()) {
	if h, ok := from.(Hander); ok {
		h.Hand(to, f)
		return
	}
	to.Post(f)
}

// ScratchSize is the length of a Loop's Scratch, in bytes.
const ScratchSize = 64 << 10

// A Task is a piece of work that a Loop queues at most once at a time.
type Task struct {
	Run    func()
	Queued bool // Owned by the Loop.
}
