package certs_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/istiodtest"
)

// istiod is a server of the Istio CA protocol on loopback.
type istiod struct {
	securityv1alpha1.UnimplementedIstioCertificateServiceServer
	ca   *certstest.CA // signs workloads
	tls  *certstest.CA // signs the server's own certificate
	addr string

	// mu guards the fields below.
	mu    sync.Mutex
	reqs  []*securityv1alpha1.IstioCertificateRequest
	mds   []metadata.MD
	reply func(ctx context.Context) error
	stop  func()
}

func newIstiod(t *testing.T) *istiod {
	s := &istiod{ca: certstest.New(), tls: certstest.New(), addr: "127.0.0.1:0"}
	s.start(t, func(*tls.Config, *x509.Certificate) {})
	t.Cleanup(func() { s.stop() })
	return s
}

// start serves with a fresh server certificate, for 127.0.0.1 unless change
// says otherwise.
func (s *istiod) start(t *testing.T, change func(*tls.Config, *x509.Certificate)) {
	t.Helper()
	key, _, err := certs.NewRequest(web)
	if err != nil {
		t.Fatal(err)
	}
	leaf := certstest.Leaf(time.Hour)
	leaf.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	cfg := &tls.Config{}
	change(cfg, leaf)
	elements, err := s.tls.SignKey(&key.PublicKey, leaf)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(elements[0], marshalKey(t, key))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Certificates = []tls.Certificate{pair}
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)))
	securityv1alpha1.RegisterIstioCertificateServiceServer(server, s)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	s.stop = func() { server.Stop(); <-done }
}

func (s *istiod) CreateCertificate(ctx context.Context, req *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	s.mu.Lock()
	s.reqs, s.mds = append(s.reqs, req), append(s.mds, md)
	reply := s.reply
	s.mu.Unlock()
	if reply != nil {
		if err := reply(ctx); err != nil {
			return nil, err
		}
	}
	id, err := identity.Parse(req.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue())
	if err != nil {
		id = web
	}
	elements, err := s.ca.Sign(ctx, id, []byte(req.Csr), time.Duration(req.ValidityDuration)*time.Second)
	resp := &securityv1alpha1.IstioCertificateResponse{}
	for _, e := range elements {
		resp.CertChain = append(resp.CertChain, string(e))
	}
	return resp, err
}

func (s *istiod) roots() string {
	var out []byte
	for _, root := range s.tls.Roots() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...)
	}
	return string(out)
}

func (s *istiod) last() (*securityv1alpha1.IstioCertificateRequest, metadata.MD) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reqs[len(s.reqs)-1], s.mds[len(s.mds)-1]
}

func (s *istiod) answer(f func(ctx context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reply = f
}

func (s *istiod) client(t *testing.T, change func(*certs.IstioCAConfig)) *certs.IstioCA {
	t.Helper()
	cfg := certs.IstioCAConfig{Address: "https://" + s.addr, RootCA: s.roots(), Impersonate: true}
	if change != nil {
		change(&cfg)
	}
	ca, err := certs.NewIstioCA(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ca.Close() })
	return ca
}

// sign asks ca for a certificate for db.
func sign(t *testing.T, ca *certs.IstioCA) (*certs.Certificate, error) {
	t.Helper()
	key, csr, err := certs.NewRequest(db)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	elements, err := ca.Sign(ctx, db, csr, 24*time.Hour)
	if err != nil {
		return nil, err
	}
	return certs.New(db, key, elements, time.Now())
}

// write replaces the file at once, as Kubernetes does: a reader never meets
// half of it.
func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestIstioCARequest(t *testing.T) {
	s := newIstiod(t)
	token := write(t, filepath.Join(t.TempDir(), "token"), "first-token\n")
	ca := s.client(t, func(c *certs.IstioCAConfig) {
		c.Token = certs.TokenFile(token)
		c.ClusterID = "Kubernetes"
		c.Headers = [][2]string{{"x-one", "1"}, {"X-Two", "2"}}
	})
	cert, err := sign(t, ca)
	if err != nil || cert.ID != db {
		t.Fatalf("Sign = %v, %v", cert, err)
	}
	req, md := s.last()
	if req.ValidityDuration != 86400 || req.Metadata.Fields["ImpersonatedIdentity"].GetStringValue() != db.String() || len(req.Metadata.Fields) != 1 {
		t.Errorf("request %v", req)
	}
	for name, want := range map[string]string{"authorization": "Bearer first-token", "clusterid": "Kubernetes", "x-one": "1", "x-two": "2"} {
		if got := md.Get(name); len(got) != 1 || got[0] != want {
			t.Errorf("metadata %s = %q, want %q", name, got, want)
		}
	}
	write(t, token, "second-token")
	if _, err := sign(t, ca); err != nil {
		t.Fatal(err)
	}
	if _, md := s.last(); md.Get("authorization")[0] != "Bearer second-token" {
		t.Errorf("authorization %q after the file changed", md.Get("authorization"))
	}
}

func TestIstioCAWithoutTokenOrImpersonation(t *testing.T) {
	s := newIstiod(t)
	ca := s.client(t, func(c *certs.IstioCAConfig) { c.Impersonate, c.ClusterID = false, "Kubernetes" })
	sign(t, ca)
	req, md := s.last()
	if req.Metadata != nil || len(md.Get("authorization")) != 0 || len(md.Get("clusterid")) != 0 {
		t.Errorf("metadata %v of the request, %v of the call", req.Metadata, md)
	}
}

func TestUnusableTokens(t *testing.T) {
	s := newIstiod(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"empty": "", "blank": " \n", "two lines": "hush\nhush", "large": strings.Repeat("x", 1<<20)} {
		ca := s.client(t, func(c *certs.IstioCAConfig) { c.Token = certs.TokenFile(write(t, filepath.Join(dir, name), text)) })
		if _, err := sign(t, ca); err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v", name, err)
		}
	}
	ca := s.client(t, func(c *certs.IstioCAConfig) { c.Token = certs.TokenFile(filepath.Join(dir, "missing")) })
	if _, err := sign(t, ca); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("missing: %v", err)
	}
	if len(s.reqs) != 0 {
		t.Error("a request went out without a token")
	}
}

// A server that repeats what it was sent must not put it into our logs.
func TestErrorsHoldNoSecrets(t *testing.T) {
	s := newIstiod(t)
	const token, header = "eyJhbGciOi.secret.token", "another-secret"
	s.answer(func(ctx context.Context) error {
		md, _ := metadata.FromIncomingContext(ctx)
		return status.Errorf(codes.Unauthenticated, "bad %v%s", md, strings.Repeat("!", 1000))
	})
	ca := s.client(t, func(c *certs.IstioCAConfig) {
		c.Token, c.Headers = certs.StaticToken(token), [][2]string{{"x-key", header}}
	})
	var log strings.Builder
	m, stop := start(t, certs.Config{CA: ca, Log: slog.New(slog.NewTextHandler(&log, nil))})
	_, err := m.Get(t.Context(), db, certs.RealTime)
	dump := fmt.Sprintf("%+v", m.Dump())
	stop()
	if log.Len() == 0 {
		t.Error("nothing was logged")
	}
	if err == nil || status.Code(err) != codes.Unauthenticated || len(err.Error()) > 600 {
		t.Errorf("Get: %v", err)
	}
	for _, text := range []string{fmt.Sprint(err), log.String(), dump} {
		if strings.Contains(text, token) || strings.Contains(text, header) || strings.Contains(text, "BEGIN") {
			t.Errorf("secrets in %q", text)
		}
	}
}

// Token and roots are volumes that Kubernetes swaps under the process.
func TestKubernetesSwapsTheFiles(t *testing.T) {
	s := newIstiod(t)
	v := istiodtest.NewVolume(t, "root-cert.pem", "istio-token")
	ca := s.client(t, func(c *certs.IstioCAConfig) {
		c.RootCA, c.Token = v.Path("root-cert.pem"), certs.TokenFile(v.Path("istio-token"))
	})
	if _, err := sign(t, ca); err == nil || !strings.Contains(err.Error(), v.Path("istio-token")) {
		t.Errorf("before anything is there: %v", err)
	}
	for n := range 3 {
		if n > 0 { // istiod has rotated its own root, and the old one is not trusted any more.
			s.stop()
			s.tls = certstest.New()
			s.start(t, func(*tls.Config, *x509.Certificate) {})
		}
		token := fmt.Sprintf("token-%d", n)
		v.Swap(map[string]string{"root-cert.pem": s.roots(), "istio-token": token})
		if _, err := sign(t, ca); err != nil {
			t.Fatalf("version %d: %v", n, err)
		}
		if _, md := s.last(); md.Get("authorization")[0] != "Bearer "+token {
			t.Errorf("version %d: authorization %q", n, md.Get("authorization"))
		}
	}
}

// istiod's Service may not be known yet, and move later; the server's name is
// the address's, wherever that leads.
func TestNameIsResolvedAtEachAttempt(t *testing.T) {
	names := istiodtest.UseNameserver(t, "istiod.istio-system.svc")
	s := newIstiod(t)
	named := func(_ *tls.Config, leaf *x509.Certificate) {
		leaf.IPAddresses, leaf.DNSNames = nil, []string{"istiod.istio-system.svc"}
	}
	s.stop()
	s.start(t, named)
	_, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	ca := s.client(t, func(c *certs.IstioCAConfig) { c.Address = "https://istiod.istio-system.svc:" + port })
	for range 2 {
		if _, err := sign(t, ca); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "istiod.istio-system.svc") {
			t.Errorf("without the name: %v", err)
		}
	}
	names.Set([4]byte{127, 0, 0, 1})
	if _, err := sign(t, ca); err != nil {
		t.Errorf("with the name: %v", err)
	}
	names.Set([4]byte{127, 0, 0, 2})
	if _, err := sign(t, ca); err != nil {
		t.Errorf("on the connection that is there: %v", err)
	}
	s.stop()
	s.addr = "127.0.0.2:" + port
	s.start(t, named)
	var last error
	for range 2 { // The first finds out that the connection is gone.
		if _, last = sign(t, ca); last == nil {
			break
		}
	}
	if last != nil {
		t.Errorf("where it is now: %v", last)
	}
}

// istiod says no more than no; the token itself tells what is wrong with it.
func TestTokenForAnotherAudience(t *testing.T) {
	s := newIstiod(t)
	s.answer(func(context.Context) error {
		return status.Error(codes.Unauthenticated, "request authenticate failure")
	})
	token := "eyJhbGciOiJub25lIn0." + base64.RawURLEncoding.EncodeToString([]byte(`{"aud":["vault"],"sub":"system:serviceaccount:istio-system:ztunnel"}`)) + ".c2lnbmF0dXJl"
	_, err := sign(t, s.client(t, func(c *certs.IstioCAConfig) { c.Token = certs.StaticToken(token) }))
	for _, want := range []string{s.addr, "request authenticate failure", `audience "vault"`, "istio-system:ztunnel"} {
		wantRefusal(t, "a token for another audience", err, want)
	}
	if status.Code(err) != codes.Unauthenticated || strings.Contains(err.Error(), "c2lnbmF0dXJl") {
		t.Errorf("Sign: %v", err)
	}
}

func TestServerNames(t *testing.T) {
	s := newIstiod(t)
	tests := []struct {
		name, dns, alt string
		ok             bool
	}{
		{"by address", "", "", true},
		{"another name", "istiod.istio-system.svc", "", false},
		{"the alternative name", "istiod.istio-system.svc", "istiod.istio-system.svc", true},
		{"neither", "istiod.istio-system.svc", "istiod.elsewhere.svc", false},
		{"by address, with an alternative", "", "istiod.istio-system.svc", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s.stop()
			s.start(t, func(_ *tls.Config, leaf *x509.Certificate) {
				if tt.dns != "" {
					leaf.IPAddresses, leaf.DNSNames = nil, []string{tt.dns}
				}
			})
			_, err := sign(t, s.client(t, func(c *certs.IstioCAConfig) { c.AltHostname = tt.alt }))
			if (err == nil) != tt.ok {
				t.Errorf("Sign: %v, want ok %v", err, tt.ok)
			}
			other := certstest.New()
			_, err = sign(t, s.client(t, func(c *certs.IstioCAConfig) {
				c.AltHostname, c.RootCA = tt.alt, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Roots()[0].Raw}))
			}))
			if err == nil {
				t.Error("a server of another root was trusted")
			}
		})
	}
}

func TestTLSVersionOfServer(t *testing.T) {
	s := newIstiod(t)
	s.stop()
	s.start(t, func(c *tls.Config, _ *x509.Certificate) { c.MaxVersion = tls.VersionTLS12 })
	if _, err := sign(t, s.client(t, nil)); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
	if _, err := sign(t, s.client(t, func(c *certs.IstioCAConfig) { c.TLS12 = true })); err != nil {
		t.Errorf("TLS 1.2 where it is allowed: %v", err)
	}
}

func TestRootFileIsReRead(t *testing.T) {
	s := newIstiod(t)
	var log strings.Builder
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	ca := s.client(t, func(c *certs.IstioCAConfig) {
		c.RootCA, c.Log = path, slog.New(slog.NewTextHandler(&log, nil))
	})
	if _, err := sign(t, ca); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("before the file exists: %v", err)
	}
	write(t, path, s.roots())
	if _, err := sign(t, ca); err != nil {
		t.Errorf("once it exists: %v", err)
	}
	for _, text := range []string{"", "garbage"} {
		write(t, path, text)
		log.Reset()
		for range 3 {
			if _, err := sign(t, ca); err != nil {
				t.Errorf("with %q in it: %v", text, err)
			}
		}
		if n := strings.Count(log.String(), "not reloaded"); n > 1 || n == 0 && text == "" || !strings.Contains(log.String(), path) && n > 0 {
			t.Errorf("with %q in it: log %s", text, log.String())
		}
	}
	s.stop()
	if _, err := sign(t, ca); status.Code(err) != codes.Unavailable {
		t.Errorf("while the server is down: %v", err)
	}
	s.start(t, func(*tls.Config, *x509.Certificate) {})
	if _, err := sign(t, ca); err != nil {
		t.Errorf("a new connection, with garbage in the file: %v", err)
	}
	s.stop()
	s.tls = certstest.New()
	s.start(t, func(*tls.Config, *x509.Certificate) {})
	if _, err := sign(t, ca); err == nil {
		t.Error("a server of another root was trusted")
	}
	write(t, path, s.roots())
	if _, err := sign(t, ca); err != nil {
		t.Errorf("after the file changed: %v", err)
	}
}

// gRPC waits a second and more before it connects again; a request that comes
// when the server is back must not wait for that, nor fail because of it.
func TestServerComesBack(t *testing.T) {
	s := newIstiod(t)
	ca := s.client(t, nil)
	if _, err := sign(t, ca); err != nil {
		t.Fatal(err)
	}
	s.stop()
	for range 3 {
		if _, err := sign(t, ca); status.Code(err) != codes.Unavailable {
			t.Errorf("while the server is down: %v", err)
		}
	}
	s.start(t, func(*tls.Config, *x509.Certificate) {})
	if _, err := sign(t, ca); err != nil {
		t.Errorf("when it is back: %v", err)
	}
}

func TestSignEndsWithItsContext(t *testing.T) {
	s := newIstiod(t)
	s.answer(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	ca := s.client(t, nil)
	m := run(t, certs.Config{CA: ca, FetchTimeout: 50 * time.Millisecond})
	// Who notices first, the server or we, is not said.
	if _, err := m.Get(t.Context(), db, certs.RealTime); !errors.Is(err, certs.ErrUnavailable) || status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("Get: %v", err)
	}
	s.answer(nil)
	if _, err := sign(t, ca); err != nil {
		t.Errorf("the next request: %v", err)
	}
}

func TestConcurrentRequestsShareAConnection(t *testing.T) {
	s := newIstiod(t)
	path := write(t, filepath.Join(t.TempDir(), "root-cert.pem"), s.roots())
	ca := s.client(t, func(c *certs.IstioCAConfig) { c.RootCA = path })
	m := run(t, certs.Config{CA: ca})
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			if c, err := m.Get(t.Context(), id(n), certs.RealTime); err != nil || c.ID != id(n) {
				t.Errorf("Get = %v, %v", c, err)
			}
		})
		if n == 25 { // a new root is no reason to break off what is under way
			s.tls.Rotate()
			write(t, path, s.roots())
		}
	}
	wg.Wait()
}

func TestClosedClient(t *testing.T) {
	s := newIstiod(t)
	ca := s.client(t, nil)
	if err := ca.Close(); err != nil {
		t.Error(err)
	}
	if _, err := sign(t, ca); err == nil || len(s.reqs) > 0 {
		t.Errorf("Sign after Close: %v, %d requests", err, len(s.reqs))
	}
}

func TestIstioCAConfig(t *testing.T) {
	good := certs.IstioCAConfig{Address: "https://istiod.istio-system.svc:15012", RootCA: "SYSTEM"}
	tests := []struct {
		name   string
		change func(*certs.IstioCAConfig)
		text   string
	}{
		{"good", func(*certs.IstioCAConfig) {}, ""},
		{"no scheme", func(c *certs.IstioCAConfig) { c.Address = "istiod:15012" }, ""},
		{"no port", func(c *certs.IstioCAConfig) { c.Address = "https://istiod" }, ""},
		{"IPv6", func(c *certs.IstioCAConfig) { c.Address = "https://[::1]:15012/" }, ""},
		{"no address", func(c *certs.IstioCAConfig) { c.Address = "" }, "address"},
		{"neither scheme nor port", func(c *certs.IstioCAConfig) { c.Address = "istiod" }, "address"},
		{"in clear", func(c *certs.IstioCAConfig) { c.Address = "http://istiod:15010" }, "address"},
		{"a path", func(c *certs.IstioCAConfig) { c.Address = "https://istiod:15012/x" }, "address"},
		{"no roots", func(c *certs.IstioCAConfig) { c.RootCA = "" }, "root"},
		{"a header of gRPC's", func(c *certs.IstioCAConfig) { c.Headers = [][2]string{{"grpc-x", ""}} }, "grpc-x"},
		{"a binary header", func(c *certs.IstioCAConfig) { c.Headers = [][2]string{{"x-bin", ""}} }, "x-bin"},
		{"a header without a name", func(c *certs.IstioCAConfig) { c.Headers = [][2]string{{"", ""}} }, "header"},
		{"a header of two lines", func(c *certs.IstioCAConfig) { c.Headers = [][2]string{{"x", "hush\n"}} }, "header"},
		{"a cluster of two lines", func(c *certs.IstioCAConfig) { c.ClusterID = "a\nb" }, "cluster"},
	}
	for _, tt := range tests {
		cfg := good
		tt.change(&cfg)
		_, err := certs.NewIstioCA(cfg)
		wantRefusal(t, tt.name, err, tt.text)
		if err != nil && strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v shows the value", tt.name, err)
		}
	}
}

func TestChainOfCAIsKeptInOrder(t *testing.T) {
	s := newIstiod(t)
	s.ca.Intermediate()
	s.ca.Rotate()
	s.ca.Intermediate()
	cert, err := sign(t, s.client(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.Chain) != 2 || cert.Chain[0] != cert.Leaf || !slices.Equal(cert.Leaf.RawIssuer, cert.Chain[1].RawSubject) || len(cert.Roots) != 2 {
		t.Errorf("chain of %d, %d roots", len(cert.Chain), len(cert.Roots))
	}
}
