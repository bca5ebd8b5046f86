package certs

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/identity"
)

// A Certificate is an immutable snapshot of what a workload holds: its
// certificate, the private key to it, and the roots that came with it. What a
// rotation brings is a new Certificate; connections made with the old one live
// on.
type Certificate struct {
	ID        identity.ID
	Leaf      *x509.Certificate
	Chain     []*x509.Certificate // Leaf first, then the intermediates; no root
	Roots     []*x509.Certificate // every root that peers may chain to; shared
	NotBefore time.Time           // of Leaf
	NotAfter  time.Time           // of Leaf

	pair    tls.Certificate
	roots   *x509.CertPool // shared
	revoked *Revocations   // shared; nil: nothing is
	pqcOnly bool
	server  func() *tls.Config
}

// New makes a Certificate of what a CA returned for the key of a request (see
// CA.Sign, NewRequest), if it is for id and key, and valid at now.
func New(id identity.ID, key *ecdsa.PrivateKey, elements [][]byte, now time.Time) (*Certificate, error) {
	parsed, err := parseChain(elements, new(bundleCache))
	if err == nil {
		err = parsed.check(id, &key.PublicKey, now)
	}
	if err != nil {
		return nil, fmt.Errorf("certs: answer for %v: %w", id, err)
	}
	return parsed.certificate(id, key, false, nil), nil
}

// WithRevocations returns a Certificate like c that refuses peers whose
// certificates r has.
func (c *Certificate) WithRevocations(r *Revocations) *Certificate {
	out := *c
	out.revoked = r
	out.server = sync.OnceValue(out.newServerTLS)
	return &out
}

func (c chain) certificate(id identity.ID, key *ecdsa.PrivateKey, pqcOnly bool, revoked *Revocations) *Certificate {
	leaf := c.certs[0]
	out := &Certificate{
		ID:        id,
		Leaf:      leaf,
		Chain:     c.certs,
		Roots:     c.roots.certs,
		NotBefore: leaf.NotBefore,
		NotAfter:  leaf.NotAfter,
		pair:      tls.Certificate{PrivateKey: key, Leaf: leaf},
		roots:     c.roots.pool,
		revoked:   revoked,
		pqcOnly:   pqcOnly,
	}
	for _, cert := range c.certs {
		out.pair.Certificate = append(out.pair.Certificate, cert.Raw)
	}
	out.server = sync.OnceValue(out.newServerTLS)
	return out
}

// expired reports whether c is of no use any more at now.
func (c *Certificate) expired(now time.Time) bool { return !now.Before(c.NotAfter) }

// refreshAt is half of c's life.
func (c *Certificate) refreshAt() time.Time {
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 2)
}

// String names c without any of its contents, the key least of all.
func (c *Certificate) String() string {
	if c == nil {
		return "no certificate"
	}
	return fmt.Sprintf("certificate %x of %v, valid until %s", c.Leaf.SerialNumber, c.ID, stamp(c.NotAfter))
}

// GoString is String, so that %#v does not print the key.
func (c *Certificate) GoString() string { return c.String() }

// LogValue is String.
func (c *Certificate) LogValue() slog.Value { return slog.StringValue(c.String()) }
