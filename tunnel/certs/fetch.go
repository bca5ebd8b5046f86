package certs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztun/ztun/tunnel/complaints"
)

// dispatch starts the fetches that there is work and a place for, and returns
// when to look again.
func (m *Manager) dispatch(ctx context.Context, fetches *sync.WaitGroup) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for e := m.later.first(); e != nil && !e.due.After(now); e = m.later.first() {
		m.later.remove(e)
		m.now.add(e)
	}
	for m.fetching < m.cfg.Concurrency {
		e := m.now.first()
		if e == nil {
			break
		}
		m.now.remove(e)
		m.fetching++
		fctx, cancel := context.WithTimeoutCause(ctx, m.cfg.FetchTimeout, errFetchTimeout)
		e.cancel = cancel
		fetches.Go(func() {
			defer cancel()
			m.fetch(fctx, e)
		})
	}
	if e := m.later.first(); e != nil {
		return min(e.due.Sub(now), maxSleep)
	}
	return maxSleep
}

// fetch gets one certificate and gives e its next place.
func (m *Manager) fetch(ctx context.Context, e *entry) {
	start := time.Now()
	cert, err := m.sign(ctx, e)
	m.mu.Lock()
	m.fetching--
	m.wakeUp()
	if e.gone != nil {
		m.mu.Unlock()
		return
	}
	e.cancel = nil
	now := time.Now()
	level := slog.LevelWarn
	if err == nil {
		e.succeeded(cert, now)
		m.told = complaints.Book{}
		m.retryLocked(now, unreachable)
	} else {
		e.failed(err, now, m.cfg.QuietFor)
		told := &e.told
		if unreachable(err) {
			told = &m.told // It has nothing to do with this identity.
		}
		if e.forming || !told.News(err, now) {
			level = slog.LevelDebug
		}
	}
	m.later.add(e)
	close(e.changed)
	e.changed = make(chan struct{})
	failures, retry := e.failures, e.due.Sub(now)
	m.mu.Unlock()

	log := m.cfg.Log.With("identity", e.id, "took", now.Sub(start))
	if err != nil {
		log.Log(ctx, level, "certificate not fetched", "error", err, "failures", failures, "retry_in", retry)
		return
	}
	log.Info("certificate fetched", "serial", cert.Leaf.SerialNumber.String(), "not_after", cert.NotAfter, "roots", len(cert.Roots))
}

// sign makes a key and gets it a certificate.
func (m *Manager) sign(ctx context.Context, e *entry) (*Certificate, error) {
	key, csr, err := NewRequest(e.id)
	if err != nil {
		return nil, err
	}
	elements, err := m.cfg.CA.Sign(ctx, e.id, csr, m.cfg.TTL)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		return nil, fmt.Errorf("certs: sign: %w", err)
	}
	parsed, err := parseChain(elements, &m.bundles)
	if err == nil {
		err = parsed.check(e.id, &key.PublicKey, time.Now())
	}
	if err != nil {
		return nil, fmt.Errorf("certs: answer of %s: %w", m.place(), err)
	}
	if roots := parsed.roots; roots.skipped > 0 {
		m.cfg.Log.Warn("roots of CA skipped: they do not parse", "identity", e.id, "skipped", roots.skipped, "used", len(roots.certs))
	}
	cert := parsed.certificate(e.id, key, m.cfg.PQCOnly, m.cfg.Revocations)
	if err := cert.verifySelf(); err != nil {
		// Peers may know other roots than these: theirs is the last word.
		m.cfg.Log.Warn("certificate is no SVID that chains to the roots it came with", "identity", e.id, "error", err)
	}
	return cert, nil
}

// place names the CA for errors.
func (m *Manager) place() string {
	if s, ok := m.cfg.CA.(fmt.Stringer); ok {
		return s.String()
	}
	return "CA"
}

// unreachable reports whether err is of a CA that did not answer: when it
// answers one request it may answer all.
func unreachable(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.DeadlineExceeded || errors.Is(err, errFetchTimeout)
}

// succeeded sets when e is fetched again: at half of its life, or, if it is
// older than that already (a short life, a CA that dates back, a slow clock),
// at half of what is left, but never without a pause.
func (e *entry) succeeded(cert *Certificate, now time.Time) {
	e.cert, e.err, e.priority, e.failures = cert, nil, Background, 0
	e.tried, e.forming, e.told = now, false, complaints.Book{}
	if e.due = cert.refreshAt(); !e.due.After(now) {
		e.due = now.Add(max(cert.NotAfter.Sub(now)/2, firstRetry))
	}
}

// failed sets when e is tried again; an old certificate serves on meanwhile,
// and when it ends one more try is due at once. So it is at the end of the time
// that a new identity may be unknown.
func (e *entry) failed(err error, now time.Time, quietFor time.Duration) {
	e.err, e.tried = err, now
	e.failures++
	e.due = now.Add(retryIn(e.failures))
	e.priority = Warmup
	end := e.born.Add(quietFor)
	e.forming = e.cert == nil && now.Before(end) && status.Code(err) == codes.Unauthenticated
	if e.forming && end.Before(e.due) {
		e.due = end
	}
	if e.valid(now) {
		e.priority = Background
		if e.cert.NotAfter.Before(e.due) {
			e.due = e.cert.NotAfter
		}
	}
}
