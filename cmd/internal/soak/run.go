package soak

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// A way is what is known of one direction of a connection while it lives.
type way struct {
	sent    atomic.Int64 // bytes that writes took
	got     atomic.Int64 // bytes that were read, and found right
	writing atomic.Bool  // a write has not returned
	reading atomic.Bool  // a read has not returned
	ended   atomic.Bool  // the sender has closed its side
	heard   atomic.Bool  // the reader has read the end
}

// A play is a script that is being played.
type play struct {
	// Set before it begins, read-only after.
	script  *script
	route   string
	bytes   *atomic.Int64 // those of all plays, as they are read
	begin   time.Time
	policed bool             // policies hold on the route
	frail   bool             // a reset may be lost on the route
	ways    [2]way           // by the side that sends
	read    [2]chan struct{} // one slot: a side has read more, or the end
	over    [2]chan struct{} // closed when a side has been reset or has failed
	done    chan struct{}    // closed when the server's side is done
	ended   chan struct{}    // closed when both are

	dialled atomic.Bool
	begun   [2]atomic.Int64 // writes, and the end, that a side has begun
	aborted [2]atomic.Bool  // a side has been reset, or has learnt of it
	cut     atomic.Bool     // a policy forbids it: it must end
	cutAt   time.Time       // set before cut

	// mu guards the fields below.
	mu     sync.Mutex
	err    error
	conns  [2]conn
	served bool
	once   [2]sync.Once
}

func newPlay(s *script, route string, bytes *atomic.Int64) *play {
	p := &play{script: s, route: route, bytes: bytes, begin: time.Now(), done: make(chan struct{}), ended: make(chan struct{})}
	p.ways[0].reading.Store(true) // whoever accepts waits for the first word
	for i := range p.read {
		p.read[i], p.over[i] = make(chan struct{}, 1), make(chan struct{})
	}
	return p
}

// run plays a side on c, to the end. It closes c.
func (p *play) run(i int, c conn) {
	p.mu.Lock()
	p.conns[i] = c
	p.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { p.reader(i, c) })
	both.Go(func() { p.writer(i, c) })
	both.Wait()
	_ = c.Close()
}

// fail keeps the first thing that went wrong.
func (p *play) fail(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = fmt.Errorf("%v connection %d over %s: %w", p.script.kind, p.script.id, p.route, fmt.Errorf(format, args...))
	}
}

func (p *play) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// abort ends a side before its time, and c with it.
func (p *play) abort(i int, c conn) {
	p.aborted[i].Store(true)
	p.once[i].Do(func() { close(p.over[i]) })
	c.Reset()
}

// kill ends both sides, of which one may hang.
func (p *play) kill() {
	p.mu.Lock()
	conns := p.conns
	p.mu.Unlock()
	for i, c := range conns {
		if c != nil {
			p.abort(i, c)
		}
	}
}

// broke judges an error of side i.
func (p *play) broke(i int, c conn, what string, err error) {
	if !p.aborted[i].Load() {
		in, out := &p.ways[1-i], &p.ways[i]
		switch {
		case !errors.Is(err, errReset):
			p.fail("%s of the %s after %d bytes read and %d sent: %w", what, sideName(i), in.got.Load(), out.sent.Load(), err)
		case !p.mayEnd():
			p.fail("%s of the %s after %d bytes read and %d sent: reset by nobody: %w", what, sideName(i), in.got.Load(), out.sent.Load(), err)
		}
	}
	p.abort(i, c)
}

// mayEnd says that somebody has reset the connection.
func (p *play) mayEnd() bool {
	return p.cut.Load() || p.script.aborts() && (p.aborted[0].Load() || p.aborted[1].Load())
}

func sideName(i int) string { return [...]string{"client", "server"}[i] }

// reader reads what the other side sends, and checks it.
func (p *play) reader(i int, c conn) {
	s, w := &p.script.sides[i], &p.ways[1-i]
	stops, total := s.stops, p.script.sides[1-i].total()
	room := make([]byte, s.piece)
	paced := 0 // bytes since the last rest
	if i == 1 {
		w.got.Store(word) // was read to find the script
		p.tell(i)
	}
	for {
		for len(stops) > 0 && w.got.Load() >= stops[0].at {
			if stops[0].shrink > 0 {
				c.Shrink(stops[0].shrink)
			}
			p.sleep(i, stops[0].d)
			stops = stops[1:]
		}
		w.reading.Store(true)
		n, err := c.Read(room)
		w.reading.Store(false)
		if n > 0 {
			at := w.got.Load()
			if bad := check(room[:n], p.script.id, 1-i, at); bad != nil {
				p.fail("read of the %s: %w", sideName(i), bad)
				p.abort(i, c)
				return
			}
			w.got.Add(int64(n))
			p.bytes.Add(int64(n))
			p.tell(i)
			if paced += n; paced >= s.piece {
				paced = 0
				p.sleep(i, s.pace)
			}
		}
		switch {
		case err == io.EOF:
			p.eof(i, c, w, total)
			return
		case err != nil:
			p.broke(i, c, "read", err)
			return
		}
	}
}

// eof judges a clean end.
func (p *play) eof(i int, c conn, w *way, total int64) {
	if got := w.got.Load(); got != total || !w.ended.Load() {
		if p.writerHeard(i) {
			return
		}
		p.fail("read of the %s: the stream ended after %d bytes of %d, %d of them sent, closed %v", sideName(i), got, total, w.sent.Load(), w.ended.Load())
		p.abort(i, c)
		return
	}
	w.heard.Store(true)
	p.tell(i)
}

// writerHeard says that the side's writer was told of a reset: the kernel tells
// only one, and gives the other a clean end.
func (p *play) writerHeard(i int) bool {
	p.sleep(i, time.Second)
	return p.aborted[i].Load() && p.mayEnd()
}

// tell wakes the side's writer.
func (p *play) tell(i int) {
	select {
	case p.read[i] <- struct{}{}:
	default:
	}
}

// sleep waits for d, or for the side's end.
func (p *play) sleep(i int, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-p.over[i]:
	}
}

// writer sends what the side has to send, and ends it.
func (p *play) writer(i int, c conn) {
	s, out, in := &p.script.sides[i], &p.ways[i], &p.ways[1-i]
	room := make([]byte, s.chunk)
	for _, t := range s.turns {
		for !in.heard.Load() && (t.after == allOfIt || in.got.Load() < t.after) {
			select {
			case <-p.read[i]:
			case <-p.over[i]:
				return
			}
		}
		p.sleep(i, t.rest)
		if !p.send(i, c, out, t.send, room) {
			return
		}
	}
	if s.end == endReset {
		p.abort(i, c)
		return
	}
	out.ended.Store(true)
	p.begun[i].Add(1)
	if err := c.CloseWrite(); err != nil && !p.aborted[i].Load() && !p.mayEnd() {
		p.fail("close of the %s: %w", sideName(i), err)
	}
}

func (p *play) send(i int, c conn, w *way, n int64, room []byte) bool {
	for n > 0 {
		b := room[:min(n, int64(len(room)))]
		fill(b, p.script.id, i, w.sent.Load())
		p.begun[i].Add(1)
		w.writing.Store(true)
		m, err := c.Write(b)
		w.writing.Store(false)
		w.sent.Add(int64(m))
		n -= int64(m)
		if err != nil {
			p.broke(i, c, "write", err)
			return false
		}
	}
	return true
}
