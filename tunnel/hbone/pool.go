package hbone

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
)

// A Target is whom a tunnel leads to and as whom. Tunnels are shared only
// between equal Targets: an address that another workload has taken over, or a
// workload with another identity, never meets an old tunnel.
type Target struct {
	Local identity.ID   // under whose certificate
	Peer  string        // the peer workload's UID
	Want  []identity.ID // identities one of which the peer must prove; any order
	Src   netip.Addr    // the pod's address to dial from
	Dst   netip.AddrPort
}

// key is a Target that compares.
type key struct {
	local, want identity.ID
	more        string // identities after the first
	peer        string
	src         netip.Addr
	dst         netip.AddrPort
}

func (t *Target) key() key {
	k := key{local: t.Local, peer: t.Peer, src: t.Src, dst: t.Dst}
	switch len(t.Want) {
	case 0:
	case 1:
		k.want = t.Want[0]
	default:
		names := make([]string, len(t.Want))
		for i, id := range t.Want {
			names[i] = id.String()
		}
		slices.Sort(names)
		// An ID has no line feed.
		k.more = strings.Join(slices.Compact(names), "\n")
	}
	return k
}

// PoolConfig configures a Pool. A zero duration or number means its default.
type PoolConfig struct {
	Loop         splice.Loop
	Dialer       Dialer
	Handshakes   *Handshakes
	Certificates *Certificates
	// Revocations are asked again about live connections, by CutRevoked; nil:
	// nothing is revoked. In handshakes the certificates' own are asked.
	Revocations *certs.Revocations
	// H2 is for every connection; Client and the callbacks are set by the Pool.
	// H2.MaxStreams (100) is how many streams share a connection.
	H2 h2.Config

	DialTimeout   time.Duration // TCP; 10 s
	WaitTimeout   time.Duration // for a connection, dial and handshake included; 20 s
	AnswerTimeout time.Duration // from the CONNECT to its answer; 16 s, since the peer dials for up to 10 s
	IdleTimeout   time.Duration // of a connection without streams; 5 min

	MaxConns   int // open connections; 500
	MaxDials   int // under way at once; 32
	MaxWaiters int // waiting for a connection; 4096
}

func (c *PoolConfig) setDefaults() {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&c.DialTimeout, 10 * time.Second},
		{&c.WaitTimeout, 20 * time.Second},
		{&c.AnswerTimeout, 16 * time.Second},
		{&c.IdleTimeout, 5 * time.Minute},
	} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	for _, n := range []struct {
		v   *int
		def int
	}{{&c.MaxConns, 500}, {&c.MaxDials, 32}, {&c.MaxWaiters, 4096}} {
		if *n.v <= 0 {
			*n.v = n.def
		}
	}
}

// A Pool holds one pod's tunnels to its peers. A connection is dialled when no
// other has room, one at a time for each Target, and serves all that wait for
// it. It is used again as soon as one of its streams ends.
type Pool struct {
	cfg     PoolConfig
	entries map[key]*entry
	queue   []*entry // want to dial, and MaxDials are under way
	conns   int
	dials   int
	waiting int
	drain   bool
	closed  bool
	sweep   func() // stops the timer that releases idle connections
	stats   PoolStats
}

// PoolStats count what a Pool did. They may be read from anywhere.
type PoolStats struct {
	Conns     atomic.Int64  // open now
	Waiting   atomic.Int64  // Connects that wait for a connection now
	Dials     atomic.Uint64 // begun
	DialFails atomic.Uint64
	Streams   atomic.Uint64 // CONNECTs sent
	Retries   atomic.Uint64 // CONNECTs sent again on a fresh connection
	Retired   atomic.Uint64 // connections that a rotation or GOAWAY took out of use
	Idled     atomic.Uint64 // connections released idle
	Limited   atomic.Uint64 // Connects refused by a limit
}

// NewPool returns an empty Pool.
func NewPool(cfg PoolConfig) *Pool {
	cfg.setDefaults()
	return &Pool{cfg: cfg, entries: make(map[key]*entry)}
}

// Stats returns the counters.
func (p *Pool) Stats() *PoolStats { return &p.stats }

// Connect sends a CONNECT over a tunnel to target. done runs on the loop
// exactly once, after Connect has returned, unless cancel is called before.
// Its error is a *StatusError for an answer other than 200, else a
// *ConnectError.
func (p *Pool) Connect(target Target, c *Connect, done func(*Tunnel, error)) (cancel func()) {
	w := &waiter{pool: p, req: c.request(), done: done}
	if err := p.admit(); err != nil {
		p.cfg.Loop.Post(func() { w.finish(nil, &ConnectError{StageQueue, err}) })
		return w.cancel
	}
	k := target.key()
	e := p.entries[k]
	if e == nil {
		e = &entry{pool: p, key: k, target: target}
		p.entries[k] = e
	}
	w.entry = e
	if conn := e.pick(); conn != nil && w.open(conn) {
		return w.cancel
	}
	e.enqueue(w)
	return w.cancel
}

func (p *Pool) admit() error {
	switch {
	case p.closed:
		return ErrClosed
	case p.drain:
		return ErrDraining
	case p.waiting >= p.cfg.MaxWaiters:
		p.stats.Limited.Add(1)
		return ErrLimit
	}
	return nil
}

// Retire takes every connection for which gone reports true out of use; its
// streams may finish.
func (p *Pool) Retire(gone func(Target) bool) {
	for _, e := range p.entries {
		if !gone(e.target) {
			continue
		}
		for _, c := range slices.Clone(e.conns) {
			c.retire()
		}
	}
}

// CutRevoked ends, at once, every connection to a peer that has been revoked
// since its handshake. Its streams fail with a *certs.RevokedError.
func (p *Pool) CutRevoked() {
	for _, e := range p.entries {
		for _, c := range slices.Clone(e.conns) {
			if err := p.cfg.Revocations.Check(c.proof); err != nil {
				p.cfg.Revocations.Rejected(certs.Source)
				c.h2.Close(err)
			}
		}
	}
}

// Drain takes no new Connect, and ends each connection after its last stream.
func (p *Pool) Drain() {
	p.drain = true
	p.Retire(func(Target) bool { return true })
}

// Close ends everything at once.
func (p *Pool) Close() {
	if p.closed {
		return
	}
	p.closed = true
	if p.sweep != nil {
		p.sweep()
	}
	p.queue = nil
	for _, e := range p.entries {
		if e.dial != nil {
			e.dial.cancel()
			e.dial = nil
		}
		for _, c := range slices.Clone(e.conns) {
			c.h2.Close(ErrClosed)
		}
		e.fail(&ConnectError{StageQueue, ErrClosed})
	}
	clear(p.entries)
}

// An entry is one Target's share of the pool.
type entry struct {
	pool    *Pool
	key     key
	target  Target
	conns   []*conn
	dial    *dial
	queued  bool // in Pool.queue
	waiters []*waiter
}

// pick returns a connection with room, the oldest first, so that the others
// fall idle. It retires those whose certificate was rotated.
func (e *entry) pick() *conn {
	cert, ok := e.pool.cfg.Certificates.Current(e.target.Local)
	if !ok {
		return nil
	}
	var stale []*conn
	var found *conn
	for _, c := range e.conns {
		switch {
		case c.retired:
		case c.cert != cert:
			stale = append(stale, c)
		case found == nil && c.h2.Slots() > 0:
			found = c
		}
	}
	for _, c := range stale {
		c.retire()
	}
	return found
}

func (e *entry) enqueue(w *waiter) {
	p := e.pool
	e.waiters = append(e.waiters, w)
	w.waiting = true
	p.count(1)
	w.deadline(p.cfg.WaitTimeout, StageQueue)
	p.cfg.Loop.Post(e.ensure)
}

// next takes the first waiter that still waits.
func (e *entry) next() *waiter {
	for len(e.waiters) > 0 {
		w := e.waiters[0]
		e.waiters[0] = nil
		e.waiters = e.waiters[1:]
		if !w.over {
			w.waiting = false
			e.pool.count(-1)
			return w
		}
	}
	e.waiters = nil
	return nil
}

// serve gives waiters to connections with room.
func (e *entry) serve() {
	for {
		c := e.pick()
		if c == nil {
			return
		}
		w := e.next()
		if w == nil {
			return
		}
		if !w.open(c) {
			e.enqueue(w)
			return
		}
	}
}

// fail answers everyone who waits.
func (e *entry) fail(err error) {
	for w := e.next(); w != nil; w = e.next() {
		w.finish(nil, err)
	}
}

// ensure makes sure that something is done for those who wait.
func (e *entry) ensure() {
	p := e.pool
	if p.closed || p.entries[e.key] != e {
		return
	}
	e.serve()
	if !slices.ContainsFunc(e.waiters, func(w *waiter) bool { return !w.over }) {
		e.waiters = nil
		e.release()
		return
	}
	switch {
	case e.dial != nil || e.queued:
	case p.dials >= p.cfg.MaxDials:
		e.queued = true
		p.queue = append(p.queue, e)
	case !p.makeRoom():
		p.stats.Limited.Add(uint64(len(e.waiters)))
		e.fail(&ConnectError{StageQueue, ErrLimit})
		e.release()
	default:
		e.startDial()
	}
}

// release forgets an entry that has nothing.
func (e *entry) release() {
	if len(e.conns) == 0 && len(e.waiters) == 0 && e.dial == nil && !e.queued && e.pool.entries[e.key] == e {
		delete(e.pool.entries, e.key)
	}
}

func (p *Pool) count(n int) {
	p.waiting += n
	p.stats.Waiting.Store(int64(p.waiting))
}

// makeRoom reports whether one more connection may be dialled. If there are
// too many, the one that has been idle for longest goes.
func (p *Pool) makeRoom() bool {
	if p.conns+p.dials < p.cfg.MaxConns {
		return true
	}
	var oldest *conn
	for _, e := range p.entries {
		for _, c := range e.conns {
			if !c.retired && c.h2.Streams() == 0 && (oldest == nil || c.used.Before(oldest.used)) {
				oldest = c
			}
		}
	}
	if oldest == nil {
		return false
	}
	p.stats.Idled.Add(1)
	oldest.retire()
	return true
}

// A conn is an open connection to a peer.
type conn struct {
	entry   *entry
	h2      *h2.Conn
	cert    *certs.Certificate
	peer    identity.ID
	proof   *certs.Proof // nil: nothing can be revoked
	used    time.Time    // when a stream was last opened, or seen open
	proven  bool         // has answered a CONNECT
	retired bool         // opens no more streams
}

// retire opens no more streams; the connection ends after the last one.
func (c *conn) retire() {
	if c.retired {
		return
	}
	c.retired = true
	c.entry.pool.stats.Retired.Add(1)
	c.h2.GoAway()
}

// closed is called when the connection has ended.
func (c *conn) closed() {
	e := c.entry
	p := e.pool
	at := slices.Index(e.conns, c)
	if at < 0 {
		return
	}
	e.conns = slices.Delete(e.conns, at, at+1)
	p.conns--
	p.stats.Conns.Store(int64(p.conns))
	if !p.closed {
		p.cfg.Loop.Post(e.ensure)
	}
}

// scheduleSweep looks for idle connections while there are any connections.
func (p *Pool) scheduleSweep() {
	if p.sweep != nil || p.closed {
		return
	}
	p.sweep = p.cfg.Loop.AfterFunc(p.cfg.IdleTimeout/4, func() {
		p.sweep = nil
		now := time.Now()
		for _, e := range p.entries {
			for _, c := range slices.Clone(e.conns) {
				switch {
				case c.h2.Streams() > 0:
					c.used = now
				case !c.retired && now.Sub(c.used) >= p.cfg.IdleTimeout:
					p.stats.Idled.Add(1)
					c.retire()
				}
			}
		}
		if p.conns > 0 {
			p.scheduleSweep()
		}
	})
}

// A waiter is one Connect.
type waiter struct {
	pool      *Pool
	entry     *entry
	req       h2.Request
	done      func(*Tunnel, error)
	stopTimer func()
	conn      *conn
	stream    *h2.Stream
	waiting   bool // in entry.waiters
	retried   bool
	over      bool
}

// deadline bounds the present stage.
func (w *waiter) deadline(d time.Duration, stage Stage) {
	if w.stopTimer != nil {
		w.stopTimer()
	}
	w.stopTimer = w.pool.cfg.Loop.AfterFunc(d, func() {
		if stage == StageQueue {
			stage = w.entry.stage()
		}
		w.abandon()
		w.finish(nil, &ConnectError{stage, ErrTimeout})
	})
}

// stage is how far the dial that waiters hope for has come.
func (e *entry) stage() Stage {
	if e.dial == nil {
		return StageQueue
	}
	return e.dial.stage
}

// open sends the CONNECT on c, and reports false if c takes no more.
func (w *waiter) open(c *conn) bool {
	s, err := c.h2.Open(w.req, w.answered)
	if err != nil {
		if errors.Is(err, h2.ErrHeaderList) {
			// No other connection to this peer would take it either.
			w.pool.cfg.Loop.Post(func() { w.finish(nil, &ConnectError{StageAnswer, err}) })
			return true
		}
		if !errors.Is(err, h2.ErrNoSlot) {
			c.retire()
		}
		return false
	}
	w.pool.stats.Streams.Add(1)
	w.conn, w.stream = c, s
	c.used = time.Now()
	w.deadline(w.pool.cfg.AnswerTimeout, StageAnswer)
	return true
}

// answered gets the peer's answer.
func (w *waiter) answered(r h2.Response, err error) {
	if w.over || w.stream == nil {
		return
	}
	if err != nil {
		w.abandon()
		if w.mayRetry(err) {
			w.retry()
			return
		}
		w.finish(nil, &ConnectError{StageAnswer, err})
		return
	}
	w.conn.proven = true
	if r.Status != 200 {
		w.abandon()
		w.finish(nil, &StatusError{Status: r.Status, Proxy: ParseProxyStatus(r.Header(HeaderProxyStatus))})
		return
	}
	t := &Tunnel{Stream: w.stream, Peer: w.conn.peer}
	if b := r.Header(HeaderBaggage); b != "" {
		// What cannot be parsed is as good as absent.
		t.Baggage, _ = ParseBaggage([]string{b})
	}
	w.stream = nil
	w.finish(t, nil)
}

// mayRetry reports whether the CONNECT may be sent once more: the peer says
// that it has not acted on it, or the connection had been used before and
// broke, which is how one finds out that a peer has restarted. No byte of the
// app has been sent.
func (w *waiter) mayRetry(err error) bool {
	if w.retried || w.pool.closed {
		return false
	}
	return errors.Is(err, h2.ErrNotProcessed) || w.conn.proven && errors.Is(err, h2.ErrConnLost)
}

// retry asks once more on another connection.
func (w *waiter) retry() {
	p := w.pool
	w.retried = true
	p.stats.Retries.Add(1)
	w.conn.retire()
	e := w.entry
	if p.entries[e.key] != e {
		if at := p.entries[e.key]; at != nil {
			e = at
		} else {
			p.entries[e.key] = e
		}
		w.entry = e
	}
	e.enqueue(w)
}

// abandon gives up the stream.
func (w *waiter) abandon() {
	if s := w.stream; s != nil {
		w.stream = nil
		s.Reset(h2.ErrCancel)
		s.Close()
	}
}

func (w *waiter) finish(t *Tunnel, err error) {
	if w.over {
		return
	}
	w.settle()
	w.done(t, err)
}

func (w *waiter) cancel() {
	if w.over {
		return
	}
	w.settle()
	w.abandon()
}

func (w *waiter) settle() {
	w.over = true
	if w.waiting {
		w.waiting = false
		w.pool.count(-1)
	}
	if w.stopTimer != nil {
		w.stopTimer()
		w.stopTimer = nil
	}
}
