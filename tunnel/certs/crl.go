package certs

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"
)

// A revocationList is what one CRL says, as far as anybody asks.
type revocationList struct {
	signed  *x509.RevocationList // without its entries
	serials map[string]struct{}  // as serialKey writes them

	// mu guards the fields below.
	mu     sync.Mutex
	signer map[string]bool // by public key: whether it signed this
}

// maxSigners bounds what a revocationList remembers of who did not sign it.
const maxSigners = 64

const pemCRL = "X509 CRL"

// parseCRLs reads all lists in text: PEM, whose other blocks are passed over,
// or one in DER. What cannot be read, or cannot be relied on to be all there
// is, makes an error: half of a list would let in who is on the other half.
func parseCRLs(text []byte) ([]*revocationList, error) {
	if !bytes.Contains(text, []byte("-----BEGIN")) {
		if len(bytes.TrimSpace(text)) == 0 {
			return nil, nil
		}
		l, err := parseCRL(text)
		if err != nil {
			return nil, err
		}
		return []*revocationList{l}, nil
	}
	// pem.Decode passes over what is no block; these were meant to be some.
	begun := bytes.Count(text, []byte("-----BEGIN "+pemCRL))
	var out []*revocationList
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != pemCRL {
			continue
		}
		l, err := parseCRL(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("list %d: %w", len(out)+1, err)
		}
		out = append(out, l)
	}
	if len(out) != begun {
		return nil, fmt.Errorf("%d of %d lists are not PEM from begin to end", begun-len(out), begun)
	}
	return out, nil
}

// What a CRL may be that one cannot do right by as a plain list of serial
// numbers. https://www.rfc-editor.org/rfc/rfc5280#section-5.2
var (
	oidDelta        = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidDistribution = asn1.ObjectIdentifier{2, 5, 29, 28}

	errDelta    = errors.New("a delta list, which means nothing without its base")
	errIndirect = errors.New("an indirect list, whose entries are of several issuers")
)

func parseCRL(der []byte) (*revocationList, error) {
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("not a revocation list: %w", err)
	}
	for _, ext := range crl.Extensions {
		switch {
		case ext.Id.Equal(oidDelta):
			return nil, errDelta
		case ext.Id.Equal(oidDistribution):
			// Whatever part of the issuer's certificates the list is about: those on
			// it are revoked.
			indirect, err := isIndirect(ext.Value)
			if err != nil {
				return nil, err
			}
			if indirect {
				return nil, errIndirect
			}
		case ext.Critical:
			// "If a CRL contains a critical extension that the application cannot
			// process, then the application MUST NOT use that CRL".
			return nil, fmt.Errorf("critical extension %v is not known", ext.Id)
		}
	}
	l := &revocationList{serials: make(map[string]struct{}, len(crl.RevokedCertificateEntries)), signer: make(map[string]bool)}
	l.signed = &x509.RevocationList{
		RawTBSRevocationList: crl.RawTBSRevocationList, SignatureAlgorithm: crl.SignatureAlgorithm, Signature: crl.Signature,
		RawIssuer: crl.RawIssuer, Issuer: crl.Issuer, AuthorityKeyId: crl.AuthorityKeyId,
		Number: crl.Number, ThisUpdate: crl.ThisUpdate, NextUpdate: crl.NextUpdate,
	}
	for _, e := range crl.RevokedCertificateEntries {
		for _, ext := range e.Extensions {
			if ext.Critical { // Such as the issuer of an indirect list's entries.
				return nil, fmt.Errorf("critical extension %v of an entry is not known", ext.Id)
			}
		}
		l.serials[serialKey(e.SerialNumber)] = struct{}{}
	}
	return l, nil
}

// isIndirect reads the flag of an issuingDistributionPoint.
func isIndirect(der []byte) (bool, error) {
	var seq asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &seq); err != nil || len(rest) > 0 || seq.Tag != asn1.TagSequence {
		return false, errors.New("malformed issuing distribution point")
	}
	const indirectCRL = 4 // "indirectCRL [4] BOOLEAN DEFAULT FALSE"
	for rest := seq.Bytes; len(rest) > 0; {
		var field asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &field); err != nil {
			return false, errors.New("malformed issuing distribution point")
		}
		if field.Class == asn1.ClassContextSpecific && field.Tag == indirectCRL {
			return !bytes.Equal(field.Bytes, []byte{0}), nil
		}
	}
	return false, nil
}

// serialKey is a serial number that compares.
func serialKey(n *big.Int) string { return string(n.Bytes()) }

func (l *revocationList) has(cert *x509.Certificate) bool {
	_, ok := l.serials[serialKey(cert.SerialNumber)]
	return ok
}

// signedBy reports whether issuer's key signed l. Two issuers may have the same
// name, and the file may come from anywhere. What issuer's key is said to be for
// does not matter: it is the key that signed the certificate too.
func (l *revocationList) signedBy(issuer *x509.Certificate) bool {
	key := string(issuer.RawSubjectPublicKeyInfo)
	l.mu.Lock()
	defer l.mu.Unlock()
	signed, known := l.signer[key]
	if !known {
		signed = issuer.CheckSignature(l.signed.SignatureAlgorithm, l.signed.RawTBSRevocationList, l.signed.Signature) == nil
		if len(l.signer) < maxSigners || signed {
			l.signer[key] = signed
		}
	}
	return signed
}

func (l *revocationList) expired(now time.Time) bool {
	return !l.signed.NextUpdate.IsZero() && now.After(l.signed.NextUpdate)
}

// sameIssuer reports whether both lists come from one name and key.
func (l *revocationList) sameIssuer(o *revocationList) bool {
	return bytes.Equal(l.signed.RawIssuer, o.signed.RawIssuer) && bytes.Equal(l.signed.AuthorityKeyId, o.signed.AuthorityKeyId)
}

// olderThan reports whether o, of the same issuer, has replaced l.
func (l *revocationList) olderThan(o *revocationList) bool {
	if c := l.signed.ThisUpdate.Compare(o.signed.ThisUpdate); c != 0 {
		return c < 0
	}
	return l.signed.Number != nil && o.signed.Number != nil && l.signed.Number.Cmp(o.signed.Number) < 0
}

// String names l for a log.
func (l *revocationList) String() string {
	return fmt.Sprintf("list of %.256q of %s", l.signed.Issuer.String(), stamp(l.signed.ThisUpdate))
}
