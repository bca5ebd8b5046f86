package control

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"github.com/ztun/ztun/tunnel/identity"
)

const maxCSRBytes = 16 << 10

// certificateService is the CA as proxies call it.
type certificateService struct {
	securityv1alpha1.UnimplementedIstioCertificateServiceServer
	srv *Server
}

// CreateCertificate signs for a workload on the caller's node, and for nobody
// else. What the request's own names say does not matter: the certificate
// names the identity that was authorised.
func (c certificateService) CreateCertificate(ctx context.Context, req *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
	s := c.srv
	who, err := s.authenticate(ctx)
	if err != nil {
		return nil, err
	}
	id, err := s.authorizeIdentity(who, req)
	if err != nil {
		return nil, err
	}
	csr, err := parseCSR(req.GetCsr())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "CSR: %v", err)
	}
	now := s.cfg.Now()
	trusted := s.trust.Load()
	leaf, err := trusted.signer.signWorkload(id, csr, s.cfg.Limits.ttl(req.GetValidityDuration()), now)
	if err != nil {
		s.log.Error("cannot sign", "identity", id, "error", err)
		return nil, status.Error(codes.Internal, "cannot sign")
	}
	s.log.Info("certificate issued", "node", who.node, "identity", id, "not_after", leaf.NotAfter, "serial", leaf.SerialNumber)
	resp := &securityv1alpha1.IstioCertificateResponse{CertChain: []string{string(encodeCerts(leaf))}}
	for _, m := range trusted.signer.intermediates {
		resp.CertChain = append(resp.CertChain, string(encodeCerts(m)))
	}
	resp.CertChain = append(resp.CertChain, string(trusted.rootPEM))
	return resp, nil
}

// authorizeIdentity returns the identity that a node may have a certificate
// for. A refusal says no more than istiod's: the reason is in the log.
func (s *Server) authorizeIdentity(who caller, req *securityv1alpha1.IstioCertificateRequest) (identity.ID, error) {
	text := req.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue()
	if text == "" {
		return identity.ID{}, status.Error(codes.InvalidArgument, "ImpersonatedIdentity is missing: a node has no identity of its own")
	}
	world, _ := s.current()
	if world == nil {
		return identity.ID{}, status.Error(codes.Unavailable, "nothing is served yet")
	}
	id, err := identity.Parse(text)
	switch {
	case err != nil:
	case id.TrustDomain() != world.mesh.TrustDomain:
		err = fmt.Errorf("the trust domain is %s", world.mesh.TrustDomain)
	case !world.hasIdentity(who.node, identityKey{id.Namespace(), id.ServiceAccount()}):
		err = errors.New("no pod on the node has this identity")
	}
	if err != nil {
		s.log.Warn("certificate refused", "node", who.node, "identity", clip(text, 256), "reason", err)
		return identity.ID{}, status.Error(codes.Unauthenticated, "request impersonation authentication failure")
	}
	return id, nil
}

// ttl is the validity that is granted for the seconds asked for: what is asked,
// but no more than the limit. A proxy renews by what it got.
func (l Limits) ttl(seconds int64) time.Duration {
	if seconds <= 0 || seconds > int64(l.CertTTL/time.Second) {
		return l.CertTTL
	}
	return time.Duration(seconds) * time.Second
}

// parseCSR checks that a request is well formed, signed by the key it is for,
// and that the key is strong enough.
func parseCSR(text string) (*x509.CertificateRequest, error) {
	if len(text) > maxCSRBytes {
		return nil, fmt.Errorf("longer than %d bytes", maxCSRBytes)
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || (block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST") {
		return nil, errors.New("not a PEM certificate request")
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("something follows the request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, errors.New("cannot be parsed")
	}
	if err := acceptableKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, errors.New("is not signed by its own key")
	}
	return csr, nil
}

// signWorkload issues the certificate of a workload: no subject, one critical
// URI, for both ends of a connection.
func (a *authority) signWorkload(id identity.ID, csr *x509.CertificateRequest, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, fmt.Errorf("control: identity %v: %w", id, err)
	}
	return a.sign(&x509.Certificate{
		URIs:        []*url.URL{uri},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, csr.PublicKey, ttl, now)
}

// clip shortens what came from outside before it is logged or kept.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}
