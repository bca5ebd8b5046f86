package certs

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
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
	Roots     []*x509.Certificate // every root that peers may chain to
	NotBefore time.Time           // of Leaf
	NotAfter  time.Time           // of Leaf

	key *ecdsa.PrivateKey
}

// ClientTLS returns the configuration to dial a peer that has to present one
// of the identities in want. With an empty want every peer is refused.
func (c *Certificate) ClientTLS(want []identity.ID) *tls.Config { panic("certs: being written") }

// ServerTLS returns the configuration to accept peers of the same trust
// domain. It is built once: do not modify it.
func (c *Certificate) ServerTLS() *tls.Config { panic("certs: being written") }

// PeerID returns the identity of the peer: the first URI SAN of its leaf that
// parses.
func PeerID(cs tls.ConnectionState) (identity.ID, error) { panic("certs: being written") }
