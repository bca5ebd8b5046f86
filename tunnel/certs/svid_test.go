package certs_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
)

func TestCertificateIsASourceForGoSPIFFE(t *testing.T) {
	ca := certstest.New()
	ca.Intermediate()
	cert := ca.Issue(identity.MustParse("spiffe://cluster.local/ns/default/sa/web"))
	svid, err := cert.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.Verify(svid.Certificates, cert)
	if err != nil || id.String() != cert.ID.String() {
		t.Errorf("Verify = %v, %v, want %v", id, err, cert.ID)
	}
	if _, err := cert.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("other.domain")); err == nil {
		t.Error("a bundle for another trust domain")
	}
	if _, _, err := x509svid.Verify(svid.Certificates, certstest.New().Issue(cert.ID)); err == nil {
		t.Error("verified with another CA's bundle")
	}
}
