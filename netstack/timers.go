package netstack

import (
	"container/heap"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// timers are the deadlines of everything on one reader, gVisor's among them,
// whose clock it is. Each endpoint has up to three (keepalive, retransmission,
// tail loss probe), most of which run for long and never do anything. One of the
// runtime's takes 150 bytes, lies about for a while when it was stopped, and makes
// a goroutine that wakes another thread each time it goes off; one of these takes
// 40, and goes off on the reader, which sleeps no longer than to the first.
type timers struct {
	// Set by init, read-only after.
	reader *reader
	base   time.Time // moments are in nanoseconds since

	// mu guards the field below, and all timers.
	mu    sync.Mutex
	queue timerQueue
}

// A timer calls f on the loop.
type timer struct {
	set   *timers
	f     func()
	due   int64
	index int32 // in the queue; -1: not in it
}

var (
	_ tcpip.Clock = (*timers)(nil)
	_ tcpip.Timer = (*timer)(nil)
)

func (t *timers) init(r *reader) { t.reader, t.base = r, time.Now() }

// Now and NowMonotonic are of gVisor's clock.
func (t *timers) Now() time.Time { return time.Now() }

func (t *timers) NowMonotonic() tcpip.MonotonicTime {
	return tcpip.MonotonicTime{}.Add(time.Since(t.base))
}

// AfterFunc is of gVisor's clock. f runs on the loop and not, as it is used
// to, on a goroutine of its own: it takes locks that nobody holds while
// waiting for the loop.
func (t *timers) AfterFunc(d time.Duration, f func()) tcpip.Timer { return t.start(d, f) }

// start may be called from anywhere.
func (t *timers) start(d time.Duration, f func()) *timer {
	m := &timer{set: t, f: f, index: -1}
	m.Reset(d)
	return m
}

// Keepalives and other long waits are rounded up to coarse, so that the reader
// of many idle connections wakes a few times a second and no more.
const (
	long    = 5 * time.Second
	forever = 100 * 365 * 24 * time.Hour
	coarse  = 250 * time.Millisecond
)

// Reset makes the timer go off once d has passed, and at no other time.
func (m *timer) Reset(d time.Duration) {
	t := m.set
	now := int64(time.Since(t.base))
	t.mu.Lock()
	m.due = now + int64(min(max(0, d), forever))
	if d >= long {
		m.due += int64(coarse) - m.due%int64(coarse)
	}
	if m.index < 0 {
		heap.Push(&t.queue, m)
	} else {
		heap.Fix(&t.queue, int(m.index))
	}
	first := m.index == 0
	t.mu.Unlock()
	if first {
		t.reader.wake()
	}
}

// Stop reports whether the timer would have gone off. Called on the loop it
// guarantees that it does not.
func (m *timer) Stop() bool {
	t := m.set
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.index < 0 {
		return false
	}
	heap.Remove(&t.queue, int(m.index))
	return true
}

// next returns how long it is until the first timer goes off, and false if
// there is none.
func (t *timers) next(now time.Time) (time.Duration, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) == 0 {
		return 0, false
	}
	return max(0, time.Duration(t.queue[0].due)-now.Sub(t.base)), true
}

// maxDue bounds the timers that go off before packets get their turn.
const maxDue = 256

// run calls what is due. It runs on the loop, between batches: what gVisor does
// then locks endpoints.
func (t *timers) run(now time.Time) {
	for range maxDue {
		m := t.pop(int64(now.Sub(t.base)))
		if m == nil {
			return
		}
		m.f()
	}
}

// pop takes out the first timer, if it is due at now.
func (t *timers) pop(now int64) *timer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) == 0 || t.queue[0].due > now {
		return nil
	}
	return heap.Pop(&t.queue).(*timer)
}

// A timerQueue is a heap.Interface.
type timerQueue []*timer

func (q timerQueue) Len() int           { return len(q) }
func (q timerQueue) Less(i, j int) bool { return q[i].due < q[j].due }

func (q timerQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = int32(i), int32(j)
}

func (q *timerQueue) Push(x any) {
	m := x.(*timer)
	m.index = int32(len(*q))
	*q = append(*q, m)
}

func (q *timerQueue) Pop() any {
	last := len(*q) - 1
	m := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	m.index = -1
	// What a burst of connections has left is given back.
	if cap(*q) > 1024 && len(*q) < cap(*q)/4 {
		*q = append(make(timerQueue, 0, cap(*q)/2), *q...)
	}
	return m
}
