package splice_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ztun/ztun/tunnel/splice"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// steps is a splice.Loop that runs when it is told to, on the test's goroutine.
type steps struct {
	posted     []func()
	posts      int // so far
	soon, last []*splice.Task
	lastRun    *splice.Task
	scratch    [splice.ScratchSize]byte
}

func (l *steps) Post(f func())                          { l.posted = append(l.posted, f); l.posts++ }
func (l *steps) AfterFunc(time.Duration, func()) func() { panic("not used") }
func (l *steps) Soon(t *splice.Task)                    { l.queue(&l.soon, t) }
func (l *steps) Last(t *splice.Task)                    { l.queue(&l.last, t) }
func (l *steps) Scratch() []byte                        { return l.scratch[:] }
func (l *steps) queue(q *[]*splice.Task, t *splice.Task) {
	if !t.Queued {
		t.Queued = true
		*q = append(*q, t)
	}
}

// step runs one task, and reports whether there was one.
func (l *steps) step() bool {
	if len(l.posted) > 0 {
		f := l.posted[0]
		l.posted = append(l.posted[:0], l.posted[1:]...)
		f()
		return true
	}
	if len(l.soon) == 0 {
		return false
	}
	t := l.soon[0]
	l.soon = append(l.soon[:0], l.soon[1:]...)
	t.Queued = false
	l.lastRun = t
	t.Run()
	return true
}

// run runs until nothing is queued.
func (l *steps) run(t testing.TB) {
	t.Helper()
	for n := 0; l.step(); n++ {
		if n > 1e6 {
			t.Fatal("the loop does not come to rest")
		}
	}
}

// fake is an End that a test plays the peer of. It holds the Join to the
// contract of End.
type fake struct {
	t    testing.TB
	name string
	loop splice.Loop
	rng  *rand.Rand // nil: no whims

	// What the peer sent and the Join has not read, and what comes then.
	in   []byte
	end  error // io.EOF or a failure; nil: more may come
	sink func([]byte) int

	// What the Join wrote, and how much more it may write.
	out  []byte
	room int

	task        splice.Task
	ready       func()
	notifyEarly bool // calls ready from within Read and Write
	closedWrite bool
	reset       error
	closed      bool
	reserved    []byte
	onWrite     func() // runs within Write
	read        int    // bytes the Join took
}

func newFake(t testing.TB, name string, loop splice.Loop) *fake {
	f := &fake{t: t, name: name, loop: loop}
	f.task.Run = func() {
		if f.ready != nil && !f.closed {
			f.ready()
		}
	}
	return f
}

func (f *fake) enter(what string) {
	f.t.Helper()
	if f.closed {
		f.t.Errorf("%s: %s after Close", f.name, what)
	}
	if f.reserved != nil {
		f.t.Errorf("%s: %s between Reserve and Commit", f.name, what)
	}
}

func (f *fake) whim(n int) int {
	if f.rng == nil || n == 0 {
		return n
	}
	return f.rng.IntN(n + 1)
}

func (f *fake) Read(p []byte) (int, error) {
	f.enter("Read")
	if len(p) == 0 {
		f.t.Errorf("%s: Read into nothing", f.name)
	}
	f.early()
	if f.reset != nil {
		return 0, io.ErrClosedPipe
	}
	if len(f.in) > 0 {
		n := f.whim(copy(p, f.in))
		if n == 0 {
			f.wake()
			return 0, splice.ErrAgain
		}
		f.in = f.in[n:]
		f.read += n
		return n, nil
	}
	if f.end != nil {
		return 0, f.end
	}
	return 0, splice.ErrAgain
}

func (f *fake) Write(p []byte) (int, error) {
	f.enter("Write")
	f.early()
	if f.onWrite != nil {
		f.onWrite()
	}
	if err := f.writable(); err != nil {
		return 0, err
	}
	n := f.whim(min(len(p), f.room))
	f.out = append(f.out, p[:n]...)
	f.room -= n
	if n < len(p) {
		if f.room > 0 {
			f.wake()
		}
		return n, splice.ErrAgain
	}
	return n, nil
}

func (f *fake) writable() error {
	switch {
	case f.end != nil && f.end != io.EOF:
		return f.end
	case f.reset != nil:
		return io.ErrClosedPipe
	case f.closedWrite:
		f.t.Errorf("%s: Write after CloseWrite", f.name)
		return io.ErrClosedPipe
	}
	return nil
}

func (f *fake) CloseWrite() error {
	f.enter("CloseWrite")
	if err := f.writable(); err != nil {
		return err
	}
	f.closedWrite = true
	return nil
}

func (f *fake) Reset(cause error) {
	f.enter("Reset")
	if f.reset == nil {
		f.reset = fmt.Errorf("reset: %w", cause)
	}
}

func (f *fake) Close() {
	f.enter("Close")
	f.closed = true
	if f.reset == nil && (f.end != io.EOF || !f.closedWrite) {
		f.t.Errorf("%s: Close with a direction still open", f.name)
	}
}

func (f *fake) Notify(ready func()) {
	f.enter("Notify")
	f.ready = ready
	f.wake()
}

func (f *fake) wake() { f.loop.Soon(&f.task) }

// early calls ready when it should not be: the Join must bear it.
func (f *fake) early() {
	if f.notifyEarly && f.ready != nil {
		f.ready()
	}
}

// send is the peer sending p.
func (f *fake) send(p []byte) {
	if f.sink != nil && len(f.in) == 0 && f.end == nil {
		n := f.sink(p)
		f.read += n
		p = p[n:]
	}
	f.in = append(f.in, p...)
	f.wake()
}

// stop is the peer closing its side, or failing; a failure loses what the
// Join has not read if lose is set.
func (f *fake) stop(err error, lose bool) {
	if f.end == nil || f.end == io.EOF && err != io.EOF {
		f.end = err
	}
	if lose {
		f.in = nil
	}
	f.wake()
}

// allow gives the Join room for n more bytes.
func (f *fake) allow(n int) {
	f.room += n
	f.wake()
}

// The fast paths are types of their own, so that an end has them or not.

type reserver struct{ *fake }

func (f reserver) Reserve(n int) []byte {
	f.enter("Reserve")
	if n <= 0 {
		f.t.Errorf("%s: Reserve of %d", f.name, n)
	}
	if n = min(n, f.room); n == 0 || f.closedWrite || f.reset != nil || f.end != nil && f.end != io.EOF {
		return nil
	}
	if n = f.whim(n); n == 0 {
		f.wake()
		return nil
	}
	f.reserved = make([]byte, n)
	return f.reserved
}

func (f reserver) Commit(n int) {
	if f.reserved == nil || n > len(f.reserved) {
		f.t.Errorf("%s: Commit of %d without room", f.name, n)
		return
	}
	f.out = append(f.out, f.reserved[:n]...)
	f.room -= n
	f.reserved = nil
}

type pusher struct{ *fake }

func (f pusher) Push(sink func([]byte) int) {
	f.enter("Push")
	f.sink = sink
}

type lender struct{ *fake }

func (f lender) Peek() ([]byte, error) {
	f.enter("Peek")
	f.early()
	switch {
	case f.reset != nil:
		return nil, io.ErrClosedPipe
	case len(f.in) > 0:
		if n := f.whim(len(f.in)); n > 0 {
			return f.in[:n], nil
		}
		f.wake()
		return nil, splice.ErrAgain
	case f.end != nil:
		return nil, f.end
	}
	return nil, splice.ErrAgain
}

func (f lender) Discard(n int) {
	f.enter("Discard")
	f.in = f.in[n:]
	f.read += n
}

// noPush is a Pusher that is not to push.
type noPush struct{ *fake }

func (f noPush) Push(sink func([]byte) int) {
	if sink != nil {
		f.t.Errorf("%s: is to push what it lends", f.name)
	}
}

type failer struct{ *fake }

func (f failer) Failure() error {
	f.enter("Failure")
	if f.end != io.EOF {
		return f.end
	}
	return nil
}

// kinds are the ends with and without their fast paths.
var kinds = []struct {
	name string
	end  func(*fake) splice.End
}{
	{"plain", func(f *fake) splice.End { return f }},
	{"failer", func(f *fake) splice.End {
		return struct {
			*fake
			splice.Failer
		}{f, failer{f}}
	}},
	{"stream", func(f *fake) splice.End {
		return struct {
			*fake
			splice.Reserver
			splice.Pusher
			splice.Failer
		}{f, reserver{f}, pusher{f}, failer{f}}
	}},
	{"reserver", func(f *fake) splice.End {
		return struct {
			*fake
			splice.Reserver
		}{f, reserver{f}}
	}},
	{"lender", func(f *fake) splice.End {
		return struct {
			*fake
			splice.Reserver
			splice.Lender
			splice.Pusher
			splice.Failer
		}{f, reserver{f}, lender{f}, noPush{f}, failer{f}}
	}},
	{"pusher", func(f *fake) splice.End {
		return struct {
			*fake
			splice.Pusher
		}{f, pusher{f}}
	}},
}

// A rig is a Join between two fakes.
type rig struct {
	t      testing.TB
	loop   *steps
	a, b   *fake
	join   *splice.Join
	result *splice.Result
}

var errReset = fmt.Errorf("test: %w", splice.ErrReset)

func newRig(t testing.TB, kindA, kindB func(*fake) splice.End, opt splice.Options) *rig {
	r := &rig{t: t, loop: &steps{}}
	r.a, r.b = newFake(t, "a", r.loop), newFake(t, "b", r.loop)
	r.join = splice.Start(r.loop, kindA(r.a), kindB(r.b), opt, func(res splice.Result) {
		if r.result != nil {
			t.Error("done was called twice")
		}
		if !r.a.closed || !r.b.closed {
			t.Error("done was called before both ends were closed")
		}
		r.result = &res
	})
	if r.result != nil {
		t.Error("done was called from within Start")
	}
	return r
}

// want checks how the Join ended: cleanly, or by err of side.
func (r *rig) want(err error, side splice.Side) {
	r.t.Helper()
	if r.result == nil {
		r.t.Fatalf("the join goes on, want it ended by %v of %v", err, side)
	}
	if !errors.Is(r.result.Err, err) || r.result.From != side {
		r.t.Errorf("ended by %v of %v, want %v of %v", r.result.Err, r.result.From, err, side)
	}
	if ab, ba := r.join.Counts(); ab != r.result.AtoB || ba != r.result.BtoA {
		r.t.Errorf("counts %d %d, result %d %d", ab, ba, r.result.AtoB, r.result.BtoA)
	}
	for _, e := range []*fake{r.a, r.b} {
		if reset := e.reset != nil; reset != (err != nil) {
			r.t.Errorf("%s: reset %v after %v", e.name, reset, err)
		}
		if err != nil && !errors.Is(e.reset, err) {
			r.t.Errorf("%s: reset with %v, want %v", e.name, e.reset, err)
		}
	}
}

// open checks that the Join goes on and has done nothing final to the ends.
func (r *rig) open() {
	r.t.Helper()
	if r.result != nil || r.a.reset != nil || r.b.reset != nil {
		r.t.Fatalf("the join ended: %+v", r.result)
	}
}
