package splice

import (
	"sync"
	"sync/atomic"
)

// A chunk is a buffer that passes from one loop to the other. data[head:tail]
// is to be read; the writer alone touches what is behind tail.
type chunk struct {
	next       *chunk
	step       int // index of its size
	head, tail int
	data       []byte
}

// chunkSizes are the capacities of chunks, in bytes. The largest leaves room
// for headers, so that one write of it is one super-segment and not one and
// a tiny one.
var chunkSizes = [...]int{2 << 10, 16 << 10, 64<<10 - 512}

var pools [len(chunkSizes)]sync.Pool

// A Budget bounds the buffers of many Pipes, in bytes of their capacity. Its
// methods may be called from anywhere.
type Budget struct {
	max  int64
	of   *Budget
	used atomic.Int64
}

// NewBudget returns a Budget of max bytes, which are also taken from of if it
// is not nil.
func NewBudget(max int64, of *Budget) *Budget { return &Budget{max: max, of: of} }

// Used returns the bytes in use.
func (b *Budget) Used() int64 { return b.used.Load() }

func (b *Budget) take(n int, always bool) bool {
	for at := b; at != nil; at = at.of {
		if at.used.Add(int64(n)) > at.max && !always {
			for back := b; ; back = back.of {
				back.used.Add(int64(-n))
				if back == at {
					return false
				}
			}
		}
	}
	return true
}

// chunk returns an empty chunk of the size, or of the smallest if there is no
// budget for more. That size there is always if it is needed: a writer into an
// empty lane would wait for a reader that has nothing to read.
func (b *Budget) chunk(step int, needed bool) *chunk {
	if !b.take(chunkSizes[step], false) {
		step = 0
		if !b.take(chunkSizes[0], needed) {
			return nil
		}
	}
	c, _ := pools[step].Get().(*chunk)
	if c == nil {
		c = &chunk{step: step, data: make([]byte, chunkSizes[step])}
	}
	return c
}

// free takes back a chunk that chunk gave.
func (b *Budget) free(c *chunk) {
	for at := b; at != nil; at = at.of {
		at.used.Add(int64(-len(c.data)))
	}
	c.next, c.head, c.tail = nil, 0, 0
	pools[c.step].Put(c)
}
