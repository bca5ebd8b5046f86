package soak

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// A world is a network to put a load on.
type world interface {
	// routes names the ways a connection may take.
	routes() []string
	// policed says that policies hold on a route.
	policed(route int) bool
	// forgets says that a reset may be lost on a route, and is not sent again.
	forgets(route int) bool
	// dial opens a connection along a route. The far end comes to load.serve.
	dial(route int, k kind) (conn, error)
	// deny resets the denied connections and lets new ones pass again: told is
	// called when they are about to be reset, and gone must be waited for before
	// they are let pass. A world that cannot returns false.
	deny(told func(), gone func()) bool
}

// weights say how many connections of a kind are in a deck.
var weights = [kinds]int{bulkUp: 3, bulkDown: 3, bulkBoth: 3, requests: 8, idle: 6, slowReader: 2, stalled: 2, shrinking: 2,
	clientEnds: 3, serverEnds: 3, clientResets: 3, serverResets: 3, resetHalf: 3, short: 3, denied: 3}

// inARow is how many short connections follow each other.
const inARow = 15

// A deal is a connection to come: what the seed says.
type deal struct {
	id    uint64
	kind  kind
	route int
}

// A deck deals connections in an order that the seed says: every kind, as
// often as its weight, then again.
type deck struct {
	seed   uint64
	routes int
	only   func(kind) bool

	// mu guards the fields below.
	mu    sync.Mutex
	rng   *rand.Rand
	next  uint64 // number of the next connection
	kinds []kind
	round int // full decks dealt
}

func newDeck(seed, first uint64, routes int, only func(kind) bool) *deck {
	return &deck{seed: seed, routes: routes, only: only, next: first, rng: rand.New(rand.NewPCG(seed, first))}
}

func (d *deck) deal() deal {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.kinds) == 0 {
		for k, n := range weights {
			for range n {
				if d.only(kind(k)) {
					d.kinds = append(d.kinds, kind(k))
				}
			}
		}
		d.rng.Shuffle(len(d.kinds), func(i, j int) { d.kinds[i], d.kinds[j] = d.kinds[j], d.kinds[i] })
	}
	k := d.kinds[0]
	if d.kinds = d.kinds[1:]; len(d.kinds) == 0 {
		d.round++
	}
	c := deal{id: d.next, kind: k, route: d.rng.IntN(d.routes)}
	d.next++
	if k == short {
		d.next += inARow - 1
	}
	return c
}

// rounds is how many full decks were dealt.
func (d *deck) rounds() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.round
}

// last is the number of the connection after the last one dealt.
func (d *deck) last() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.next
}

// script is what happens on the connection with that number.
func (d *deck) script(id uint64, k kind, m measure) *script {
	return draw(rand.New(rand.NewPCG(d.seed, id)), id, k, m)
}

// A load plays scripts on a world.
type load struct {
	// Set by its maker, read-only after.
	world   world
	deck    *deck
	watch   *watch
	measure measure
	tally   *tally
	failed  func(error)

	// dialling is held for reading while a denied connection is dialled.
	dialling sync.RWMutex

	// mu guards the field below.
	mu    sync.Mutex
	plays map[uint64]*play
}

// A tally counts what was done.
type tally struct {
	opened, ended [kinds]atomic.Int64
	bytes         atomic.Int64 // that were read, and right
	cut           atomic.Int64 // connections, by a policy
}

// run plays connections on so many workers for d, and at least one deck. It
// returns when all have ended.
func (l *load) run(workers int, d time.Duration) {
	end := time.Now().Add(d)
	more := func() bool { return time.Now().Before(end) || l.deck.rounds() == 0 }
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for more() {
				l.connections(l.deck.deal(), &wg)
			}
		})
	}
	stop := make(chan struct{})
	var cutter sync.WaitGroup
	cutter.Go(func() { l.cuts(stop, d/4) })
	wg.Wait()
	close(stop)
	cutter.Wait()
}

// connections plays what was dealt. Idle ones have no worker to themselves.
func (l *load) connections(c deal, wg *sync.WaitGroup) {
	switch c.kind {
	case idle:
		wg.Go(func() { l.connection(c) })
	case short:
		for range inARow {
			l.connection(c)
			c.id++
		}
	default:
		l.connection(c)
	}
}

// connection plays a connection to its end.
func (l *load) connection(c deal) {
	p := newPlay(l.deck.script(c.id, c.kind, l.measure), l.world.routes()[c.route], &l.tally.bytes)
	p.policed, p.frail = l.world.policed(c.route), l.world.forgets(c.route)
	l.mu.Lock()
	l.plays[c.id] = p
	l.mu.Unlock()
	l.watch.add(p)
	l.tally.opened[c.kind].Add(1)
	if l.open(p, c) {
		p.finish()
	}
	close(p.ended)
	l.watch.remove(p)
	l.mu.Lock()
	delete(l.plays, c.id)
	l.mu.Unlock()
	l.tally.ended[c.kind].Add(1)
	if p.cut.Load() {
		l.tally.cut.Add(1)
		if late := time.Since(p.cutAt); !p.aborted[0].Load() && late > l.watch.limit {
			p.fail("a policy forbade it %v ago", late)
		}
	}
	if err := p.failure(); err != nil {
		l.failed(err)
	}
}

// open dials, and plays the client's side.
func (l *load) open(p *play, c deal) bool {
	if c.kind == denied {
		l.dialling.RLock()
	}
	end, err := l.world.dial(c.route, c.kind)
	p.dialled.Store(err == nil)
	if c.kind == denied {
		l.dialling.RUnlock()
	}
	if err != nil {
		p.fail("dial: %w", err)
		return false
	}
	p.run(0, end)
	return true
}

// finish waits for the server's side. A connection that was aborted need not
// have got there.
func (p *play) finish() {
	grace := time.Second
	if !p.script.aborts() && p.failure() == nil {
		grace = time.Minute // the watch is faster
	}
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.done:
		return
	case <-t.C:
	}
	p.mu.Lock()
	served := p.served
	p.served = true // from now on nobody may
	p.mu.Unlock()
	if served {
		<-p.done
	} else if !p.script.aborts() {
		p.fail("the server never saw it")
	}
}

// serve plays the server's side of a connection whose first word was read.
func (l *load) serve(first uint64, c conn) {
	at := placeOf(first)
	l.mu.Lock()
	p := l.plays[at.id]
	l.mu.Unlock()
	if p == nil || at.index != 0 || at.dir != 0 || !p.claim() {
		// Its client has given up, or the word is not what a client sends first:
		// then the client will miss the server.
		c.Reset()
		return
	}
	p.run(1, c)
	close(p.done)
}

func (p *play) claim() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.served {
		return false
	}
	p.served = true
	return true
}

// cuts denies and allows again, until stop is closed.
func (l *load) cuts(stop <-chan struct{}, every time.Duration) {
	t := time.NewTicker(max(every, 100*time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case <-t.C:
		}
		if !l.cut() {
			return
		}
	}
}

// cut has all denied connections reset, and waits for their end.
func (l *load) cut() bool {
	// No connection is being dialled from here on: each has met the old policy.
	l.dialling.Lock()
	defer l.dialling.Unlock()
	var all []*play
	told := func() {
		l.watch.live(func(p *play) {
			if p.script.kind == denied && p.policed && p.dialled.Load() {
				p.cutAt = time.Now()
				p.cut.Store(true)
				all = append(all, p)
			}
		})
	}
	gone := func() {
		for _, p := range all {
			<-p.ended
		}
	}
	return l.world.deny(told, gone)
}
