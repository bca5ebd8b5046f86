package control

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"slices"
	"time"
)

const (
	rootValidity = 10 * 365 * 24 * time.Hour
	clockSkew    = 2 * time.Minute // how far a proxy's clock may be behind
)

// authority is a CA that signs: its certificate, what stands between it and a
// root, and its key.
type authority struct {
	cert          *x509.Certificate
	intermediates []*x509.Certificate // cert first, unless it is a root itself
	key           crypto.Signer
}

// role is what a CA of the state does. Rotation moves each through all of them.
type role string

const (
	roleNext    role = "next"    // trusted, does not sign yet
	roleSigning role = "signing" // trusted, signs
	roleOld     role = "old"     // trusted, signs no more
)

// rootAuthority is a CA of the state, with the time it got its role.
type rootAuthority struct {
	authority
	role  role
	since time.Time
}

// authorities are the CAs of the state: at most one of each role, and always
// one that signs.
type authorities struct{ list []*rootAuthority }

func newAuthorities(trustDomain string, now time.Time) (*authorities, error) {
	a, err := newRoot(trustDomain, now)
	if err != nil {
		return nil, err
	}
	return &authorities{list: []*rootAuthority{{authority: *a, role: roleSigning, since: now}}}, nil
}

func (as *authorities) of(r role) *rootAuthority {
	for _, a := range as.list {
		if a.role == r {
			return a
		}
	}
	return nil
}

// roots are all certificates to trust, newest last.
func (as *authorities) roots() []*x509.Certificate {
	var out []*x509.Certificate
	for _, r := range []role{roleOld, roleSigning, roleNext} {
		if a := as.of(r); a != nil {
			out = append(out, a.cert)
		}
	}
	return out
}

func (as *authorities) validate() error {
	count := make(map[role]int)
	for _, a := range as.list {
		count[a.role]++
	}
	switch {
	case count[roleSigning] != 1:
		return fmt.Errorf("%d authorities sign, exactly one must", count[roleSigning])
	case count[roleNext] > 1 || count[roleOld] > 1 || count[roleNext]+count[roleOld]+1 != len(as.list):
		return errors.New("more authorities than roles")
	}
	return nil
}

// authorityJSON is one authority in the state file.
type authorityJSON struct {
	Role        role      `json:"role"`
	Since       time.Time `json:"since"`
	Certificate string    `json:"certificate"`
	Key         string    `json:"key"`
}

// MarshalJSON and UnmarshalJSON are the form in the state file. It holds keys.
func (as *authorities) MarshalJSON() ([]byte, error) {
	var out []authorityJSON
	for _, a := range as.list {
		key, err := keyPEM(a.key)
		if err != nil {
			return nil, err
		}
		out = append(out, authorityJSON{a.role, a.since, string(encodeCerts(a.cert)), string(key)})
	}
	return json.Marshal(out)
}

func (as *authorities) UnmarshalJSON(data []byte) error {
	var in []authorityJSON
	if err := json.Unmarshal(data, &in); err != nil {
		return err
	}
	as.list = nil
	for i, a := range in {
		certs, err := parseCerts([]byte(a.Certificate))
		if err != nil {
			return fmt.Errorf("authority %d: %w", i, err)
		}
		key, err := parseKey([]byte(a.Key))
		if err != nil {
			return fmt.Errorf("authority %d: %w", i, err)
		}
		if err := fitsCA(certs[0], key); err != nil {
			return fmt.Errorf("authority %d: %w", i, err)
		}
		as.list = append(as.list, &rootAuthority{authority{cert: certs[0], key: key}, a.Role, a.Since})
	}
	return nil
}

// newRoot makes a self-signed CA on P-256.
func newRoot(trustDomain string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("control: make a CA: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{trustDomain}, CommonName: fmt.Sprintf("ztun root %.8x", serial)},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(rootValidity),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("control: make a CA: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("control: make a CA: %w", err)
	}
	return &authority{cert: cert, key: key}, nil
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("control: make a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// readAuthority reads a CA that was made elsewhere.
func readAuthority(certFile, keyFile, rootFile string) (*authority, []*x509.Certificate, error) {
	fail := func(what string, err error) (*authority, []*x509.Certificate, error) {
		return nil, nil, fmt.Errorf("control: %s: %w", what, err)
	}
	data, err := os.ReadFile(certFile)
	if err != nil {
		return fail("read the CA", err)
	}
	chain, err := parseCerts(data)
	if err != nil {
		return fail(certFile, err)
	}
	if data, err = os.ReadFile(keyFile); err != nil {
		return fail("read the CA", err)
	}
	key, err := parseKey(data)
	if err != nil {
		return fail(keyFile, err)
	}
	if err := fitsCA(chain[0], key); err != nil {
		return fail(certFile, err)
	}
	a := &authority{cert: chain[0], key: key}
	var roots []*x509.Certificate
	for _, c := range chain {
		if isSelfSigned(c) {
			roots = append(roots, c)
		} else {
			a.intermediates = append(a.intermediates, c)
		}
	}
	if rootFile != "" {
		if data, err = os.ReadFile(rootFile); err != nil {
			return fail("read the roots", err)
		}
		if roots, err = parseCerts(data); err != nil {
			return fail(rootFile, err)
		}
	}
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range roots {
		pool.AddCert(c)
	}
	for _, c := range a.intermediates {
		between.AddCert(c)
	}
	if _, err := a.cert.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fail(certFile, err)
	}
	return a, roots, nil
}

func isSelfSigned(c *x509.Certificate) bool {
	return string(c.RawIssuer) == string(c.RawSubject) && c.CheckSignatureFrom(c) == nil
}

// fitsCA checks that a certificate may sign others, and that the key is its own.
func fitsCA(c *x509.Certificate, key crypto.Signer) error {
	if !c.IsCA || !c.BasicConstraintsValid || (c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0) {
		return errors.New("the certificate may not sign others")
	}
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(c.PublicKey) {
		return errors.New("the key is not the certificate's")
	}
	return nil
}

// parseCerts reads all certificates of a PEM text; there is at least one.
func parseCerts(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("holds no certificate")
	}
	return out, nil
}

// parseKey reads a private key in any of the usual PEM forms.
func parseKey(data []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return nil, errors.New("holds no private key")
		}
		var key any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			continue
		}
		if err != nil {
			return nil, errors.New("holds a private key that cannot be parsed")
		}
		if signer, ok := key.(crypto.Signer); ok {
			return signer, nil
		}
		return nil, errors.New("holds a key that cannot sign")
	}
}

func keyPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("control: encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// acceptableKey says whether a public key is strong enough to be signed for.
func acceptableKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if slices.Contains([]elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}, k.Curve) {
			return nil
		}
		return fmt.Errorf("curve %s is too weak", k.Curve.Params().Name)
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("an RSA key of %d bits; 2048 to 8192 are taken", n)
		}
		return nil
	}
	return fmt.Errorf("a key of type %T", pub)
}

// sign issues a leaf certificate for pub. Its validity ends with the CA's at
// the latest.
func (a *authority) sign(template *x509.Certificate, pub crypto.PublicKey, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore = now.Add(-clockSkew)
	template.NotAfter = now.Add(ttl)
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	if !template.NotAfter.After(now) {
		return nil, errors.New("control: the CA's certificate has expired")
	}
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageDigitalSignature
	if _, ok := pub.(*rsa.PublicKey); ok {
		template.KeyUsage |= x509.KeyUsageKeyEncipherment
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, pub, a.key)
	if err != nil {
		return nil, fmt.Errorf("control: sign: %w", err)
	}
	return x509.ParseCertificate(der)
}
