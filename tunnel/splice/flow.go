package splice

import (
	"io"
	"sync"
	"sync/atomic"
)

// bufferSize bounds what a flow has read and not yet written.
const bufferSize = 64 << 10

type buffer [bufferSize]byte

// buffers are used in place of Loop.Scratch: an end may use Scratch itself
// while it reads or writes for us, and what it did not take can stay here
// without a copy.
var buffers = sync.Pool{New: func() any { return new(buffer) }}

// A flow is one direction of a Join.
type flow struct {
	// Set by Start, read-only after.
	src, dst End
	from, to Side
	lender   Lender   // src; nil if it is none
	room     Reserver // dst; nil if it is none
	health   Failer   // src; nil if it is none
	count    *atomic.Uint64

	// Owned by the loop.
	buf        *buffer // nil while nothing is in it
	head, tail int     // what was read into buf and not yet taken by dst
	one        [1]byte // see peek
	peeked     bool    // one holds a byte
	kept       bool    // src may keep bytes that push did not take: they come first
	eof        bool    // src ended cleanly
	closed     bool    // dst was told
}

// move moves up to limit bytes, and reports whether only limit stopped it. It
// leaves the last quarter to the next turn rather than move a piece of less: a
// small packet behind each few large ones costs as much as a large one.
func (j *Join) move(f *flow, limit int) (moved int, more bool) {
	enough := limit - limit/4
	for j.err == nil && !f.closed {
		switch {
		case f.tail > f.head:
			if moved >= limit {
				return moved, true
			}
			n := j.write(f, limit-moved)
			moved += n
			if n == 0 {
				return moved, false
			}
		case f.eof && !f.peeked:
			f.release()
			j.closeWrite(f)
			return moved, false
		case moved >= limit || moved > enough:
			f.release()
			return moved, true
		case f.lender != nil:
			n := j.lend(f, limit-moved)
			moved += n
			if n == 0 && !f.eof {
				return moved, false
			}
		case f.room != nil:
			n := j.fill(f, limit-moved)
			moved += n
			if n == 0 && (f.peeked || !f.eof) {
				return moved, false
			}
		default:
			if !j.read(f, limit-moved) && !f.eof {
				f.release()
				return moved, false
			}
		}
	}
	return moved, false
}

// lend writes on what src holds, without a copy here.
func (j *Join) lend(f *flow, limit int) int {
	p, err := f.lender.Peek()
	if err != nil {
		j.readEnded(f, err)
		return 0
	}
	n, err := f.dst.Write(p[:min(len(p), limit)])
	f.lender.Discard(n)
	f.count.Add(uint64(n))
	if err != nil && !isAgain(err) {
		j.fail(f.to, err)
	}
	return n
}

// fill reads straight into the room that dst has.
func (j *Join) fill(f *flow, limit int) int {
	p := f.room.Reserve(limit)
	if len(p) == 0 {
		j.peek(f)
		return 0
	}
	n := 0
	if f.peeked {
		f.peeked = false
		n = copy(p, f.one[:])
	}
	if n < len(p) && !f.eof {
		m, err := f.src.Read(p[n:])
		n += m
		j.readEnded(f, err)
	}
	f.room.Commit(n)
	f.count.Add(uint64(n))
	return n
}

// peek reads one byte ahead of a dst without room: the end of a stream needs
// none, and must not wait until dst has some.
func (j *Join) peek(f *flow) {
	if f.peeked || f.eof {
		return
	}
	n, err := f.src.Read(f.one[:])
	f.peeked = n > 0
	j.readEnded(f, err)
}

// read reads into buf, which is empty, and reports whether there was anything.
func (j *Join) read(f *flow, limit int) bool {
	if f.buf == nil {
		f.buf = buffers.Get().(*buffer)
	}
	n, err := f.src.Read(f.buf[:min(limit, bufferSize)])
	f.head, f.tail = 0, n
	j.readEnded(f, err)
	return n > 0
}

func (j *Join) readEnded(f *flow, err error) {
	switch {
	case err == nil:
	case err == io.EOF:
		f.eof, f.kept = true, false
	case isAgain(err):
		f.kept = false
	default:
		j.fail(f.from, err)
	}
}

// write writes what is in buf, and returns how much of it dst took.
func (j *Join) write(f *flow, limit int) int {
	n, err := f.dst.Write(f.buf[f.head:min(f.tail, f.head+limit)])
	f.head += n
	f.count.Add(uint64(n))
	if err != nil && !isAgain(err) {
		j.fail(f.to, err)
	}
	return n
}

func (j *Join) closeWrite(f *flow) {
	switch err := f.dst.CloseWrite(); {
	case err == nil:
		f.closed = true
	case !isAgain(err):
		j.fail(f.to, err)
	}
}

// push is what a Pusher calls with bytes that just arrived. Whatever it does
// not take the Pusher keeps, and move reads it: so push takes nothing while
// earlier bytes wait here or at the Pusher, or while a turn is under way.
func (j *Join) push(f *flow, p []byte) int {
	if j.over || j.err != nil || f.eof {
		return 0
	}
	if j.depth > 0 || f.kept || f.peeked || f.tail > f.head {
		f.kept = true
		if j.depth > 0 {
			j.loop.Soon(&j.task)
		}
		return 0
	}
	j.depth++
	n, err := f.dst.Write(p)
	j.depth--
	f.count.Add(uint64(n))
	f.kept = n < len(p)
	if err != nil && !isAgain(err) {
		j.fail(f.to, err)
	}
	if j.err != nil {
		// The Pusher is not to be reset from within its own call.
		j.loop.Soon(&j.task)
	}
	return n
}

// release gives buf back.
func (f *flow) release() {
	if f.buf != nil {
		buffers.Put(f.buf)
		f.buf, f.head, f.tail = nil, 0, 0
	}
}
