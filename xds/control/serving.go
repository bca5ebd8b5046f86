package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const servingTTL = 7 * 24 * time.Hour

// servingIdentity is the server's own certificate. It is issued when a
// connection needs it: at half of its life, or when the CA changed.
type servingIdentity struct {
	srv *Server
	// Set by prepare, read-only after.
	names []string
	addrs []net.IP

	mu sync.Mutex
	// mu guards the fields below.
	cert    *tls.Certificate
	issuer  *x509.Certificate
	renewAt time.Time
}

// prepare decides the names, and issues the first certificate.
func (si *servingIdentity) prepare(listen net.Addr) error {
	hosts := append([]string{"localhost", "127.0.0.1", "::1"}, si.srv.cfg.Hosts...)
	if host, _, err := net.SplitHostPort(listen.String()); err == nil {
		hosts = append(hosts, host)
	}
	for _, h := range hosts {
		switch addr, err := netip.ParseAddr(h); {
		case err == nil && addr.IsUnspecified():
		case err == nil:
			si.addrs = append(si.addrs, addr.WithZone("").AsSlice())
		case !slices.Contains(si.names, h):
			si.names = append(si.names, h)
		}
	}
	_, err := si.current(nil)
	return err
}

func (si *servingIdentity) tlsConfig() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: si.current}
}

// current returns the certificate in force, a new one if need be.
func (si *servingIdentity) current(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	signer, now := si.srv.trust.Load().signer, si.srv.cfg.Now()
	si.mu.Lock()
	defer si.mu.Unlock()
	if si.cert != nil && si.issuer.Equal(signer.cert) && now.Before(si.renewAt) {
		return si.cert, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("control: make a key: %w", err)
	}
	leaf, err := signer.sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "ztun control"},
		DNSNames:    si.names,
		IPAddresses: si.addrs,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, key.Public(), servingTTL, now)
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	for _, c := range signer.intermediates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	si.cert, si.issuer = cert, signer.cert
	si.renewAt = now.Add(leaf.NotAfter.Sub(now) / 2)
	return cert, nil
}
