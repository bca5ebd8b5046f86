package certs_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/cpu"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
)

var (
	web    = identity.MustParse("spiffe://cluster.local/ns/default/sa/web")
	db     = identity.MustParse("spiffe://cluster.local/ns/default/sa/db")
	abroad = identity.MustParse("spiffe://other.example/ns/default/sa/web")
)

// handshake runs both ends and passes a byte each way, so that a server's late
// refusal reaches the client too.
func handshake(client, server *tls.Config) (cs, ss tls.ConnectionState, cerr, serr error) {
	a, b := newWire()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		conn := tls.Server(b, server)
		serr = exchange(conn)
		ss = conn.ConnectionState()
	}()
	conn := tls.Client(a, client)
	cerr = exchange(conn)
	cs = conn.ConnectionState()
	a.Close()
	<-done
	return cs, ss, cerr, serr
}

func exchange(conn *tls.Conn) error {
	if err := conn.Handshake(); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 1))
	return err
}

// A wire is one end of a net.Pipe whose writes do not wait for the reader:
// both ends of a handshake may send an alert at once.
type wire struct {
	net.Conn // for the addresses and deadlines
	in, out  *half
}

type half struct {
	mu     sync.Mutex
	more   *sync.Cond
	buf    []byte
	closed bool
}

func newWire() (a, b net.Conn) {
	x, y := &half{}, &half{}
	x.more, y.more = sync.NewCond(&x.mu), sync.NewCond(&y.mu)
	p, q := net.Pipe()
	return &wire{p, x, y}, &wire{q, y, x}
}

func (w *wire) Read(p []byte) (int, error) {
	w.in.mu.Lock()
	defer w.in.mu.Unlock()
	for len(w.in.buf) == 0 && !w.in.closed {
		w.in.more.Wait()
	}
	if len(w.in.buf) == 0 {
		return 0, io.EOF
	}
	n := copy(p, w.in.buf)
	w.in.buf = w.in.buf[n:]
	return n, nil
}

func (w *wire) Write(p []byte) (int, error) {
	w.out.mu.Lock()
	defer w.out.mu.Unlock()
	w.out.buf = append(w.out.buf, p...)
	w.out.more.Signal()
	return len(p), nil
}

func (w *wire) Close() error {
	w.out.mu.Lock()
	defer w.out.mu.Unlock()
	w.out.closed = true
	w.out.more.Signal()
	return w.Conn.Close()
}

// wantRefusal checks that err is there and says text; "" wants no error.
func wantRefusal(t *testing.T, who string, err error, text string) {
	t.Helper()
	switch {
	case text == "" && err != nil:
		t.Errorf("%s: %v", who, err)
	case text != "" && err == nil:
		t.Errorf("%s accepted, want an error with %q", who, text)
	case text != "" && !strings.Contains(err.Error(), text):
		t.Errorf("%s: %q, want an error with %q", who, err, text)
	}
}

func TestHandshake(t *testing.T) {
	ca := certstest.New()
	client, server := ca.Issue(web), ca.Issue(db)
	cs, ss, cerr, serr := handshake(client.ClientTLS([]identity.ID{web, db}), server.ServerTLS())
	if cerr != nil || serr != nil {
		t.Fatalf("client %v, server %v", cerr, serr)
	}
	for who, s := range map[string]tls.ConnectionState{"client": cs, "server": ss} {
		if s.Version != tls.VersionTLS13 || s.NegotiatedProtocol != "h2" || s.ServerName != "" || s.CurveID != tls.X25519MLKEM768 || s.DidResume {
			t.Errorf("%s: version %x, alpn %q, sni %q, group %v, resumed %v", who, s.Version, s.NegotiatedProtocol, s.ServerName, s.CurveID, s.DidResume)
		}
		aes := cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL
		if name := tls.CipherSuiteName(s.CipherSuite); aes && !strings.Contains(name, "AES") {
			t.Errorf("%s: suite %s on a CPU with AES", who, name)
		}
	}
	if id, err := certs.PeerID(cs); err != nil || id != db {
		t.Errorf("PeerID of server = %v, %v", id, err)
	}
	if id, err := certs.PeerID(ss); err != nil || id != web {
		t.Errorf("PeerID of client = %v, %v", id, err)
	}
	if first := server.ServerTLS(); server.ServerTLS() != first {
		t.Error("ServerTLS is built anew each time")
	}
}

// issue makes a certificate for id whose leaf was changed by change, with
// everything else as it should be.
func issue(t *testing.T, ca *certstest.CA, id identity.ID, change func(*x509.Certificate), uris ...string) (tls.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, _, err := certs.NewRequest(id)
	if err != nil {
		t.Fatal(err)
	}
	leaf := certstest.Leaf(time.Hour, uris...)
	if change != nil {
		change(leaf)
	}
	elements, err := ca.SignKey(&key.PublicKey, leaf)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(slices.Concat(elements[:len(elements)-1]...), marshalKey(t, key))
	if err != nil {
		t.Fatal(err)
	}
	return pair, key
}

// foreign is a peer that checks nothing and presents pair.
func foreign(pair tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:         []tls.Certificate{pair},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
		InsecureSkipVerify:   true,
		ClientAuth:           tls.RequireAnyClientCert,
		NextProtos:           []string{"h2"},
	}
}

// peers are what a peer may present; the texts are what our client, which
// expects db, and our server, of trust domain cluster.local, say to it.
var peers = []struct {
	name           string
	uris           []string
	change         func(*x509.Certificate)
	client, server string
}{
	{name: "the expected", uris: []string{db.String()}},
	{name: "another of the trust domain", uris: []string{web.String()}, client: "expected " + db.String() + ", presented " + web.String()},
	{name: "another trust domain", uris: []string{abroad.String()}, client: "unexpected identity", server: `expected trust domain "cluster.local", presented ` + abroad.String()},
	{name: "the expected among several", uris: []string{"https://example.com/x", abroad.String(), db.String()}},
	{name: "no URI", client: "presented none", server: "presented none"},
	{name: "a URI that does not parse", uris: []string{"spiffe://cluster.local/db"}, client: "presented none", server: "presented none"},
	{name: "a URI that a parser of URLs would change", uris: []string{db.String() + "#"}, client: "unexpected identity"},
	{name: "a scheme that a parser of URLs would change", uris: []string{"SPIFFE" + strings.TrimPrefix(db.String(), "spiffe")}, client: "presented none", server: "presented none"},
	{name: "expired", uris: []string{db.String()}, client: "expired", server: "expired",
		change: func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}},
	{name: "not yet valid", uris: []string{db.String()}, client: "not yet valid", server: "not yet valid",
		change: func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }},
	{name: "for clients only", uris: []string{db.String()}, client: "incompatible key usage",
		change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }},
	{name: "for servers only", uris: []string{db.String()}, server: "incompatible key usage",
		change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
	{name: "a CA as leaf", uris: []string{db.String()}, client: "CA certificate as leaf", server: "CA certificate as leaf",
		change: func(c *x509.Certificate) { c.BasicConstraintsValid, c.IsCA = true, true }},
	{name: "a leaf that may sign", uris: []string{db.String()}, client: "CA certificate as leaf", server: "CA certificate as leaf",
		change: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
}

func TestPeerChecks(t *testing.T) {
	ca := certstest.New()
	own := ca.Issue(web)
	for _, tt := range peers {
		t.Run(tt.name, func(t *testing.T) {
			pair, _ := issue(t, ca, db, tt.change, tt.uris...)
			_, _, err, _ := handshake(own.ClientTLS([]identity.ID{db}), foreign(pair))
			wantRefusal(t, "client", err, tt.client)
			_, _, _, err = handshake(foreign(pair), own.ServerTLS())
			wantRefusal(t, "server", err, tt.server)
		})
	}
}

func TestPeerOfAnotherCAIsRefused(t *testing.T) {
	own := certstest.New().Issue(web)
	pair, _ := issue(t, certstest.New(), db, nil, db.String())
	_, _, err, _ := handshake(own.ClientTLS([]identity.ID{db}), foreign(pair))
	wantRefusal(t, "client", err, "unknown authority")
	_, _, _, err = handshake(foreign(pair), own.ServerTLS())
	wantRefusal(t, "server", err, "unknown authority")
}

func TestEmptyExpectationRefusesEveryPeer(t *testing.T) {
	ca := certstest.New()
	for _, want := range [][]identity.ID{nil, {}, {{}}} {
		_, _, err, _ := handshake(ca.Issue(web).ClientTLS(want), ca.Issue(db).ServerTLS())
		wantRefusal(t, "client", err, "unexpected identity")
		if !errors.Is(err, certs.ErrPeer) {
			t.Errorf("%v does not match ErrPeer", err)
		}
	}
}

func TestExpectationIsCopied(t *testing.T) {
	ca := certstest.New()
	want := []identity.ID{web}
	cfg := ca.Issue(web).ClientTLS(want)
	want[0] = db
	_, _, err, _ := handshake(cfg, ca.Issue(db).ServerTLS())
	wantRefusal(t, "client", err, "unexpected identity")
}

func TestServerRefusesForeignProtocols(t *testing.T) {
	ca := certstest.New()
	pair, _ := issue(t, ca, db, nil, db.String())
	server := ca.Issue(web).ServerTLS()
	tests := []struct {
		name   string
		change func(*tls.Config)
		text   string
	}{
		{"no client certificate", func(c *tls.Config) { c.Certificates, c.GetClientCertificate = nil, nil }, "didn't provide a certificate"},
		{"TLS 1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, "unsupported versions"},
		{"another ALPN", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, "unsupported application protocols"},
		{"another ALPN still", func(c *tls.Config) { c.NextProtos = []string{"h3", "h2c"} }, "unsupported application protocols"},
		{"our ALPN among others", func(c *tls.Config) { c.NextProtos = []string{"http/1.1", "h2"} }, ""},
		{"no ALPN", func(c *tls.Config) { c.NextProtos = nil }, ""},
		{"a server name", func(c *tls.Config) { c.ServerName = "db.default" }, ""},
		{"no post-quantum group", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, ""},
		{"P-256", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }, ""},
		{"P-384", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := foreign(pair)
			tt.change(cfg)
			_, _, _, err := handshake(cfg, server)
			wantRefusal(t, "server", err, tt.text)
		})
	}
}

func TestClientRefusesTLS12(t *testing.T) {
	ca := certstest.New()
	pair, _ := issue(t, ca, db, nil, db.String())
	cfg := foreign(pair)
	cfg.MaxVersion = tls.VersionTLS12
	_, _, err, _ := handshake(ca.Issue(web).ClientTLS([]identity.ID{db}), cfg)
	wantRefusal(t, "client", err, "protocol version not supported")
}

// The client has one certificate: it presents that one, whatever CAs the
// server names, and leaves the verdict to the server.
func TestClientPresentsItsCertificateToAnyServer(t *testing.T) {
	ca := certstest.New()
	pair, _ := issue(t, ca, db, nil, db.String())
	cfg := foreign(pair)
	cfg.ClientCAs = x509.NewCertPool()
	cfg.ClientCAs.AddCert(certstest.New().Roots()[0])
	_, ss, cerr, serr := handshake(ca.Issue(web).ClientTLS([]identity.ID{db}), cfg)
	if cerr != nil || serr != nil || len(ss.PeerCertificates) == 0 {
		t.Errorf("client %v, server %v, %d certificates", cerr, serr, len(ss.PeerCertificates))
	}
}

func TestServerNamesItsRoots(t *testing.T) {
	ca := certstest.New()
	ca.Rotate()
	pair, _ := issue(t, ca, db, nil, db.String())
	cfg := foreign(pair)
	var named [][]byte
	cfg.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		named = info.AcceptableCAs
		return &pair, nil
	}
	if _, _, cerr, serr := handshake(cfg, ca.Issue(web).ServerTLS()); cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	if len(named) != 2 {
		t.Errorf("server named %d CAs, want its 2 roots", len(named))
	}
}

// While roots rotate, certificates of the old and the new root live side by
// side: peers understand each other as long as each holds the other's root.
func TestRotationOfRoots(t *testing.T) {
	ca := certstest.New()
	before := ca.Issue(web)
	ca.Rotate()
	after := ca.Issue(db)
	if len(before.Roots) != 1 || len(after.Roots) != 2 {
		t.Fatalf("%d and %d roots, want 1 and 2", len(before.Roots), len(after.Roots))
	}
	renewed := ca.Issue(web)
	if _, _, cerr, serr := handshake(renewed.ClientTLS([]identity.ID{db}), after.ServerTLS()); cerr != nil || serr != nil {
		t.Errorf("both renewed: client %v, server %v", cerr, serr)
	}
	if _, _, cerr, _ := handshake(before.ClientTLS([]identity.ID{db}), after.ServerTLS()); cerr == nil {
		t.Error("a client without the new root took a certificate of it")
	}
	old, _ := issue(t, ca, web, nil, web.String())
	old.Certificate, old.PrivateKey = [][]byte{before.Leaf.Raw}, before.Key()
	if _, _, _, serr := handshake(foreign(old), after.ServerTLS()); serr != nil {
		t.Errorf("a server with both roots, a client with the old certificate: %v", serr)
	}
}

func TestIntermediatesArePresented(t *testing.T) {
	ca := certstest.New()
	client := ca.Issue(web)
	ca.Intermediate()
	ca.Intermediate()
	server := ca.Issue(db)
	if len(server.Chain) != 3 || len(server.Roots) != 1 {
		t.Fatalf("chain of %d with %d roots, want 3 and 1", len(server.Chain), len(server.Roots))
	}
	cs, _, cerr, serr := handshake(client.ClientTLS([]identity.ID{db}), server.ServerTLS())
	if cerr != nil || serr != nil {
		t.Fatalf("client %v, server %v", cerr, serr)
	}
	if len(cs.PeerCertificates) != 3 {
		t.Errorf("%d certificates presented, want leaf and 2 intermediates", len(cs.PeerCertificates))
	}
}

func TestPQCOnly(t *testing.T) {
	ca := certstest.New()
	m := run(t, certs.Config{CA: ca, PQCOnly: true})
	cert, err := m.Get(t.Context(), web, certs.RealTime)
	if err != nil {
		t.Fatal(err)
	}
	pair, _ := issue(t, ca, db, nil, db.String())
	classic := foreign(pair)
	classic.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256}
	_, _, _, err = handshake(classic, cert.ServerTLS())
	wantRefusal(t, "server", err, "key exchange")
	_, _, err, _ = handshake(cert.ClientTLS([]identity.ID{db}), classic)
	wantRefusal(t, "client", err, "handshake failure")
	if _, _, cerr, serr := handshake(cert.ClientTLS([]identity.ID{db}), ca.Issue(db).ServerTLS()); cerr != nil || serr != nil {
		t.Errorf("client %v, server %v", cerr, serr)
	}
}

// A configuration that was made while the certificate was valid refuses peers
// whose certificate has expired since.
func TestTimeOfHandshakeCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := certstest.New()
		client, server := ca.Issue(web).ClientTLS([]identity.ID{db}), ca.Issue(db).ServerTLS()
		if _, _, cerr, serr := handshake(client, server); cerr != nil || serr != nil {
			t.Fatal(cerr, serr)
		}
		time.Sleep(25 * time.Hour)
		_, _, err, _ := handshake(client, server)
		wantRefusal(t, "client", err, "expired")
	})
}

func TestPeerIDIsTheFirstThatParses(t *testing.T) {
	ca := certstest.New()
	for _, tt := range []struct {
		uris []string
		want identity.ID
	}{
		{[]string{db.String()}, db},
		{[]string{"https://x/", "spiffe://x", abroad.String(), db.String()}, abroad},
		{[]string{"https://x/"}, identity.ID{}},
		{nil, identity.ID{}},
	} {
		pair, _ := issue(t, ca, db, nil, tt.uris...)
		got, err := certs.PeerID(tls.ConnectionState{PeerCertificates: []*x509.Certificate{pair.Leaf}})
		if got != tt.want || (err == nil) == got.IsZero() {
			t.Errorf("PeerID of %q = %v, %v, want %v", tt.uris, got, err, tt.want)
		}
	}
	if id, err := certs.PeerID(tls.ConnectionState{}); err == nil {
		t.Errorf("PeerID of nobody = %v", id)
	}
}

// The key must not be printed, however the certificate is.
func TestPrintingShowsNoKey(t *testing.T) {
	cert := certstest.New().Issue(web)
	raw, err := cert.Key().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	d := new(big.Int).SetBytes(raw)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		for _, v := range []any{cert, []*certs.Certificate{cert}, certs.Status{Cert: cert}} {
			if text := fmt.Sprintf(verb, v); strings.Contains(text, d.String()) || strings.Contains(text, d.Text(16)) {
				t.Errorf("%s of %T shows the key", verb, v)
			}
		}
	}
}
