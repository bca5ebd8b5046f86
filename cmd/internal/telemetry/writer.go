package telemetry

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// queueLines and queueBytes bound what waits to be written.
	queueLines = 10_000
	queueBytes = 16 << 20
	// batchLines is how many lines one write takes along.
	batchLines = 64
	// maxLine is where a line is cut, in bytes.
	maxLine = 16 << 10
)

// A Writer writes lines to somewhere that may block, on a goroutine of its
// own. Write never blocks: ztunnel holds its workers up when the queue is full,
// here the line is dropped and counted, since a slow log must not stop a pod's
// traffic.
type Writer struct {
	out     io.Writer
	queue   chan []byte
	done    chan struct{}
	bytes   atomic.Int64 // Waiting.
	dropped atomic.Uint64
	pool    sync.Pool
	// notice makes the line that tells of n dropped ones.
	notice atomic.Pointer[func(n uint64) []byte]

	// mu keeps Close from closing queue under a Write.
	mu     sync.RWMutex
	closed bool
}

// NewWriter starts a Writer to out.
func NewWriter(out io.Writer) *Writer {
	w := &Writer{out: out, queue: make(chan []byte, queueLines), done: make(chan struct{})}
	w.pool.New = func() any { b := make([]byte, 0, 512); return &b }
	go w.run()
	return w
}

// Write queues a copy of one line, which ends in a newline. It always says
// that it wrote all of it.
func (w *Writer) Write(line []byte) (int, error) {
	n := len(line)
	if n > maxLine {
		line = append(append(make([]byte, 0, maxLine), line[:maxLine-1]...), '\n')
	}
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.closed || w.bytes.Load() > queueBytes {
		w.dropped.Add(1)
		return n, nil
	}
	buf := append((*w.pool.Get().(*[]byte))[:0], line...)
	select {
	case w.queue <- buf:
		w.bytes.Add(int64(len(buf)))
	default:
		w.dropped.Add(1)
		w.put(buf)
	}
	return n, nil
}

func (w *Writer) put(buf []byte) {
	if cap(buf) <= 4096 {
		w.pool.Put(&buf)
	}
}

// Dropped is how many lines found no room.
func (w *Writer) Dropped() uint64 { return w.dropped.Load() }

// Close writes what is queued, for a second at most, and stops.
func (w *Writer) Close() error {
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		close(w.queue)
	}
	w.mu.Unlock()
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-w.done:
		return nil
	case <-t.C:
		return fmt.Errorf("telemetry: log output is stuck with %d lines", len(w.queue))
	}
}

func (w *Writer) run() {
	defer close(w.done)
	var batch []byte
	var told uint64
	for line := range w.queue {
		batch = w.take(batch[:0], line)
		for n := 1; n < batchLines; n++ {
			select {
			case more, ok := <-w.queue:
				if ok {
					batch = w.take(batch, more)
					continue
				}
			default:
			}
			break
		}
		if d := w.dropped.Load(); d != told {
			if notice := w.notice.Load(); notice != nil {
				batch = append(batch, (*notice)(d-told)...)
			}
			told = d
		}
		_, _ = w.out.Write(batch) // There is nowhere to tell of an error.
	}
}

func (w *Writer) take(batch, line []byte) []byte {
	w.bytes.Add(-int64(len(line)))
	batch = append(batch, line...)
	w.put(line)
	return batch
}
