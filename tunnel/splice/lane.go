package splice

import (
	"sync"
	"sync/atomic"
)

// A lane is one direction of a Pipe: a queue of chunks between one writer and
// one reader, each on a loop of its own.
type lane struct {
	budget *Budget
	// reset is set with laneReset, for those who ask nothing else.
	reset atomic.Bool

	// mu guards the fields below. No byte is copied under it.
	mu          sync.Mutex
	front, back *chunk
	held        int   // capacity of the chunks in the queue, in bytes
	window      int   // the writer waits once held has come to this
	read        int64 // bytes
	full        int64 // read, when the window was last found full; -1: never
	step        int   // of the next chunk
	filling     bool  // the writer holds room in back
	wantData    bool  // the reader waits for bytes
	wantRoom    bool  // the writer waits for room
	state       laneState
}

// laneState is what comes behind the bytes of a lane.
type laneState uint8

const (
	laneOpen      laneState = iota
	laneEnded               // the writer has ended cleanly
	laneReset               // the writer has reset the stream
	laneAbandoned           // nobody reads any more
)

// A direction takes firstWindow bytes before its writer waits, and up to
// maxWindow once its reader has shown that it reads.
const (
	firstWindow = 64 << 10
	maxWindow   = 512 << 10
)

func newLane(b *Budget) *lane { return &lane{budget: b, window: firstWindow, full: -1} }

// reserve returns room for the writer and the chunk that it is in; nil if
// there is none.
func (l *lane) reserve() (c *chunk, room []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state != laneOpen {
		return nil, nil
	}
	if c := l.back; c != nil && c.tail <= len(c.data)*3/4 {
		l.filling = true
		return c, c.data[c.tail:]
	}
	if l.held >= l.window && !l.grow() {
		l.wantRoom = true
		return nil, nil
	}
	if c = l.budget.chunk(l.step, l.held == 0); c == nil {
		l.wantRoom = true
		return nil, nil
	}
	return c, c.data
}

// grow doubles the window if the reader has taken as much since it was last
// found full.
func (l *lane) grow() bool {
	switch {
	case l.full < 0:
		l.full = l.read
		return false
	case l.window >= maxWindow || l.read-l.full < int64(l.window):
		return false
	}
	l.window *= 2
	l.full = l.read
	return true
}

// commit queues the first n bytes of the room that reserve gave in c. It
// reports whether the reader waits for them.
func (l *lane) commit(c *chunk, n int) (wake bool) {
	l.mu.Lock()
	queued := l.filling
	l.filling = false
	c.tail += n
	l.adapt(c, n)
	switch {
	case l.state == laneAbandoned || c.head == c.tail:
		if queued { // the reader has taken, or dropped, all else
			l.front, l.back = nil, nil
			l.held -= len(c.data)
		}
		l.mu.Unlock()
		l.budget.free(c)
		return false
	case !queued:
		l.push(c)
	}
	wake = l.wantData
	l.wantData = false
	l.mu.Unlock()
	return wake
}

// adapt chooses the size of the next chunk: a larger one after one that was
// filled, a smaller one when that would have been enough.
func (l *lane) adapt(c *chunk, n int) {
	switch {
	case n == 0:
	case c.tail == len(c.data):
		l.step = min(c.step+1, len(pools)-1)
	case l.step > 0 && n <= chunkSizes[l.step-1]:
		l.step--
	}
}

func (l *lane) push(c *chunk) {
	if l.back == nil {
		l.front = c
	} else {
		l.back.next = c
	}
	l.back = c
	l.held += len(c.data)
}

// peek returns bytes for the reader or, if there are none, what comes then.
func (l *lane) peek() ([]byte, laneState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.front; c != nil && c.head < c.tail {
		return c.data[c.head:c.tail], l.state
	}
	l.wantData = true
	return nil, l.state
}

// discard takes n bytes from the front, all of one chunk. It reports whether
// the writer waits for the room.
func (l *lane) discard(n int) (wake bool) {
	l.mu.Lock()
	c := l.front
	c.head += n
	l.read += int64(n)
	if c.head < c.tail || c == l.back && l.filling {
		l.mu.Unlock()
		return false
	}
	if l.front = c.next; l.front == nil {
		l.back = nil
	}
	l.held -= len(c.data)
	// Half a window at a time, not chunk by chunk.
	if l.wantRoom && l.held <= l.window/2 {
		l.wantRoom = false
		wake = true
	}
	l.mu.Unlock()
	l.budget.free(c)
	return wake
}

// end says that the writer writes no more. It reports whether the reader is to
// be told.
func (l *lane) end(s laneState) (wake bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = s
	l.reset.Store(s == laneReset)
	wake = l.wantData || s == laneReset
	l.wantData = false
	return wake
}

// abandon drops what is queued: nobody will read it.
func (l *lane) abandon() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = laneAbandoned
	for c := l.front; c != nil; {
		next := c.next
		if c == l.back && l.filling {
			return // the writer gives it back
		}
		l.held -= len(c.data)
		l.budget.free(c)
		c, l.front = next, next
	}
	l.back = nil
}
