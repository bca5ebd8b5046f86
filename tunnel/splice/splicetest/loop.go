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
	soon, last []*splice.Task
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

// Do runs f on the loop and waits for it.
func (l *Loop) Do(f func()) {
	done := make(chan struct{})
	l.Post(func() { defer close(done); f() })
	<-done
}

func (l *Loop) Post(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.posted = append(l.posted, f)
	l.signal()
}

func (l *Loop) Soon(t *splice.Task) { enqueue(&l.soon, t) }
func (l *Loop) Last(t *splice.Task) { enqueue(&l.last, t) }
func (l *Loop) Scratch() []byte     { return l.scratch }

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
	l.posted = nil
	l.mu.Unlock()
	for _, f := range posted {
		f()
	}
	worked := len(posted) > 0
	for len(l.soon) > 0 || len(l.last) > 0 {
		worked = true
		if t := dequeue(&l.soon); t != nil {
			t.Run()
			continue
		}
		dequeue(&l.last).Run()
	}
	return worked
}

func enqueue(q *[]*splice.Task, t *splice.Task) {
	if !t.Queued {
		t.Queued = true
		*q = append(*q, t)
	}
}

func dequeue(q *[]*splice.Task) *splice.Task {
	if len(*q) == 0 {
		return nil
	}
	t := (*q)[0]
	*q = (*q)[1:]
	t.Queued = false
	return t
}
