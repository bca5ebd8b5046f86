package certs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/complaints"
	"github.com/ztun/ztun/tunnel/identity"
)

// A CA signs certificate requests.
type CA interface {
	// Sign returns the chain for the PEM encoded request csr, as PEM: the
	// leaf, intermediates, and last the root bundle. It returns soon after ctx
	// is done. Its errors hold no secrets.
	Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) (chain [][]byte, err error)
}

// Priority orders the fetches that wait for their turn.
type Priority uint8

// From the least to the most urgent: renewal, a workload that was just
// learned of, a connection that waits.
const (
	Background Priority = iota
	Warmup
	RealTime
)

// Config of a Manager. CA is required.
type Config struct {
	CA            CA
	TTL           time.Duration // asked of the CA; 0: 24 h
	Concurrency   int           // fetches at a time; 0: 8
	FetchTimeout  time.Duration // for each fetch; 0: 20 s
	MaxIdentities int           // held at a time; 0: 4096
	MaxWaiters    int           // Gets that wait at a time; 0: 16384
	QuietFor      time.Duration // how long a new identity may be unknown to the CA; 0: 10 s
	PQCOnly       bool          // X25519MLKEM768 is the only key exchange
	Revocations   *Revocations  // of peers; nil: none is revoked
	Log           *slog.Logger  // nil: discard
}

// A fetch that failed is tried again after firstRetry, twice that, and so on
// up to maxRetry, each of these ±retryJitter.
const (
	firstRetry  = time.Second
	maxRetry    = 150 * time.Second
	retryJitter = 0.2
)

// maxSleep bounds how late a renewal is after the wall clock was set, or the
// machine slept: certificates live by the wall clock, timers do not.
const maxSleep = time.Minute

// What Get's errors match.
var (
	ErrUnavailable = errors.New("no certificate") // the last fetch failed; wraps its error
	ErrForgotten   = errors.New("identity no longer needed")
	ErrBusy        = errors.New("certs: too many waiters or identities")
	ErrClosed      = errors.New("certs: manager is closed")
)

var errFetchTimeout = errors.New("no answer in time")

// A Manager fetches, holds and renews the certificates of the identities it is
// asked for.
type Manager struct {
	// Set by NewManager, read-only after.
	cfg  Config
	wake chan struct{} // one slot: there may be something to fetch

	bundles bundleCache

	// mu guards the fields below, and the entries.
	mu       sync.Mutex
	entries  map[identity.ID]*entry
	later    queue // entries that wait for their time
	now      queue // entries that wait for a place, by priority
	fetching int
	waiters  int
	told     complaints.Book // of a CA that does not answer
	running  bool
	closed   bool
}

// NewManager returns a Manager; Run makes it work.
func NewManager(cfg Config) *Manager {
	setDefault(&cfg.TTL, 24*time.Hour)
	setDefault(&cfg.Concurrency, 8)
	setDefault(&cfg.FetchTimeout, 20*time.Second)
	setDefault(&cfg.MaxIdentities, 4096)
	setDefault(&cfg.MaxWaiters, 16384)
	setDefault(&cfg.QuietFor, 10*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Manager{
		cfg:     cfg,
		wake:    make(chan struct{}, 1),
		entries: make(map[identity.ID]*entry),
		later:   queue{less: byTime},
		now:     queue{less: byPriority},
	}
}

func setDefault[T int | time.Duration](v *T, to T) {
	if *v <= 0 {
		*v = to
	}
}

// Run fetches until ctx is done; then it fails all waiters and returns when
// its fetches have ended. It can run once.
func (m *Manager) Run(ctx context.Context) error {
	m.mu.Lock()
	ran := m.running
	m.running = true
	m.mu.Unlock()
	if ran {
		return errors.New("certs: run: was run before")
	}
	var fetches sync.WaitGroup
	defer fetches.Wait()
	defer m.close()
	// Not ctx: waiters are to hear ErrClosed, and not of a fetch that failed.
	fetchCtx := context.WithoutCancel(ctx)
	for {
		timer := time.NewTimer(m.dispatch(fetchCtx, &fetches))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// Get returns the certificate of id, waiting for the first fetch to end if it
// must. While an identity is unavailable it returns the last error at once. A
// CA learns of a new pod a little later than we do and refuses it until then
// (codes.Unauthenticated), which looks like any other refusal: during the first
// Config.QuietFor of an identity that is no answer, and no line in the log.
// A fetch that waits for its turn is raised to p.
func (m *Manager) Get(ctx context.Context, id identity.ID, p Priority) (*Certificate, error) {
	e, changed, cert, err := m.ask(id, p)
	if e == nil {
		return cert, err
	}
	defer m.leave()
	for changed != nil {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("certs: wait for %v: %w", id, context.Cause(ctx))
		case <-changed:
		}
		changed, cert, err = m.outcome(e)
	}
	return cert, err
}

// Current returns the certificate of id if there is an unexpired one. It does
// not wait and starts nothing.
func (m *Manager) Current(id identity.ID) (*Certificate, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil || !e.valid(time.Now()) {
		return nil, false
	}
	return e.cert, true
}

// Prefetch starts a fetch for id, with Warmup, unless it is known already.
func (m *Manager) Prefetch(id identity.ID) {
	m.mu.Lock()
	_, err := m.wantLocked(id, Warmup)
	m.mu.Unlock()
	if err != nil {
		m.cfg.Log.Warn("certificate not prefetched", "identity", id, "error", err)
	}
}

// Retry tries all those again soon whose last fetch failed: the CA may be back.
// It may be called as often as one likes.
func (m *Manager) Retry() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.retryLocked(time.Now(), func(error) bool { return true })
}

// retryLocked puts off no longer, but spreads a little, what failed in a way
// that again reports true for.
func (m *Manager) retryLocked(now time.Time, again func(error) bool) {
	for _, e := range m.entries {
		if e.err == nil || e.queue != &m.later || !again(e.err) {
			continue
		}
		due := e.tried.Add(firstRetry) // Whoever calls, the CA is not run over.
		if due.Before(now) {
			due = now
		}
		if due = due.Add(rand.N(firstRetry)); due.Before(e.due) {
			m.later.remove(e)
			e.due = due
			m.later.add(e)
		}
	}
	m.wakeUp()
}

// Forget drops id, its certificate and its fetch. Those who wait for it fail
// with ErrForgotten.
func (m *Manager) Forget(id identity.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.entries[id]; e != nil {
		m.dropLocked(e, ErrForgotten)
	}
}

// Status is what Dump says of an identity.
type Status struct {
	ID    identity.ID
	State string       // "Initializing", "Available" or "Unavailable: <error>"
	Cert  *Certificate // nil: none
	Err   error        // of the last fetch
	Next  time.Time    // of the next fetch; zero: under way or waiting for a place
}

// Dump lists all identities, ordered by their text.
func (m *Manager) Dump() []Status {
	m.mu.Lock()
	now := time.Now()
	out := make([]Status, 0, len(m.entries))
	for _, e := range m.entries {
		out = append(out, e.status(now))
	}
	m.mu.Unlock()
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return out
}

// ask answers for id what can be answered at once. Otherwise it returns the
// entry to wait for, and what is closed when it has changed; the caller then
// owes a leave.
func (m *Manager) ask(id identity.ID, p Priority) (*entry, <-chan struct{}, *Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, err := m.wantLocked(id, p)
	if err != nil {
		return nil, nil, nil, err
	}
	if cert, err, done := e.outcome(time.Now()); done {
		return nil, nil, cert, err
	}
	if m.waiters >= m.cfg.MaxWaiters {
		return nil, nil, nil, ErrBusy
	}
	m.waiters++
	return e, e.changed, nil, nil
}

// wantLocked returns the entry of id, and sees to it that a fetch with at
// least p is on its way if it has nothing to give.
func (m *Manager) wantLocked(id identity.ID, p Priority) (*entry, error) {
	if m.closed {
		return nil, ErrClosed
	}
	if id.IsZero() {
		return nil, fmt.Errorf("certs: get: %w for the zero identity", ErrUnavailable)
	}
	e := m.entries[id]
	if e == nil {
		if len(m.entries) >= m.cfg.MaxIdentities {
			return nil, ErrBusy
		}
		e = &entry{id: id, born: time.Now(), due: time.Now(), changed: make(chan struct{})}
		m.entries[id] = e
	}
	if !e.valid(time.Now()) && e.err == nil {
		m.hurryLocked(e, p)
	}
	return e, nil
}

func (m *Manager) leave() {
	m.mu.Lock()
	m.waiters--
	m.mu.Unlock()
}

// outcome is what a waiter for e gets; as long as there is nothing, it is what
// to wait for.
func (m *Manager) outcome(e *entry) (changed <-chan struct{}, cert *Certificate, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.gone != nil {
		return nil, nil, fmt.Errorf("certs: wait for %v: %w", e.id, e.gone)
	}
	if cert, err, done := e.outcome(time.Now()); done {
		return nil, cert, err
	}
	return e.changed, nil, nil
}

// hurryLocked queues e, whose certificate somebody needs now, or raises it in
// the queue.
func (m *Manager) hurryLocked(e *entry, p Priority) {
	p = max(p, e.priority)
	switch {
	case e.cancel != nil:
		return
	case e.queue == &m.now:
		m.now.remove(e)
	case e.queue == &m.later:
		m.later.remove(e)
		e.due = time.Now()
	}
	e.priority = p
	m.now.add(e)
	m.wakeUp()
}

func (m *Manager) dropLocked(e *entry, why error) {
	delete(m.entries, e.id)
	if e.queue != nil {
		e.queue.remove(e)
	}
	if e.cancel != nil {
		e.cancel()
	}
	e.gone = why
	close(e.changed)
}

func (m *Manager) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	for _, e := range m.entries {
		m.dropLocked(e, ErrClosed)
	}
}

func (m *Manager) wakeUp() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// retryIn is how long to wait after the n-th failure in a row, n > 0.
func retryIn(n int) time.Duration {
	d := maxRetry
	if n < 16 {
		d = min(d, firstRetry<<(n-1))
	}
	return time.Duration(float64(d) * (1 - retryJitter + 2*retryJitter*rand.Float64()))
}
