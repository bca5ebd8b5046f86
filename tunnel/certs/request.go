package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"

	"github.com/ztun/ztun/tunnel/identity"
)

// NewRequest makes a fresh P-256 key and a PEM encoded certificate request for
// id, signed with it: empty subject, and as only extension a critical SAN with
// id as its one URI.
func NewRequest(id identity.ID) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("certs: make key: %w", err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(id.String())}})
	if err != nil {
		return nil, nil, fmt.Errorf("certs: encode SAN: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		// "If the subject field contains an empty sequence, then [...] the
		// subjectAltName extension MUST be marked as critical."
		// https://www.rfc-editor.org/rfc/rfc5280#section-4.2.1.6
		ExtraExtensions: []pkix.Extension{{Id: oidSAN, Critical: true, Value: san}},
	}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("certs: make request for %v: %w", id, err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}
