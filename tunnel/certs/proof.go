package certs

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"
)

// A Proof is what a peer has shown in a handshake that succeeded. It serves to
// judge the peer again when other certificates are revoked than there were then.
// It belongs to one goroutine.
type Proof struct {
	presented []*x509.Certificate
	chains    [][]*x509.Certificate // nil: to be found again, if that is ever needed
	roots     *x509.CertPool
	at        time.Time // when the certificates were valid
}

// NewProof keeps what cs says of the peer. own is the certificate that the
// handshake was made with; a server, whose cs has the verified chains, needs none.
func NewProof(cs tls.ConnectionState, own *Certificate, now time.Time) *Proof {
	p := &Proof{presented: cs.PeerCertificates, chains: cs.VerifiedChains, at: now}
	if own != nil {
		p.roots = own.roots
	}
	return p
}

// Check returns a *RevokedError if the peer's certificate, or one above it, has
// been revoked since. That a certificate has expired since does not matter.
func (r *Revocations) Check(p *Proof) error {
	if r == nil || p == nil {
		return nil
	}
	set := r.set.Load()
	if !set.suspects(p.presented) {
		return nil
	}
	if p.chains == nil {
		leaf, intermediates := p.presented[0], x509.NewCertPool()
		for _, cert := range p.presented[1:] {
			intermediates.AddCert(cert)
		}
		chains, err := leaf.Verify(x509.VerifyOptions{
			Roots: p.roots, Intermediates: intermediates, CurrentTime: p.at,
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
		})
		if err != nil {
			// It was verified once. Whoever is on a list does not profit from a doubt.
			return fmt.Errorf("certs: verify again: %w: %w", set.suspect(p.presented), err)
		}
		p.chains = chains
	}
	return set.check(p.chains)
}

// verify returns a *RevokedError if none of chains, which are verified, is
// free of revoked certificates.
func (r *Revocations) verify(chains [][]*x509.Certificate) error {
	if r == nil {
		return nil
	}
	return r.set.Load().check(chains)
}

// suspects reports whether a list of that name has one of certs on it. It is
// cheap and may be wrong: whose list it is has to be proven.
func (s *revocationSet) suspects(certs []*x509.Certificate) bool { return s.suspect(certs) != nil }

func (s *revocationSet) suspect(certs []*x509.Certificate) *RevokedError {
	for _, cert := range certs {
		for _, l := range s.byIssuer[string(cert.RawIssuer)] {
			if l.has(cert) {
				return newRevokedError(cert)
			}
		}
	}
	return nil
}

func (s *revocationSet) check(chains [][]*x509.Certificate) error {
	var revoked *RevokedError
	for _, chain := range chains {
		cert := s.revokedIn(chain)
		if cert == nil {
			return nil
		}
		if revoked == nil {
			revoked = newRevokedError(cert)
		}
	}
	if revoked == nil { // No chain at all.
		return nil
	}
	return revoked
}

// revokedIn returns the first certificate of chain, which ends with a root,
// that the next one has revoked.
func (s *revocationSet) revokedIn(chain []*x509.Certificate) *x509.Certificate {
	for i := 0; i+1 < len(chain); i++ {
		for _, l := range s.byIssuer[string(chain[i].RawIssuer)] {
			if l.has(chain[i]) && l.signedBy(chain[i+1]) {
				return chain[i]
			}
		}
	}
	return nil
}

func newRevokedError(cert *x509.Certificate) *RevokedError {
	subject := list(ids(cert))
	if cert.IsCA {
		subject = fmt.Sprintf("CA %.256q", cmp.Or(cert.Subject.String(), "without a name"))
	}
	return &RevokedError{
		Serial:  fmt.Sprintf("%x", cert.SerialNumber),
		Subject: subject,
		Issuer:  fmt.Sprintf("%.256q", cert.Issuer.String()),
	}
}
