package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ztun/ztun/tunnel/identity"
)

// Bounds of what a CA may return.
const (
	maxChainBytes    = 1 << 20
	maxIntermediates = 16
	maxRoots         = 512
)

// What is wrong with a chain that a CA returned; New's errors match these.
var (
	ErrChain        = errors.New("malformed chain")
	ErrWrongID      = errors.New("certificate is for another identity")
	ErrWrongKey     = errors.New("certificate is for another key")
	ErrNotYetValid  = errors.New("certificate is not yet valid (do the clocks differ?)")
	ErrExpired      = errors.New("certificate has expired")
	errNoRoot       = fmt.Errorf("%w: a leaf and no root", ErrChain)
	errNoUsableRoot = fmt.Errorf("%w: no usable root", ErrChain)
	errTooLarge     = fmt.Errorf("%w: too large", ErrChain)
)

// A chain is what a CA returned, parsed.
type chain struct {
	certs []*x509.Certificate // leaf first
	roots *bundle
}

// A bundle is the roots of a CA, parsed. It is immutable.
type bundle struct {
	text    []byte
	certs   []*x509.Certificate
	pool    *x509.CertPool // of certs
	skipped int            // roots that do not parse
}

func parseBundle(text []byte) *bundle {
	b := &bundle{text: text, pool: x509.NewCertPool()}
	b.certs, b.skipped = parsePEM(text)
	for _, root := range b.certs {
		b.pool.AddCert(root)
	}
	return b
}

// A bundleCache keeps the last bundle: all identities of a CA have the same
// roots, which parsed take 3.5 KiB and more. The zero value is ready for use.
type bundleCache struct{ last atomic.Pointer[bundle] }

func (c *bundleCache) parse(text []byte) *bundle {
	if b := c.last.Load(); b != nil && bytes.Equal(b.text, text) {
		return b
	}
	b := parseBundle(bytes.Clone(text))
	c.last.Store(b)
	return b
}

// parseChain reads what CA.Sign returned: the first element holds the leaf,
// the last the root bundle, those between one intermediate each. More than one
// certificate in an element that should hold one are taken as intermediates;
// a root that does not parse is skipped and counted.
func parseChain(elements [][]byte, bundles *bundleCache) (chain, error) {
	var c chain
	size := 0
	for _, e := range elements {
		size += len(e)
	}
	switch {
	case len(elements) == 0:
		return c, fmt.Errorf("%w: empty", ErrChain)
	case len(elements) == 1:
		return c, errNoRoot
	case size > maxChainBytes || len(elements) > 2+maxIntermediates:
		return c, errTooLarge
	}
	last := len(elements) - 1
	for i, e := range elements[:last] {
		certs, bad := parsePEM(e)
		if bad > 0 || len(certs) == 0 {
			return c, fmt.Errorf("%w: element %d is not a certificate", ErrChain, i)
		}
		c.certs = append(c.certs, certs...)
	}
	c.roots = bundles.parse(elements[last])
	switch {
	case len(c.roots.certs) == 0:
		return c, errNoUsableRoot
	case len(c.certs) > 1+maxIntermediates || len(c.roots.certs) > maxRoots:
		return c, errTooLarge
	}
	return c, nil
}

// parsePEM returns the certificates in text, and how many blocks of it are
// none.
func parsePEM(text []byte) (certs []*x509.Certificate, bad int) {
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			if bytes.Contains(text, []byte("-----BEGIN")) {
				bad++
			}
			return certs, bad
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			bad++
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			bad++
			continue
		}
		certs = append(certs, cert)
	}
}

// check holds the chain against what was asked for.
func (c chain) check(id identity.ID, key *ecdsa.PublicKey, now time.Time) error {
	leaf := c.certs[0]
	uris := uriSANs(leaf)
	if len(uris) == 0 || uris[0] != id.String() {
		return fmt.Errorf("%w: %.256q", ErrWrongID, uris[:min(1, len(uris))])
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key) {
		return ErrWrongKey
	}
	if now.Before(leaf.NotBefore) {
		return fmt.Errorf("%w: valid from %s, now %s", ErrNotYetValid, stamp(leaf.NotBefore), stamp(now))
	}
	if !now.Before(leaf.NotAfter) {
		return fmt.Errorf("%w: valid until %s, now %s", ErrExpired, stamp(leaf.NotAfter), stamp(now))
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

var oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

// tagURI is the tag of uniformResourceIdentifier in a GeneralName.
// https://www.rfc-editor.org/rfc/rfc5280#section-4.2.1.6
const tagURI = 6

// uriSANs returns the URI SANs of cert as they were written; x509.Certificate
// has them parsed, and a url.URL does not always give back the same text.
func uriSANs(cert *x509.Certificate) []string {
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSAN) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) > 0 {
			return nil
		}
		var uris []string
		for _, n := range names {
			if n.Class == asn1.ClassContextSpecific && n.Tag == tagURI {
				uris = append(uris, string(n.Bytes))
			}
		}
		return uris
	}
	return nil
}

// ids returns those of cert's URI SANs that parse, in order.
func ids(cert *x509.Certificate) []identity.ID {
	var out []identity.ID
	for _, uri := range uriSANs(cert) {
		if id, err := identity.Parse(uri); err == nil {
			out = append(out, id)
		}
	}
	return out
}
