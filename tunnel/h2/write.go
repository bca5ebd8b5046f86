package h2

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

const (
	frameHeadLen = 9

	// bulkFrame is the payload of a DATA frame of a busy stream: head, four
	// TLS records' overhead (22 bytes each) and payload fit one TCP
	// super-segment of 45 MSS, for either IP version with timestamps. Several
	// busy streams have the same: a packet costs as much as the bytes in it, and
	// with half of it 8 streams took half as much CPU again for a byte.
	bulkFrame = 65374 - frameHeadLen - 4*22

	// flushAt is when pending output is written without waiting for the end
	// of the pass.
	flushAt = 60 << 10
	// maxPending is when streams must wait for t to take more. One frame may
	// exceed it.
	maxPending = 256 << 10
	// minShare is what a stream that had to wait may send at least in its
	// turn: a whole frame. overtake is what one that did not may while others wait.
	minShare = 64 << 10
	overtake = 4 << 10

	// waitingUpdates is how many WINDOW_UPDATEs a peer may send for each DATA
	// frame of ours: a stream's and the connection's, twice.
	waitingUpdates = 4
)

// output is what has been written and not yet been taken by t.
type output struct {
	buf     []byte
	off     int         // buf[:off] has been taken
	task    splice.Task // flushes at the end of the pass
	blocked bool        // t took less than it was given
	over    bool        // the bound for control frames was exceeded

	reserved   *Stream // the last to Reserve
	reservedAt int     // where its frame head begins

	// Streams that wait for room or for the connection's window, in order.
	waiters []*Stream
	// A turn lasts until the flush at the end of a pass. granted is the room
	// that those who were woken may still use in it.
	turn    uint64
	granted int
}

// queued is how many bytes wait for t.
func (c *Conn) queued() int { return len(c.out.buf) - c.out.off }

// appendBytes queues control bytes.
func (c *Conn) appendBytes(p []byte) {
	if c.state != stateOpen {
		return
	}
	if c.queued() > maxPending+bulkFrame+frameHeadLen+c.cfg.Limits.QueuedControls && !c.out.over {
		c.out.over = true
		c.overLimit(LimitReplies)
		return
	}
	c.room(len(p))
	c.out.buf = append(c.out.buf, p...)
	c.flushLater()
}

// frameWriter is the io.Writer below the Framer.
type frameWriter struct{ c *Conn }

func (w frameWriter) Write(p []byte) (int, error) {
	w.c.appendBytes(p)
	return len(p), nil
}

func (c *Conn) flushLater() {
	if !c.out.blocked {
		c.loop.Last(&c.out.task)
	}
}

// lastTask ends a turn: what is queued goes out, then those who waited go on.
func (c *Conn) lastTask() {
	if c.state != stateOpen {
		c.lingerStep()
		return
	}
	c.flush()
	o := &c.out
	o.turn++
	o.granted = 0
	c.wakeWriters()
}

// flush writes what is queued to t.
func (c *Conn) flush() {
	if c.out.blocked || c.queued() == 0 {
		return
	}
	n, err := c.t.Write(c.out.buf[c.out.off:])
	c.out.off += n
	switch {
	case c.queued() == 0:
		c.dropOutput()
	case errors.Is(err, splice.ErrAgain):
		c.out.blocked = true
	default:
		c.lost(err)
	}
}

// wakeWriters lets those who wait longest go on, each with a share of the
// room. The others keep their place and follow at the end of the turn.
func (c *Conn) wakeWriters() {
	o := &c.out
	room := maxPending - c.queued() - o.granted
	if len(o.waiters) == 0 || room < maxPending/2 || c.send <= 0 {
		return
	}
	n := min(len(o.waiters), room/minShare)
	for _, s := range o.waiters[:n] {
		s.waiting = false
		// Whole frames: a small one behind a large one costs as much.
		s.turn, s.spent, s.grant = o.turn, 0, room/n/bulkFrame*bulkFrame
		o.granted += s.grant
		s.poke()
	}
	o.waiters = slices.Delete(o.waiters, 0, n)
	c.flushLater()
}

// room makes space for n more bytes.
func (c *Conn) room(n int) {
	o := &c.out
	if cap(o.buf)-len(o.buf) >= n {
		return
	}
	queued := len(o.buf) - o.off
	if o.off > 0 && cap(o.buf)-queued >= n && queued <= cap(o.buf)/2 {
		copy(o.buf, o.buf[o.off:])
		o.buf, o.off = o.buf[:queued], 0
		return
	}
	bigger := getBuffer(queued + n)[:queued]
	copy(bigger, o.buf[o.off:])
	putBuffer(o.buf)
	o.buf, o.off = bigger, 0
}

func (c *Conn) dropOutput() {
	putBuffer(c.out.buf)
	c.out.buf, c.out.off = nil, 0
}

// mayWrite says how many bytes of DATA s may send in one frame now. With 0 the
// stream has been noted for a wake-up.
func (s *Stream) mayWrite(want int) int {
	c := s.c
	if s.send <= 0 {
		s.windowBlocked = true
		return 0
	}
	if s.turn != c.out.turn {
		s.turn, s.spent, s.grant = c.out.turn, 0, 0
	}
	limit := bulkFrame
	switch room := maxPending - c.queued() - c.out.granted; {
	case s.grant > 0:
		limit = min(limit, s.grant)
	case room <= 0:
		limit = 0
	case len(c.out.waiters) > 0 && s.full:
		limit = 0
	case len(c.out.waiters) > 0:
		limit = min(limit, overtake-s.spent)
	}
	if limit <= 0 || c.send <= 0 {
		s.wait()
		return 0
	}
	return int(min(int64(min(want, limit)), int64(c.peer.maxFrame), s.send, c.send))
}

// wait queues s for wakeWriters.
func (s *Stream) wait() {
	s.c.out.granted -= s.grant
	s.grant = 0
	if !s.waiting {
		s.waiting = true
		s.c.out.waiters = append(s.c.out.waiters, s)
	}
	s.c.flushLater()
}

// Reserve implements splice.Reserver.
func (s *Stream) Reserve(max int) []byte {
	c := s.c
	if s.writeErr() != nil || max <= 0 {
		return nil
	}
	n := s.mayWrite(max)
	if n == 0 {
		return nil
	}
	c.room(frameHeadLen + n)
	c.out.reserved, c.out.reservedAt, s.reserved = s, len(c.out.buf), true
	s.offered = n
	at := len(c.out.buf) + frameHeadLen
	return c.out.buf[at : at+n : at+n]
}

// Commit implements splice.Reserver.
func (s *Stream) Commit(n int) {
	c := s.c
	o := &c.out
	if !s.reserved {
		return
	}
	s.reserved = false
	s.full = n == s.offered && n >= overtake
	if n <= 0 || c.state != stateOpen || s.err != nil {
		if len(o.buf) == 0 {
			c.dropOutput()
		}
		return
	}
	if o.reserved != s || len(o.buf) != o.reservedAt {
		// Something else was written into the room: the caller broke the
		// rule, and what it had is lost.
		s.release(CodeInternal)
		return
	}
	at := o.reservedAt
	o.buf = o.buf[:at+frameHeadLen+n]
	putFrameHead(o.buf[at:], n, http2.FrameData, 0, s.id)
	s.sent(n)
	if c.queued() >= flushAt {
		c.flush()
	}
	c.flushLater()
}

// sent accounts for n bytes of DATA that were queued.
func (s *Stream) sent(n int) {
	c := s.c
	s.send -= int64(n)
	c.send -= int64(n)
	s.spent += n
	used := min(n, s.grant)
	s.grant -= used
	c.out.granted -= used
	c.stats.DataSent += uint64(n)
	c.abuse.windowUpdates.n = max(0, c.abuse.windowUpdates.n-waitingUpdates)
}

// Write implements splice.End.
func (s *Stream) Write(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, s.writeErr()
	}
	for n < len(p) {
		if err := s.writeErr(); err != nil {
			return n, err
		}
		room := s.Reserve(len(p) - n)
		if room == nil {
			return n, splice.ErrAgain
		}
		m := copy(room, p[n:])
		s.Commit(m)
		n += m
	}
	return n, nil
}

func putFrameHead(b []byte, n int, t http2.FrameType, flags http2.Flags, id uint32) {
	_ = b[frameHeadLen-1]
	b[0], b[1], b[2], b[3], b[4] = byte(n>>16), byte(n>>8), byte(n), byte(t), byte(flags)
	binary.BigEndian.PutUint32(b[5:], id)
}

// Output buffers come in three sizes: for control frames and small messages,
// for a pass of bulk, and for all that may be pending.
const (
	smallBuffer  = 8 << 10
	mediumBuffer = 128 << 10
	largeBuffer  = 512 << 10
)

var buffers = [...]sync.Pool{
	{New: func() any { return new([smallBuffer]byte) }},
	{New: func() any { return new([mediumBuffer]byte) }},
	{New: func() any { return new([largeBuffer]byte) }},
}

// getBuffer returns an empty buffer with room for n bytes.
func getBuffer(n int) []byte {
	switch {
	case n <= smallBuffer:
		return buffers[0].Get().(*[smallBuffer]byte)[:0]
	case n <= mediumBuffer:
		return buffers[1].Get().(*[mediumBuffer]byte)[:0]
	case n <= largeBuffer:
		return buffers[2].Get().(*[largeBuffer]byte)[:0]
	}
	return make([]byte, 0, n+n/2)
}

// putBuffer takes back what getBuffer returned.
func putBuffer(b []byte) {
	switch cap(b) {
	case smallBuffer:
		buffers[0].Put((*[smallBuffer]byte)(b[:smallBuffer]))
	case mediumBuffer:
		buffers[1].Put((*[mediumBuffer]byte)(b[:mediumBuffer]))
	case largeBuffer:
		buffers[2].Put((*[largeBuffer]byte)(b[:largeBuffer]))
	}
}
