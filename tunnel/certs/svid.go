package certs

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// A Certificate is a source of its own X.509-SVID and bundle, for whatever
// speaks go-spiffe. Istio's identities may lie outside of SPIFFE's narrower
// grammar; then both say so.
var (
	_ x509svid.Source   = (*Certificate)(nil)
	_ x509bundle.Source = (*Certificate)(nil)
)

// GetX509SVID implements x509svid.Source. The private key is shared.
func (c *Certificate) GetX509SVID() (*x509svid.SVID, error) {
	id, err := spiffeid.FromString(c.ID.String())
	if err != nil {
		return nil, fmt.Errorf("certs: %v as a SPIFFE ID: %w", c.ID, err)
	}
	key, ok := c.pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("certs: key of %v cannot sign", c.ID)
	}
	return &x509svid.SVID{ID: id, Certificates: slices.Clone(c.Chain), PrivateKey: key}, nil
}

// GetX509BundleForTrustDomain implements x509bundle.Source: the roots of our
// own trust domain, and of no other.
func (c *Certificate) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td.Name() != c.ID.TrustDomain() {
		return nil, fmt.Errorf("certs: no bundle for trust domain %q, only for %q", td.Name(), c.ID.TrustDomain())
	}
	return x509bundle.FromX509Authorities(td, c.Roots), nil
}

// verifySelf holds the certificate against the roots it came with, as
// X.509-SVID and for both roles, which go-spiffe leaves open.
func (c *Certificate) verifySelf() error {
	svid, err := c.GetX509SVID()
	if err != nil {
		return err
	}
	if _, _, err := x509svid.Verify(svid.Certificates, c); err != nil {
		return err
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if !slices.Contains(c.Leaf.ExtKeyUsage, usage) && !slices.Contains(c.Leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
			return errors.New("leaf is not for both server and client authentication")
		}
	}
	return nil
}
