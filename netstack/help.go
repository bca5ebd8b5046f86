package netstack

import (
	"slices"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
)

// Two pods of one node may be on two readers. If each small message from one to
// the other woke the other's thread, a request would cost four wake-ups and four
// system calls on eventfds, and more CPU than TLS did: 198 us a request with all
// that is in it, against 53 us on one reader (BenchmarkRequest of
// cmd/internal/meshtest). So a loop is not tied to its thread: whoever holds
// reader.turns runs it, and a reader that has a little work for another one, whose
// thread sleeps, does it there and then. More than a little is worth waking a
// thread for: then both work.

var _ splice.Hander = (*reader)(nil)

// helpMost is how much a reader does for another, in functions and flows.
const helpMost = 4

// Hand is Post to another loop. See splice.Hander.
func (r *reader) Hand(to splice.Loop, f func()) {
	o, ok := to.(*reader)
	if !ok || o == r {
		to.Post(f)
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	o.posted = append(o.posted, f)
	if !slices.Contains(r.handed, o) {
		r.handed = append(r.handed, o)
	}
}

// settle sees to it that what this pass has handed to others is done. A reader
// that does not sleep looks for itself before it does.
func (r *reader) settle() {
	for i, o := range r.handed {
		r.handed[i] = nil
		if o.sleeping.Load() && !r.help(o) {
			o.wake()
		}
	}
	r.handed = r.handed[:0]
}

// help runs a pass of o's loop on r's thread, if o's sleeps and it is little. It
// reports false if o has to be woken.
func (r *reader) help(o *reader) bool {
	if !o.turns.TryLock() {
		return false
	}
	defer o.turns.Unlock()
	if !o.sleeping.Load() {
		return true // it has been woken
	}
	if !o.isLittle() {
		return false
	}
	// What o queues for itself meanwhile is found by the check below.
	o.sleeping.Store(false)
	o.now = r.now
	o.pass()
	for i, x := range o.handed {
		o.handed[i] = nil
		x.wake()
	}
	o.handed = o.handed[:0]
	o.acks.sendSoon()
	r.started, o.started = r.started || o.started, false
	o.sleeping.Store(true)
	if !o.idle() || o.isLate(time.Now()) {
		o.wake()
	}
	return true
}

func (r *reader) isLittle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.closed && len(r.posted)+len(r.wakers) <= helpMost
}

// isLate says that there is a deadline before the one that the thread sleeps
// for.
func (r *reader) isLate(now time.Time) bool {
	d, ok := r.next(now)
	return ok && now.Add(d).Before(r.until)
}
