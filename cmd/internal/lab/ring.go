package lab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
)

// logSize bounds what is kept of one process's output, in bytes.
const logSize = 1 << 20

// A ring keeps the end of what a process wrote. It is safe for concurrent use.
type ring struct {
	mu sync.Mutex
	// mu guards the fields below.
	kept  []byte
	total int64         // Bytes ever written; kept holds the last of them.
	more  chan struct{} // Closed by the next Write.
}

// Write appends p and forgets what is too old. It never fails.
func (r *ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total += int64(len(p))
	r.kept = append(r.kept, p...)
	if over := len(r.kept) - logSize; over > 0 {
		// More than needed, so that it is not done at each write; whole lines.
		over = min(len(r.kept), over+logSize/4)
		if nl := bytes.IndexByte(r.kept[over:], '\n'); nl >= 0 {
			over += nl + 1
		}
		r.kept = append(r.kept[:0], r.kept[over:]...)
	}
	if r.more != nil {
		close(r.more)
		r.more = nil
	}
	return len(p), nil
}

// since returns what was written after offset and is kept, the offset to go on
// from, and a channel that is closed when there is more.
func (r *ring) since(offset int64) (text []byte, next int64, more <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := r.total - int64(len(r.kept))
	if r.more == nil {
		r.more = make(chan struct{})
	}
	return bytes.Clone(r.kept[max(offset, first)-first:]), r.total, r.more
}

// copyTo writes the ring to w, each line behind prefix, and with follow goes
// on until ctx ends.
func (r *ring) copyTo(ctx context.Context, w io.Writer, prefix string, follow bool) error {
	var offset int64
	var rest []byte
	for {
		text, next, more := r.since(offset)
		offset = next
		rest = append(rest, text...)
		for {
			line, after, found := bytes.Cut(rest, []byte("\n"))
			if !found {
				break
			}
			if _, err := fmt.Fprintf(w, "%s%s\n", prefix, line); err != nil {
				return err
			}
			rest = after
		}
		if !follow {
			if len(rest) > 0 {
				_, err := fmt.Fprintf(w, "%s%s\n", prefix, rest)
				return err
			}
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil
		}
	}
}

// tail returns the last lines, for an error text.
func (r *ring) tail() string {
	text, _, _ := r.since(0)
	text = bytes.TrimSpace(text)
	if len(text) > 2000 {
		text = text[len(text)-2000:]
	}
	if len(text) == 0 {
		return "it has said nothing"
	}
	return string(text)
}
