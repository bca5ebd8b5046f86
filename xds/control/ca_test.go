package control

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	securityv1alpha1 "istio.io/api/security/v1alpha1"
)

type ed25519Public = ed25519.PublicKey

const webID = "spiffe://cluster.local/ns/x/sa/web"

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csrOf(t testing.TB, key crypto.Signer, uri string) string {
	t.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{u}, DNSNames: []string{"evil.example"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func newCSR(t testing.TB) string { return csrOf(t, newKey(t), webID) }

// certificate asks the CA for a certificate.
func (s *server) certificate(token, id, csr string) ([]string, error) {
	return s.certificateFor(token, id, csr, 0)
}

func (s *server) certificateFor(token, id, csr string, seconds int64) ([]string, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	req := &securityv1alpha1.IstioCertificateRequest{Csr: csr, ValidityDuration: seconds}
	if id != "" {
		meta, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": id})
		if err != nil {
			s.t.Fatal(err)
		}
		req.Metadata = meta
	}
	resp, err := securityv1alpha1.NewIstioCertificateServiceClient(s.dial()).CreateCertificate(ctx, req)
	return resp.GetCertChain(), err
}

// verify checks a chain as a peer would that trusts the given roots.
func verify(t *testing.T, chain []string, roots []byte, usage x509.ExtKeyUsage) *x509.Certificate {
	t.Helper()
	certs, err := parseCerts([]byte(strings.Join(chain[:len(chain)-1], "")))
	if err != nil {
		t.Fatal(err)
	}
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	if _, err := certs[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		t.Errorf("verify: %v", err)
	}
	return certs[0]
}

func TestCASignsForPodsOnTheNode(t *testing.T) {
	s := serve(t, Config{})
	chain, err := s.certificate(s.token("n1"), webID, newCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 || chain[1] != string(s.RootPEM()) {
		t.Errorf("chain of %d", len(chain))
	}
	leaf := verify(t, chain, s.RootPEM(), x509.ExtKeyUsageClientAuth)
	verify(t, chain, s.RootPEM(), x509.ExtKeyUsageServerAuth)
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != webID || len(leaf.DNSNames) != 0 || leaf.IsCA {
		t.Errorf("leaf for %v %v", leaf.URIs, leaf.DNSNames)
	}
	if left := time.Until(leaf.NotAfter); left > 24*time.Hour || left < 24*time.Hour-time.Minute {
		t.Errorf("valid for %v", left)
	}
	if time.Until(leaf.NotBefore) > -time.Minute {
		t.Errorf("not before %v leaves no room for clocks", leaf.NotBefore)
	}
}

func TestCertificateLifetimeIsBounded(t *testing.T) {
	s := serve(t, Config{Limits: Limits{CertTTL: time.Hour}})
	for _, tc := range []struct {
		ask  int64
		want time.Duration
	}{{0, time.Hour}, {-5, time.Hour}, {60, time.Minute}, {86400, time.Hour}, {1 << 62, time.Hour}} {
		chain, err := s.certificateFor(s.token("n1"), webID, newCSR(t), tc.ask)
		if err != nil {
			t.Fatal(err)
		}
		leaf := verify(t, chain, s.RootPEM(), x509.ExtKeyUsageClientAuth)
		if left := time.Until(leaf.NotAfter); left > tc.want || left < tc.want-30*time.Second {
			t.Errorf("asked for %d s, valid for %v", tc.ask, left)
		}
	}
}

func TestIdentitiesInTheRequestDoNotCount(t *testing.T) {
	s := serve(t, Config{})
	chain, err := s.certificate(s.token("n1"), webID, csrOf(t, newKey(t), "spiffe://cluster.local/ns/x/sa/client"))
	if err != nil {
		t.Fatal(err)
	}
	if leaf := verify(t, chain, s.RootPEM(), x509.ExtKeyUsageClientAuth); leaf.URIs[0].String() != webID {
		t.Errorf("leaf for %v", leaf.URIs)
	}
}

func TestCARefusesOtherIdentities(t *testing.T) {
	static := NewStatic(with(map[string]string{"f.yaml": docs(
		"apiVersion: v1\nkind: Pod\nmetadata: {name: done, namespace: x}\nspec: {nodeName: n1, serviceAccountName: done}\nstatus: {phase: Succeeded, podIP: 10.0.0.8}",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: floating, namespace: x}\nspec: {serviceAccountName: floating}\nstatus: {podIP: 10.0.0.9}")}))
	s := serve(t, Config{Static: static})
	s.static = static
	for _, tc := range []struct {
		name, node, id string
		code           codes.Code
	}{
		{"none", "n1", "", codes.InvalidArgument},
		{"on another node", "n1", "spiffe://cluster.local/ns/x/sa/client", codes.Unauthenticated},
		{"of another node's token", "n2", webID, codes.Unauthenticated},
		{"on a node without pods", "n9", webID, codes.Unauthenticated},
		{"of nobody", "n1", "spiffe://cluster.local/ns/x/sa/nobody", codes.Unauthenticated},
		{"in another namespace", "n1", "spiffe://cluster.local/ns/y/sa/web", codes.Unauthenticated},
		{"in another trust domain", "n1", "spiffe://other/ns/x/sa/web", codes.Unauthenticated},
		{"of a pod that is over", "n1", "spiffe://cluster.local/ns/x/sa/done", codes.Unauthenticated},
		{"of a pod without a node", "n1", "spiffe://cluster.local/ns/x/sa/floating", codes.Unauthenticated},
		{"not SPIFFE", "n1", "https://cluster.local/ns/x/sa/web", codes.Unauthenticated},
		{"garbage", "n1", "\x00", codes.Unauthenticated},
	} {
		_, err := s.certificate(s.token(tc.node), tc.id, newCSR(t))
		if status.Code(err) != tc.code {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.code)
		}
		if tc.code == codes.Unauthenticated && status.Convert(err).Message() != "request impersonation authentication failure" {
			t.Errorf("%s: says %q", tc.name, err)
		}
	}
	if _, err := s.certificate(s.token("n1"), webID, newCSR(t)); err != nil {
		t.Errorf("the right one: %v", err)
	}
	s.set(with(nil))
	moved := strings.Replace(meshYAML["mesh.yaml"], "nodeName: n1", "nodeName: n2", 1)
	s.set(map[string]string{"f.yaml": moved})
	if _, err := s.certificate(s.token("n1"), webID, newCSR(t)); status.Code(err) != codes.Unauthenticated {
		t.Errorf("after the pod left: %v", err)
	}
}

func TestCARefusesBadRequests(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skip("this Go makes no weak keys")
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := newCSR(t)
	block, _ := pem.Decode([]byte(good))
	block.Bytes[len(block.Bytes)-3] ^= 1
	broken := string(pem.EncodeToMemory(block))
	for name, csr := range map[string]string{
		"empty":         "",
		"no PEM":        "hello",
		"other PEM":     string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes})),
		"garbage":       string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte{1, 2, 3}})),
		"two":           good + good,
		"signature":     broken,
		"long":          good + strings.Repeat("\n", maxCSRBytes),
		"weak RSA":      csrOf(t, weak, webID),
		"weak elliptic": csrOf(t, p224, webID),
	} {
		if _, err := parseCSR(csr); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	strong, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{newKey(t), strong, ed} {
		if _, err := parseCSR(csrOf(t, key, webID)); err != nil {
			t.Errorf("%T: %v", key, err)
		}
	}
	s := serve(t, Config{})
	if _, err := s.certificate(s.token("n1"), webID, broken); status.Code(err) != codes.InvalidArgument {
		t.Errorf("over the wire: %v", err)
	}
}

func TestStateIsPrivateAndKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	a := serve(t, Config{State: dir})
	token := a.token("n1")
	for name, want := range map[string]os.FileMode{"": 0o700, fileAuthorities: 0o600, fileTokenKey: 0o600, fileRoots: 0o644, fileAddresses: 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info.Mode().Perm(), err)
		}
	}
	if data, err := os.ReadFile(filepath.Join(dir, fileRoots)); err != nil || string(data) != string(a.RootPEM()) {
		t.Errorf("%s is not the roots: %v", fileRoots, err)
	}
	b := serve(t, Config{State: dir})
	if string(b.RootPEM()) != string(a.RootPEM()) {
		t.Error("a restart made another CA")
	}
	if _, err := b.certificate(token, webID, newCSR(t)); err != nil {
		t.Errorf("a token from before the restart: %v", err)
	}
	minted, err := MintToken(dir, "n1", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.certificate(minted, webID, newCSR(t)); err != nil {
		t.Errorf("a token made beside the server: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestStateOthersCanReadIsRefused(t *testing.T) {
	for _, name := range []string{"", fileAuthorities, fileTokenKey} {
		dir := filepath.Join(t.TempDir(), "state")
		if _, err := New(Config{State: dir, Static: NewStatic(nil)}); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Config{State: dir, Static: NewStatic(nil)}); err == nil || !strings.Contains(err.Error(), "lets others in") {
			t.Errorf("%q with mode 0755: %v", name, err)
		}
	}
}

func TestBrokenStateIsRefused(t *testing.T) {
	for _, tc := range []struct{ name, text string }{
		{fileAuthorities, "{"}, {fileAuthorities, "[]"}, {fileTokenKey, "x"}, {fileAddresses, "["},
	} {
		dir := filepath.Join(t.TempDir(), "state")
		if _, err := New(Config{State: dir, Static: NewStatic(nil)}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, tc.name), []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := New(Config{State: dir, Static: NewStatic(nil)}); err == nil {
			t.Errorf("%s of %q is taken", tc.name, tc.text)
		}
	}
}

// At each step, whoever holds a certificate from the step before still trusts,
// and is trusted by, whoever gets one now.
func TestRotationCutsNobody(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := serve(t, Config{State: dir, Debounce: 10 * time.Millisecond, Rescan: time.Hour})
	csr := newCSR(t)
	type credential struct {
		chain []string
		roots []byte
	}
	get := func() credential {
		t.Helper()
		chain, err := s.certificate(s.token("n1"), webID, csr)
		if err != nil {
			t.Fatal(err)
		}
		return credential{chain, []byte(chain[len(chain)-1])}
	}
	meet := func(a, b credential) {
		t.Helper()
		verify(t, a.chain, b.roots, x509.ExtKeyUsageClientAuth)
		verify(t, b.chain, a.roots, x509.ExtKeyUsageServerAuth)
	}
	now := time.Now()
	step := func(step RotationStep, roots int) credential {
		t.Helper()
		before := string(s.RootPEM())
		if step != RotatePrepare {
			if err := Rotate(dir, "", step, 0, false, now); !errors.Is(err, ErrTooEarly) {
				t.Errorf("%s at once: %v", step, err)
			}
			now = now.Add(25 * time.Hour)
		}
		if err := Rotate(dir, "", step, 0, false, now); err != nil {
			t.Fatal(err)
		}
		if step == RotateSwitch {
			certs, _ := parseCerts([]byte(before))
			eventually(t, "the new root signs", func() bool { return s.trust.Load().signer.cert.Equal(certs[1]) })
		} else {
			eventually(t, string(step)+" is taken up", func() bool { return string(s.RootPEM()) != before })
		}
		file, err := os.ReadFile(filepath.Join(dir, fileRoots))
		if certs, _ := parseCerts(file); err != nil || len(certs) != roots {
			t.Errorf("%s: %d roots in the file, %v", step, len(certs), err)
		}
		return get()
	}
	c0 := get()
	c1 := step(RotatePrepare, 2)
	meet(c0, c1)
	if err := Rotate(dir, "", RotatePrepare, 0, false, now); err == nil {
		t.Error("a second rotation began")
	}
	c2 := step(RotateSwitch, 2)
	meet(c1, c2)
	c3 := step(RotateRetire, 1)
	meet(c2, c3)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c3.roots)
	old, _ := parseCerts([]byte(c0.chain[0]))
	if _, err := old[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
		t.Error("the retired root is still trusted")
	}
	for _, bad := range []RotationStep{RotateSwitch, RotateRetire, "other"} {
		if err := Rotate(dir, "", bad, 0, true, now); err == nil {
			t.Errorf("%s without a step before", bad)
		}
	}
	if err := Rotate(filepath.Join(t.TempDir(), "typo"), "", RotatePrepare, 0, false, now); err == nil {
		t.Error("rotation made a CA")
	}
	if text, err := RotationState(dir, now); err != nil || strings.Count(text, "\n") != 1 || !strings.HasPrefix(text, "signing") {
		t.Errorf("state %q, %v", text, err)
	}
}

// An intermediate made elsewhere, with its root apart.
func TestGivenCA(t *testing.T) {
	dir := t.TempDir()
	root, err := newRoot("td", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "between"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(3 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, root.cert, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	between, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyText, err := keyPEM(key)
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, data []byte) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	cfg := Config{
		State: filepath.Join(dir, "state"), CACert: file("ca.pem", encodeCerts(between)),
		CAKey: file("ca.key", keyText), CARoot: file("root.pem", encodeCerts(root.cert)),
	}
	s := serve(t, cfg)
	chain, err := s.certificate(s.token("n1"), webID, newCSR(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 3 || chain[2] != string(encodeCerts(root.cert)) {
		t.Errorf("chain of %d", len(chain))
	}
	leaf := verify(t, chain, encodeCerts(root.cert), x509.ExtKeyUsageClientAuth)
	if leaf.NotAfter.After(between.NotAfter) {
		t.Errorf("the leaf lives to %v, its CA to %v", leaf.NotAfter, between.NotAfter)
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "state", fileRoots)); string(data) != chain[2] {
		t.Error("root-cert.pem is not the given root")
	}
	if _, err := os.Stat(filepath.Join(dir, "state", fileAuthorities)); err == nil {
		t.Error("a CA was made though one is given")
	}

	cfg.Static = NewStatic(nil)
	both := cfg
	both.CARoot, both.CACert = "", file("both.pem", encodeCerts(between, root.cert))
	if _, err := New(both); err != nil {
		t.Errorf("a chain that ends in its root: %v", err)
	}
	for name, change := range map[string]func(*Config){
		"no root":      func(c *Config) { c.CARoot = "" },
		"another key":  func(c *Config) { k, _ := keyPEM(newKey(t)); c.CAKey = file("other.key", k) },
		"another root": func(c *Config) { r, _ := newRoot("td", time.Now()); c.CARoot = file("other.pem", encodeCerts(r.cert)) },
		"a leaf":       func(c *Config) { c.CACert = file("leaf.pem", encodeCerts(leaf)) },
		"no file":      func(c *Config) { c.CACert = "/nowhere" },
		"no key":       func(c *Config) { c.CAKey = "" },
	} {
		bad := cfg
		change(&bad)
		if _, err := New(bad); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestConfigNamesAllProblems(t *testing.T) {
	_, err := New(Config{Dir: "a", Static: NewStatic(nil), CARoot: "x", Rescan: -1, Mesh: Mesh{TrustDomain: "a b"}})
	for _, want := range []string{"exactly one of Dir and Static", "CARoot needs CACert", "Rescan", "trust domain"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %q", err, want)
		}
	}
}

func TestServingCertificateIsRenewed(t *testing.T) {
	now := time.Now()
	srv, err := New(Config{Static: NewStatic(nil), Now: func() time.Time { return now }, Hosts: []string{"control.example", "10.1.1.1", "localhost"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.identity.prepare(addr("[::]:15012")); err != nil {
		t.Fatal(err)
	}
	a, err := srv.identity.current(nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"localhost", "control.example"}; !slices.Equal(a.Leaf.DNSNames, want) || len(a.Leaf.IPAddresses) != 3 {
		t.Errorf("names %q %v", a.Leaf.DNSNames, a.Leaf.IPAddresses)
	}
	if b, _ := srv.identity.current(nil); b != a {
		t.Error("a certificate for each connection")
	}
	now = now.Add(servingTTL/2 + time.Minute)
	if b, _ := srv.identity.current(nil); b == a || b.Leaf.NotAfter.Sub(a.Leaf.NotAfter) < servingTTL/3 {
		t.Error("not renewed at half of its life")
	}
}

type addr string

func (a addr) Network() string { return "tcp" }
func (a addr) String() string  { return string(a) }

// forge signs claims that mintToken would not make.
func forge(t *testing.T, key ed25519.PrivateKey, change func(*nodeClaims)) string {
	t.Helper()
	now := time.Now()
	c := nodeClaims{Node: "n1", RegisteredClaims: jwt.RegisteredClaims{
		Issuer: tokenIssuer, Audience: jwt.ClaimStrings{tokenAudience}, IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(time.Hour)),
	}}
	change(&c)
	token, err := jwt.NewWithClaims(jwt.SigningMethodEdDSA, c).SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func unsigned(t *testing.T) string {
	t.Helper()
	token, err := jwt.NewWithClaims(jwt.SigningMethodNone, nodeClaims{Node: "n1"}).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// hmacForged is the classic: a token signed with the public key as a password.
func hmacForged(t *testing.T, key ed25519.PrivateKey) string {
	t.Helper()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, nodeClaims{Node: "n1", RegisteredClaims: jwt.RegisteredClaims{
		Issuer: tokenIssuer, Audience: jwt.ClaimStrings{tokenAudience}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(time.Hour)),
	}}).SignedString([]byte(key.Public().(ed25519.PublicKey)))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestTokensAreMadeForNodesAndTimes(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for _, tc := range []struct {
		node string
		ttl  time.Duration
	}{{"", time.Hour}, {"a b", time.Hour}, {"N1", time.Hour}, {"n1", -time.Hour}, {"n1", 2 * maxTokenTTL}} {
		if _, err := mintToken(key, tc.node, tc.ttl, now); err == nil {
			t.Errorf("a token for %q of %v", tc.node, tc.ttl)
		}
	}
	token, err := mintToken(key, "n1", 0, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := verifyToken(key.Public().(ed25519.PublicKey), token, now.Add(defaultTokenTTL-time.Minute)); err != nil {
		t.Error(err)
	}
	if _, _, err := verifyToken(key.Public().(ed25519.PublicKey), token, now.Add(defaultTokenTTL+time.Minute)); err == nil {
		t.Error("valid for ever")
	}
	again, _ := mintToken(key, "n1", 0, now)
	if again == token {
		t.Error("two tokens are one")
	}
}
