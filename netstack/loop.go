package netstack

import (
	"time"

	"github.com/ztun/ztun/tunnel/splice"
)

// A waker is something with work to do on the loop: a flow whose endpoint
// changed, or a listener with a connection to take.
type waker interface{ woken() }

var _ splice.Loop = (*reader)(nil)

// Post runs f on the loop. See splice.Loop.
func (r *reader) Post(f func()) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.posted = append(r.posted, f)
	r.mu.Unlock()
	r.wake()
}

// ready queues w to be woken on the loop. Any goroutine may call it, also
// with locks of gVisor held: it only appends and, at most, writes an eventfd.
func (r *reader) ready(w waker) {
	r.mu.Lock()
	r.wakers = append(r.wakers, w)
	r.mu.Unlock()
	r.wake()
}

func (r *reader) Soon(t *splice.Task) { r.soon.push(t) }
func (r *reader) Last(t *splice.Task) { r.last.push(t) }

func (r *reader) Scratch() []byte { return r.scratch }

func (r *reader) AfterFunc(d time.Duration, f func()) (stop func()) {
	t := r.timers.start(d, f)
	return func() { t.Stop() }
}

// tasks is a queue that reuses its storage.
type tasks struct {
	list []*splice.Task
	head int
}

func (q *tasks) len() int { return len(q.list) - q.head }

func (q *tasks) push(t *splice.Task) {
	if t.Queued {
		return
	}
	t.Queued = true
	if q.head > 0 && len(q.list) == cap(q.list) {
		n := copy(q.list, q.list[q.head:])
		clear(q.list[n:])
		q.list, q.head = q.list[:n], 0
	}
	q.list = append(q.list, t)
}

// run runs n tasks from the front.
func (q *tasks) run(n int) {
	for ; n > 0; n-- {
		t := q.list[q.head]
		q.list[q.head] = nil
		q.head++
		if q.head == len(q.list) {
			q.list, q.head = q.list[:0], 0
		}
		t.Queued = false
		t.Run()
	}
}

// maxRounds bounds how often a pass goes round before the flows' output is
// flushed and the devices are read again.
const maxRounds = 4

// pass runs what is queued: posted functions, flows that changed and tasks,
// and after them the flushes.
func (r *reader) pass() {
	for range maxRounds {
		posted, wakers := r.take()
		n := r.soon.len()
		if len(posted)+len(wakers)+n == 0 {
			break
		}
		for i, f := range posted {
			posted[i] = nil
			f()
		}
		for i, w := range wakers {
			wakers[i] = nil
			w.woken()
		}
		r.soon.run(n)
	}
	r.last.run(r.last.len())
}

// take swaps the shared queues for empty ones.
func (r *reader) take() ([]func(), []waker) {
	r.mu.Lock()
	posted, wakers := r.posted, r.wakers
	r.posted, r.sparePosted = r.sparePosted[:0], posted
	r.wakers, r.spareWakers = r.spareWakers[:0], wakers
	r.mu.Unlock()
	return posted, wakers
}

// idle says that nothing is queued.
func (r *reader) idle() bool {
	if r.soon.len()+r.last.len() > 0 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.posted)+len(r.wakers) == 0 && !r.closed
}
