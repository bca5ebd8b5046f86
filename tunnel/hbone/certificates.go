package hbone

import (
	"context"
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
)

// A CertSource is what Certificates needs of a certs.Manager.
type CertSource interface {
	Current(id identity.ID) (*certs.Certificate, bool)
	Get(ctx context.Context, id identity.ID, p certs.Priority) (*certs.Certificate, error)
}

var _ CertSource = (*certs.Manager)(nil)

// Certificates waits for certificates on behalf of a loop, with one goroutine
// for each identity that is waited for.
type Certificates struct {
	// Set by NewCertificates, read-only after.
	loop    splice.Loop
	source  CertSource
	timeout time.Duration
	ctx     context.Context // ends all waits
	stop    context.CancelFunc
	waits   sync.WaitGroup

	// Owned by the loop.
	pending map[identity.ID]*certWait
}

type certWait struct{ waiters []*certWaiter }

type certWaiter struct {
	done func(*certs.Certificate, error)
}

// NewCertificates returns Certificates whose waits last at most timeout.
func NewCertificates(loop splice.Loop, source CertSource, timeout time.Duration) *Certificates {
	c := &Certificates{loop: loop, source: source, timeout: timeout, pending: make(map[identity.ID]*certWait)}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c
}

// Current returns the certificate of id if it is at hand.
func (c *Certificates) Current(id identity.ID) (*certs.Certificate, bool) {
	return c.source.Current(id)
}

// Await calls done once on the loop, after it has returned, unless cancel is
// called before.
func (c *Certificates) Await(id identity.ID, done func(*certs.Certificate, error)) (cancel func()) {
	w := &certWaiter{done: done}
	wait := c.pending[id]
	if wait == nil {
		wait = &certWait{}
		c.pending[id] = wait
		c.waits.Go(func() { c.get(id) })
	}
	wait.waiters = append(wait.waiters, w)
	return func() { w.done = nil }
}

// get waits for one certificate.
func (c *Certificates) get(id identity.ID) {
	ctx, cancel := context.WithTimeout(c.ctx, c.timeout)
	defer cancel()
	cert, err := c.source.Get(ctx, id, certs.RealTime)
	c.loop.Post(func() {
		wait := c.pending[id]
		delete(c.pending, id)
		for _, w := range wait.waiters {
			if w.done != nil {
				w.done(cert, err)
			}
		}
	})
}

// Close ends all waits with an error. Wait returns when their goroutines are
// gone. Both may be called from anywhere, Await not after.
func (c *Certificates) Close() { c.stop() }

// Wait waits for the goroutines to end.
func (c *Certificates) Wait() { c.waits.Wait() }
