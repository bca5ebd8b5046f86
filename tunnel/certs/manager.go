package certs

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/ztun/ztun/tunnel/identity"
)

// A CA signs certificate requests.
type CA interface {
	// Sign returns the chain for the PEM encoded request csr, as PEM: the
	// leaf, intermediates, and last the root bundle.
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
	PQCOnly       bool          // X25519MLKEM768 is the only key exchange
	Log           *slog.Logger  // nil: discard
}

// What Get's errors match.
var (
	ErrUnavailable = errors.New("certs: no certificate")            // the last fetch failed; wraps its error
	ErrForgotten   = errors.New("certs: identity no longer needed") // Forget was called
	ErrBusy        = errors.New("certs: too many waiters or identities")
	ErrClosed      = errors.New("certs: manager is closed")
)

// A Manager fetches, holds and renews the certificates of the identities it is
// asked for.
type Manager struct{}

// NewManager returns a Manager; Run makes it work.
func NewManager(cfg Config) *Manager { panic("certs: being written") }

// Run fetches until ctx is done; then it fails all waiters and returns when
// its fetches have ended.
func (m *Manager) Run(ctx context.Context) error { panic("certs: being written") }

// Get returns the certificate of id, waiting for the first fetch to end if it
// must. While an identity is unavailable it returns the last error at once.
func (m *Manager) Get(ctx context.Context, id identity.ID, p Priority) (*Certificate, error) {
	panic("certs: being written")
}

// Current returns the certificate of id if there is an unexpired one. It does
// not wait and starts nothing.
func (m *Manager) Current(id identity.ID) (*Certificate, bool) { panic("certs: being written") }

// Prefetch starts a fetch for id, with Warmup, unless it is known already.
func (m *Manager) Prefetch(id identity.ID) { panic("certs: being written") }

// Forget drops id, its certificate and its fetch. Those who wait for it fail
// with ErrForgotten.
func (m *Manager) Forget(id identity.ID) { panic("certs: being written") }

// Status is what Dump says of an identity.
type Status struct {
	ID    identity.ID
	State string       // "Initializing", "Available" or "Unavailable: <error>"
	Cert  *Certificate // nil: none
	Err   error        // of the last fetch
	Next  time.Time    // of the next fetch; zero: under way or waiting for a place
}

// Dump lists all identities, ordered by their text.
func (m *Manager) Dump() []Status { panic("certs: being written") }
