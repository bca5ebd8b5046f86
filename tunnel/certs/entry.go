package certs

import (
	"container/heap"
	"context"
	"fmt"
	"time"

	"github.com/ztun/ztun/tunnel/complaints"
	"github.com/ztun/ztun/tunnel/identity"
)

// An entry is all that the Manager knows of one identity. It is in one of
// three places: in Manager.later, in Manager.now, or being fetched.
// Manager.mu guards all but id.
type entry struct {
	id       identity.ID
	born     time.Time
	cert     *Certificate    // the last one fetched; may have expired
	err      error           // of the last fetch
	tried    time.Time       // the end of the last fetch
	failures int             // in a row
	forming  bool            // the failure is what one expects of a new pod
	told     complaints.Book // what was logged of the failures
	due      time.Time       // of the next fetch
	priority Priority        // of the next fetch
	gone     error           // why it was dropped

	queue  *queue             // nil: in none
	index  int                // in queue
	cancel context.CancelFunc // nil: not being fetched

	// changed is closed when a fetch ended, and then replaced, or when the
	// entry was dropped.
	changed chan struct{}
}

// outcome is what somebody who asks gets; done is false as long as they have to
// wait.
func (e *entry) outcome(now time.Time) (cert *Certificate, err error, done bool) {
	switch {
	case e.valid(now):
		return e.cert, nil, true
	case e.err != nil && !e.forming:
		return nil, e.unavailable(), true
	}
	return nil, nil, false
}

func (e *entry) valid(now time.Time) bool { return e.cert != nil && !e.cert.expired(now) }

func (e *entry) unavailable() error {
	return fmt.Errorf("certs: %w for %v: %w", ErrUnavailable, e.id, e.err)
}

func (e *entry) status(now time.Time) Status {
	s := Status{ID: e.id, State: "Initializing", Err: e.err}
	if e.queue != nil && e.due.After(now) {
		s.Next = e.due
	}
	switch {
	case e.valid(now):
		s.State, s.Cert = "Available", e.cert
	case e.err != nil && !e.forming:
		s.State = "Unavailable: " + e.err.Error()
	}
	return s
}

// A queue is a heap of entries.
type queue struct {
	entries []*entry
	less    func(a, b *entry) bool
}

func byTime(a, b *entry) bool { return a.due.Before(b.due) }

func byPriority(a, b *entry) bool {
	if a.priority != b.priority {
		return a.priority > b.priority
	}
	return a.due.Before(b.due)
}

func (q *queue) add(e *entry) {
	e.queue = q
	heap.Push(q, e)
}

func (q *queue) remove(e *entry) {
	heap.Remove(q, e.index)
	e.queue = nil
}

// first returns the entry in front, nil if there is none.
func (q *queue) first() *entry {
	if len(q.entries) == 0 {
		return nil
	}
	return q.entries[0]
}

// Len, Less, Swap, Push and Pop are heap.Interface.

func (q *queue) Len() int           { return len(q.entries) }
func (q *queue) Less(i, j int) bool { return q.less(q.entries[i], q.entries[j]) }

func (q *queue) Swap(i, j int) {
	q.entries[i], q.entries[j] = q.entries[j], q.entries[i]
	q.entries[i].index, q.entries[j].index = i, j
}

func (q *queue) Push(x any) {
	e := x.(*entry)
	e.index = len(q.entries)
	q.entries = append(q.entries, e)
}

func (q *queue) Pop() any {
	last := len(q.entries) - 1
	e := q.entries[last]
	q.entries[last] = nil
	q.entries = q.entries[:last]
	return e
}
