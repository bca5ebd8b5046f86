package soak

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// look is how often the watch looks at every connection, and lapse the most
	// that one look may count for: where the whole machine stood still, nobody
	// is to blame. A share takes off what others took of the processors.
	look  = 200 * time.Millisecond
	lapse = 2 * look
)

// A watch finds connections on which nothing moves while both ends could.
type watch struct {
	// Set by newWatch, read-only after.
	limit time.Duration // without progress
	dial  time.Duration // without a connection
	found func(*play)   // called once for a play that stalls
	stop  chan struct{}
	ended chan struct{}
	lost  atomic.Int64 // nanoseconds that others had the processors

	// mu guards the field below.
	mu    sync.Mutex
	plays map[*play]*pulse
}

// A pulse is what a watch remembers of a play.
type pulse struct {
	moved [2]int64
	still [2]time.Duration // without progress while both ends could
	wait  time.Duration    // for the dial, or for the end
	told  bool
	reset [2]time.Duration // since the side was, on a route that may lose that
	begun [2]int64         // the other's writes when that could have come
}

func newWatch(limit, dial time.Duration, found func(*play)) *watch {
	w := &watch{limit: limit, dial: dial, found: found, plays: map[*play]*pulse{}, stop: make(chan struct{}), ended: make(chan struct{})}
	go w.run()
	return w
}

func (w *watch) close() {
	close(w.stop)
	<-w.ended
}

func (w *watch) add(p *play) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.plays[p] = &pulse{}
}

func (w *watch) remove(p *play) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.plays, p)
}

// live calls f with every play that is watched.
func (w *watch) live(f func(*play)) {
	w.mu.Lock()
	var list []*play
	for p := range w.plays {
		list = append(list, p)
	}
	w.mu.Unlock()
	for _, p := range list {
		f(p)
	}
}

func (w *watch) run() {
	defer close(w.ended)
	tick := time.NewTicker(look)
	defer tick.Stop()
	last, share := time.Now(), share{}
	for {
		select {
		case <-w.stop:
			return
		case now := <-tick.C:
			stalls, deaf := w.look(share.count(min(now.Sub(last), lapse)))
			for _, p := range stalls {
				w.found(p)
			}
			for _, p := range deaf {
				p.kill()
			}
			last = now
			w.lost.Store(int64(share.lost))
		}
	}
}

// look takes every pulse and returns the plays that have newly stalled, and
// those that need not learn that they are over.
func (w *watch) look(d time.Duration) (stalls, deaf []*play) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for p, b := range w.plays {
		limit := w.limit * p.script.patience()
		switch why := b.take(p, d, limit, w.dial); {
		case b.told:
		case why != "":
			b.told = true
			p.fail("stalled: %s\n%s", why, p.state())
			stalls = append(stalls, p)
		case b.isDeaf(limit):
			b.told = true
			deaf = append(deaf, p)
		}
	}
	return stalls, deaf
}

// take looks at a play after another d, and says what is wrong with it.
func (b *pulse) take(p *play, d, limit, dial time.Duration) string {
	if !p.dialled.Load() {
		if b.wait += d; b.wait > dial {
			return "no connection"
		}
		return ""
	}
	for i := range p.ways {
		w := &p.ways[i]
		moved := w.got.Load()
		if moved != b.moved[i] || !p.expects(i) || b.mayMiss(p, i, d, limit) {
			b.moved[i], b.still[i] = moved, 0
			continue
		}
		if b.still[i] += d; b.still[i] > limit {
			return fmt.Sprintf("nothing came from the %s for %v", sideName(i), b.still[i].Round(time.Second))
		}
	}
	return ""
}

// mayMiss says that side i was reset, which the other side need not learn: a RST
// that is lost is sent again only in answer to what comes later (RFC 9293 section
// 3.5.2). What the other sends within half the limit may have come before.
func (b *pulse) mayMiss(p *play, i int, d, limit time.Duration) bool {
	if !p.frail || !p.aborted[i].Load() {
		return false
	}
	if b.reset[i] += d; b.reset[i] <= limit/2 {
		b.begun[i] = p.begun[1-i].Load()
	}
	speaks := p.ways[1-i].writing.Load() || p.begun[1-i].Load() > b.begun[i]
	if speaks {
		b.reset[i] = limit/2 + 1 // Its silence counts anew.
	}
	return !speaks
}

// isDeaf says that a side has been reset for so long that the other, which
// sends nothing, will not learn of it.
func (b *pulse) isDeaf(limit time.Duration) bool {
	return max(b.reset[0], b.reset[1]) > 2*limit
}

// expects says that something of what side i sends should reach the other
// side, which is reading: bytes, the end, or a reset.
func (p *play) expects(i int) bool {
	w := &p.ways[i]
	if !w.reading.Load() || p.aborted[1-i].Load() {
		return false
	}
	return w.writing.Load() || w.sent.Load() > w.got.Load() || w.ended.Load() && !w.heard.Load() ||
		p.aborted[i].Load() || p.cut.Load()
}

// state tells what is known of a play.
func (p *play) state() string {
	var s strings.Builder
	fmt.Fprintf(&s, "  %v connection %d over %s, %v old, connected %v, cut %v\n", p.script.kind, p.script.id, p.route, time.Since(p.begin).Round(time.Millisecond), p.dialled.Load(), p.cut.Load())
	for i := range p.ways {
		w := &p.ways[i]
		fmt.Fprintf(&s, "  from the %s: %d bytes to send, %d taken by writes (in a write %v, closed %v, reset %v), %d read (in a read %v, end read %v)\n",
			sideName(i), p.script.sides[i].total(), w.sent.Load(), w.writing.Load(), w.ended.Load(), p.aborted[i].Load(), w.got.Load(), w.reading.Load(), w.heard.Load())
	}
	p.mu.Lock()
	conns := p.conns
	p.mu.Unlock()
	for i, c := range conns {
		if d, ok := c.(interface{ State() string }); ok {
			fmt.Fprintf(&s, "  %s: %s\n", sideName(i), d.State())
		}
	}
	return s.String()
}
