// Package splicetest has in-memory stand-ins for tests: a Loop on a goroutine
// and pairs of connected Ends with bounded buffers.
package splicetest

import (
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
)

// Loop is a splice.Loop on one goroutine. It works inside testing/synctest.
type Loop struct {
	wake    chan struct{}
	done    chan struct{}
	scratch []byte

	// mu guards the fields below.
	mu     sync.Mutex
	posted []func()
	closed bool

	// Owned by run.
	soon, last queue
	spare      []func() // storage for posted
}

var _ splice.Loop = (*Loop)(nil)

// NewLoop starts a loop; Close ends it.
func NewLoop() *Loop {
	l := &Loop{wake: make(chan struct{}, 1), done: make(chan struct{}), scratch: make([]byte, splice.ScratchSize)}
	go l.run()
	return l
}

// Close drops what is queued and waits for the loop to end.
func (l *Loop) Close() {
	l.mu.Lock()
	l.closed = true
	l.posted = nil
	l.mu.Unlock()
	l.signal()
	<-l.done
}

// Do runs f on the loop and waits for it, or for the loop to end.
func (l *Loop) Do(f func()) {
	done := make(chan struct{})
	l.Post(func() { defer close(done); f() })
	select {
	case <-done:
	case <-l.done:
	}
}

// Post implements splice.Loop.
func (l *Loop) Post(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.posted = append(l.posted, f)
	l.signal()
}

// Soon implements splice.Loop.
func (l *Loop) Soon(t *splice.Task) { l.soon.push(t) }

// Last implements splice.Loop.
func (l *Loop) Last(t *splice.Task) { l.last.push(t) }

// Scratch implements splice.Loop.
func (l *Loop) Scratch() []byte { return l.scratch }

// AfterFunc implements splice.Loop.
func (l *Loop) AfterFunc(d time.Duration, f func()) (stop func()) {
	stopped := false // Owned by the loop.
	t := time.AfterFunc(d, func() {
		l.Post(func() {
			if !stopped {
				f()
			}
		})
	})
	return func() { stopped = true; t.Stop() }
}

func (l *Loop) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *Loop) run() {
	defer close(l.done)
	for range l.wake {
		for l.pass() {
		}
		l.mu.Lock()
		closed := l.closed
		l.mu.Unlock()
		if closed {
			return
		}
	}
}

// pass runs what is queued, and reports whether there was anything.
func (l *Loop) pass() bool {
	l.mu.Lock()
	posted := l.posted
	l.posted, l.spare = l.spare[:0], posted
	l.mu.Unlock()
	for i, f := range posted {
		posted[i] = nil
		f()
	}
	worked := len(posted) > 0
	for {
		t := l.soon.pop()
		if t == nil {
			t = l.last.pop()
		}
		if t == nil {
			return worked
		}
		worked = true
		t.Run()
	}
}

// A queue of tasks reuses its storage once it has run empty.
type queue struct {
	tasks []*splice.Task
	head  int
}

func (q *queue) push(t *splice.Task) {
	if !t.Queued {
		t.Queued = true
		q.tasks = append(q.tasks, t)
	}
}

func (q *queue) pop() *splice.Task {
	if len(q.tasks) == 0 {
		return nil
	}
	t := q.tasks[q.head]
	q.tasks[q.head] = nil
	if q.head++; q.head == len(q.tasks) {
		q.tasks, q.head = q.tasks[:0], 0
	}
	t.Queued = false
	return t
}
