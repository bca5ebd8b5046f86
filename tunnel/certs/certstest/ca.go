// Package certstest has an in-memory CA for tests.
package certstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/identity"
)

// CA is a certs.CA in memory. It keeps the time of time.Now, so it works
// inside testing/synctest. Any goroutine may call its methods.
type CA struct {
	// mu guards the fields below.
	mu    sync.Mutex
	now   *authority
	roots []*x509.Certificate // newest first
}

// authority is a certificate that signs others, and what is above it.
type authority struct {
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	chain []*x509.Certificate // intermediates from cert upwards, without the root
}

var _ certs.CA = (*CA)(nil)

// New returns a CA with one root that signs leaves itself.
func New() *CA {
	ca := &CA{}
	ca.Rotate()
	return ca
}

// Rotate makes a new root that signs from now on. The bundle that comes with
// later leaves holds the new root and all earlier ones.
func (ca *CA) Rotate() {
	root := newAuthority(nil)
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.now = root
	ca.roots = append([]*x509.Certificate{root.cert}, ca.roots...)
}

// Intermediate makes a new intermediate below what signs now; it signs from
// now on.
func (ca *CA) Intermediate() {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.now = newAuthority(ca.now)
}

// Roots returns the root bundle, newest first.
func (ca *CA) Roots() []*x509.Certificate {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return append([]*x509.Certificate(nil), ca.roots...)
}

// Sign implements certs.CA.
func (ca *CA) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(csr)
	if block == nil {
		return nil, errors.New("certstest: request is not PEM")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("certstest: parse request: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certstest: check request: %w", err)
	}
	return ca.SignKey(req.PublicKey, Leaf(ttl, id.String()))
}

// Leaf is the template of a leaf with the given URI SANs, valid from now for
// ttl. Tests change it to make certificates that must be refused.
func Leaf(ttl time.Duration, uris ...string) *x509.Certificate {
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: serial(),
		NotBefore:    now.Truncate(time.Second),
		NotAfter:     now.Add(ttl),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if len(uris) > 0 {
		t.ExtraExtensions = []pkix.Extension{san(uris)}
	}
	return t
}

// san is written by hand, since a test may want a URI that x509 would not
// write.
func san(uris []string) pkix.Extension {
	var names []asn1.RawValue
	for _, uri := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)})
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: must(asn1.Marshal(names))}
}

// SignKey signs template for the public key pub, and returns what certs.CA's
// Sign does.
func (ca *CA) SignKey(pub any, template *x509.Certificate) ([][]byte, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	der, err := x509.CreateCertificate(rand.Reader, template, ca.now.cert, pub, ca.now.key)
	if err != nil {
		return nil, fmt.Errorf("certstest: sign: %w", err)
	}
	out := [][]byte{encode(der)}
	for _, cert := range ca.now.chain {
		out = append(out, encode(cert.Raw))
	}
	var bundle []byte
	for _, root := range ca.roots {
		bundle = append(bundle, encode(root.Raw)...)
	}
	return append(out, bundle), nil
}

// Issue returns a certificate for id, valid for a day, made without a Manager.
func (ca *CA) Issue(id identity.ID) *certs.Certificate {
	key, csr, err := certs.NewRequest(id)
	if err != nil {
		panic(err)
	}
	return must(certs.New(id, key, must(ca.Sign(context.Background(), id, csr, 24*time.Hour)), time.Now()))
}

// An Issuer is what a CA signed with at one time. Its certificates can be
// revoked later.
type Issuer struct{ from *authority }

// Issuer returns what signs now.
func (ca *CA) Issuer() Issuer {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return Issuer{ca.now}
}

// Certificate is the issuer's own.
func (i Issuer) Certificate() *x509.Certificate { return i.from.cert }

// CRL returns a list of the given certificates, in PEM: number 1, from now and
// for a day, unless change, which may be nil, says otherwise.
func (i Issuer) CRL(change func(*x509.RevocationList), revoked ...*x509.Certificate) []byte {
	t := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(24 * time.Hour)}
	for _, cert := range revoked {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: time.Now()})
	}
	if change != nil {
		change(t)
	}
	der := must(x509.CreateRevocationList(rand.Reader, t, i.from.cert, i.from.key))
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// Namesake returns another issuer of the same name, which i knows nothing of.
func (i Issuer) Namesake() Issuer {
	a := &authority{key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))}
	t := *i.from.cert
	t.PublicKey, t.SubjectKeyId, t.AuthorityKeyId = nil, nil, nil
	a.cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, &t, &t, &a.key.PublicKey, a.key))))
	return Issuer{a}
}

// newAuthority makes an intermediate below parent; below none, a root.
func newAuthority(parent *authority) *authority {
	a := &authority{key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))}
	n := serial()
	t := &x509.Certificate{
		SerialNumber:          n,
		Subject:               pkix.Name{Organization: []string{"certstest"}, CommonName: fmt.Sprintf("%x", n)},
		NotBefore:             time.Now().Add(-time.Hour).Truncate(time.Second),
		NotAfter:              time.Now().Add(10 * 365 * 24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	above, key := t, a.key
	if parent != nil {
		above, key = parent.cert, parent.key
	}
	a.cert = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, t, above, &a.key.PublicKey, key))))
	if parent != nil {
		a.chain = append([]*x509.Certificate{a.cert}, parent.chain...)
	}
	return a
}

func serial() *big.Int { return must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))) }

func encode(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
