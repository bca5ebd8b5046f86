package netstack

import (
	"slices"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
)

// Two pods of one node may be on two readers. If each message from one to the
// other woke the other's thread, a request would cost four wake-ups and four
// system calls on eventfds, and more CPU than TLS did: 198 us a request with all
// that is in it, against 53 us on one reader (BenchmarkRequest of
// cmd/internal/meshtest). So a loop is not tied to its thread: whoever holds
// reader.turns runs it, and a reader that has handed work to another whose thread
// sleeps does it there and then, as long as it is little and nothing else waits
// for it. Otherwise it wakes the other, so that both work. Where that one does not
// get a CPU in time it is no use to wake it: the work is taken back, and for a
// while nobody is woken.

var _ splice.Hander = (*reader)(nil)

const (
	// helpMost is how much a reader does for another that it could wake, in
	// functions and flows.
	helpMost = 4
	// aloneFor is how many passes a reader wakes nobody after it has woken one in
	// vain.
	aloneFor = 16
)

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

// settle sees to it that what has been handed to others is done.
func (r *reader) settle() {
	if len(r.handed) == 0 {
		return
	}
	busy := r.more || !r.idle()
	woken := r.handed[:0]
	for _, o := range r.handed {
		if r.share(o, busy) {
			woken = append(woken, o)
		}
	}
	clear(r.handed[len(woken):])
	r.handed = woken
	r.alone = max(0, r.alone-1)
}

// share does o's work or has it done. It reports that o's thread was woken, and
// it is to be seen whether it comes.
func (r *reader) share(o *reader, busy bool) (woken bool) {
	if !o.turns.TryLock() {
		// Somebody runs it, and looks again before it sleeps; or it is about to.
		o.wake()
		return false
	}
	defer o.turns.Unlock()
	n := o.pending()
	if n == 0 {
		return false
	}
	if o.sleeping.Load() {
		if (busy || n > helpMost) && r.alone == 0 {
			o.wake()
			return true
		}
	} else {
		r.alone = aloneFor
	}
	r.help(o)
	return false
}

// help runs a pass of o's loop, whose turns it holds, on r's thread.
func (r *reader) help(o *reader) {
	slept := o.sleeping.Swap(false)
	own := o.thread.Swap(r.thread.Load())
	defer o.thread.Store(own)
	o.now = r.now
	o.pass()
	for i, x := range o.handed {
		o.handed[i] = nil
		x.wake()
	}
	o.handed = o.handed[:0]
	o.acks.sendSoon()
	r.started, o.started = r.started || o.started, false
	// What o has queued for itself meanwhile woke nobody.
	if o.sleeping.Store(slept); slept && (!o.idle() || o.isLate(time.Now())) {
		o.wake()
	}
}

// pending returns how much others have queued.
func (r *reader) pending() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return 0
	}
	return len(r.posted) + len(r.wakers)
}

// isLate says that there is a deadline before the one that the thread sleeps
// for.
func (r *reader) isLate(now time.Time) bool {
	d, ok := r.next(now)
	return ok && now.Add(d).Before(r.until)
}
