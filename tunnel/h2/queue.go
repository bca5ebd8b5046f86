package h2

import "sync"

// A queue holds bytes in chunks. The first chunk is small, since there may be
// many queues with little in them.
type queue struct {
	chunks [][]byte
	off    int // of the first chunk, has been read
	n      int // bytes held
}

const (
	smallChunk = 2 << 10
	largeChunk = 32 << 10
)

var (
	smallChunks = sync.Pool{New: func() any { return new([smallChunk]byte) }}
	largeChunks = sync.Pool{New: func() any { return new([largeChunk]byte) }}
)

func (q *queue) write(p []byte) {
	q.n += len(p)
	for len(p) > 0 {
		last := len(q.chunks) - 1
		if last < 0 || len(q.chunks[last]) == cap(q.chunks[last]) {
			q.chunks = append(q.chunks, newChunk(last < 0 && len(p) <= smallChunk))
			last++
		}
		c := q.chunks[last]
		m := copy(c[len(c):cap(c)], p)
		q.chunks[last] = c[:len(c)+m]
		p = p[m:]
	}
}

// read moves up to len(p) bytes out of the queue.
func (q *queue) read(p []byte) (n int) {
	for n < len(p) && q.n > 0 {
		c := q.chunks[0]
		m := copy(p[n:], c[q.off:])
		n += m
		q.off += m
		q.n -= m
		if q.off == len(c) {
			freeChunk(c)
			q.chunks[0] = nil
			q.chunks = q.chunks[1:]
			q.off = 0
		}
	}
	if q.n == 0 {
		q.drop()
	}
	return n
}

func (q *queue) drop() {
	for _, c := range q.chunks {
		freeChunk(c)
	}
	*q = queue{}
}

func newChunk(small bool) []byte {
	if small {
		return smallChunks.Get().(*[smallChunk]byte)[:0]
	}
	return largeChunks.Get().(*[largeChunk]byte)[:0]
}

func freeChunk(c []byte) {
	switch cap(c) {
	case smallChunk:
		smallChunks.Put((*[smallChunk]byte)(c[:smallChunk]))
	case largeChunk:
		largeChunks.Put((*[largeChunk]byte)(c[:largeChunk]))
	}
}
