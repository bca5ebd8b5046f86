package certs

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"

	"github.com/ztun/ztun/tunnel/identity"
)

// Agree says what a handshake between two workloads of this process would:
// nil if each certificate is valid now, chains to the other's roots and has an
// identity that the other takes. The server's identity is the one that its
// Certificate is for; whether the client wants to meet it is left to the
// caller.
func Agree(client, server *Certificate) error {
	if err := client.verifyServer(tls.ConnectionState{PeerCertificates: server.Chain}, []identity.ID{server.ID}); err != nil {
		return err
	}
	intermediates := x509.NewCertPool()
	for _, cert := range client.Chain[1:] {
		intermediates.AddCert(cert)
	}
	// What crypto/tls does for RequireAndVerifyClientCert.
	chains, err := client.Leaf.Verify(x509.VerifyOptions{
		Roots:         server.roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return fmt.Errorf("certs: verify client: %w", err)
	}
	return server.verifyClient(tls.ConnectionState{PeerCertificates: client.Chain, VerifiedChains: chains})
}
