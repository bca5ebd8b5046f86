package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ztun/ztun/tunnel/identity"
)

// ALPN is the application protocol of HBONE connections.
const ALPN = "h2"

// ErrPeer matches the error of a handshake with a peer whose certificate is in
// order but whose identity is not one of those asked for.
var ErrPeer = errors.New("unexpected identity of peer")

// base is what both roles share. TLS 1.3 has no choice of cipher suites in Go;
// AES-GCM comes first, on both sides, where the CPU has instructions for it:
// all amd64 and arm64 of a server. A stock ztunnel offers and takes nothing
// but AES-GCM, so the third suite, ChaCha20-Poly1305, is only ever used
// between two ztuns on CPUs without them. Go sorts the groups by itself, with
// X25519MLKEM768 first.
func (c *Certificate) base() *tls.Config {
	groups := []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384}
	if c.pqcOnly {
		groups = groups[:1]
	}
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		MaxVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{ALPN},
		CurvePreferences:            groups,
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true,
	}
}

// ClientTLS returns the configuration to dial a peer that has to present one
// of the identities in want: any URI SAN of its leaf equals one of them. With
// an empty want every peer is refused. No server name is sent or checked.
func (c *Certificate) ClientTLS(want []identity.ID) *tls.Config {
	want = slices.Clone(want)
	cfg := c.base()
	// Whatever CAs the peer names: if it does not trust ours it can say so.
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c.pair, nil }
	// crypto/tls verifies the chain together with a host name or not at all;
	// an overlay has no host names, so VerifyConnection does it, on every
	// handshake: there is no session cache, hence no resumption.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error { return c.verifyServer(cs, want) }
	return cfg
}

// ServerTLS returns the configuration to accept peers with a certificate that
// chains to our roots and an identity of our trust domain. It is built once:
// do not modify it.
func (c *Certificate) ServerTLS() *tls.Config { return c.server() }

func (c *Certificate) newServerTLS() *tls.Config {
	cfg := c.base()
	cfg.Certificates = []tls.Certificate{c.pair}
	cfg.ClientAuth = tls.RequireAndVerifyClientCert
	cfg.ClientCAs = c.roots
	cfg.VerifyConnection = c.verifyClient
	// A client that offers protocols has to offer ours. crypto/tls lets one
	// with nothing but http/1.1 pass as if it had offered none; a name that
	// nobody offers makes it answer with the alert that is due.
	none := cfg.Clone()
	none.NextProtos = []string{"no " + ALPN + " offered"}
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if offers := hello.SupportedProtos; len(offers) > 0 && !slices.Contains(offers, ALPN) {
			return none, nil
		}
		return nil, nil
	}
	return cfg
}

func (c *Certificate) verifyServer(cs tls.ConnectionState, want []identity.ID) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("certs: verify server: no certificate")
	}
	leaf := cs.PeerCertificates[0]
	if err := checkLeaf(leaf); err != nil {
		return fmt.Errorf("certs: verify server: %w", err)
	}
	intermediates := x509.NewCertPool()
	for _, cert := range cs.PeerCertificates[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         c.roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
	}
	if err := c.revoked.verify(chains); err != nil {
		return fmt.Errorf("certs: verify server: %w", err)
	}
	got := ids(leaf)
	for _, id := range got {
		if slices.Contains(want, id) {
			return nil
		}
	}
	return fmt.Errorf("certs: verify server: %w: expected %s, presented %s", ErrPeer, list(want), list(got))
}

// verifyClient runs after crypto/tls has verified the chain, for client
// authentication, to ClientCAs.
func (c *Certificate) verifyClient(cs tls.ConnectionState) error {
	if len(cs.VerifiedChains) == 0 {
		return errors.New("certs: verify client: no certificate")
	}
	leaf := cs.PeerCertificates[0]
	if err := checkLeaf(leaf); err != nil {
		return fmt.Errorf("certs: verify client: %w", err)
	}
	if err := c.revoked.verify(cs.VerifiedChains); err != nil {
		return fmt.Errorf("certs: verify client: %w", err)
	}
	domain := c.ID.TrustDomain()
	got := ids(leaf)
	for _, id := range got {
		if id.TrustDomain() == domain {
			return nil
		}
	}
	return fmt.Errorf("certs: verify client: %w: expected trust domain %q, presented %s", ErrPeer, domain, list(got))
}

// checkLeaf refuses a leaf that could sign others.
// "[A leaf certificate] MUST set the cA field to false", and MUST NOT set
// keyCertSign or cRLSign.
// https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md#4-constraints-and-usage
func checkLeaf(leaf *x509.Certificate) error {
	if leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return errors.New("a CA certificate as leaf")
	}
	return nil
}

// list writes identities for an error, a bounded number of them.
func list(ids []identity.ID) string {
	if len(ids) == 0 {
		return "none"
	}
	const most = 4
	var b strings.Builder
	for i, id := range ids {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(ids)-most)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%.256s", id.String())
	}
	return b.String()
}

// PeerID returns the identity of the peer: the first URI SAN of its leaf that
// parses.
func PeerID(cs tls.ConnectionState) (identity.ID, error) {
	if len(cs.PeerCertificates) == 0 {
		return identity.ID{}, errors.New("certs: peer identity: no certificate")
	}
	got := ids(cs.PeerCertificates[0])
	if len(got) == 0 {
		return identity.ID{}, errors.New("certs: peer identity: no SPIFFE ID in certificate")
	}
	return got[0], nil
}
