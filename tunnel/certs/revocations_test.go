package certs_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/istiodtest"
)

// A logBook is a log that can be read while it is written.
type logBook struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// take returns what was logged since it was last called.
func (l *logBook) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

func (l *logBook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// lists writes a file and returns the Revocations that were read from it.
func lists(t *testing.T, text ...[]byte) *certs.Revocations {
	t.Helper()
	path := write(t, filepath.Join(t.TempDir(), "ca-crl.pem"), string(bytes.Join(text, nil)))
	r, err := certs.NewRevocations(certs.RevocationsConfig{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRevokedPeersAreRefused(t *testing.T) {
	ca := certstest.New()
	root := ca.Issuer()
	below := ca.Issue(web)
	ca.Intermediate()
	middle := ca.Issuer()
	ca.Intermediate()
	peer, self := ca.Issue(web), ca.Issue(db)
	other := certstest.New()
	stranger := other.Issue(web).Leaf
	stranger.SerialNumber = peer.Leaf.SerialNumber
	old := func(l *x509.RevocationList) {
		l.ThisUpdate, l.NextUpdate = time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)
	}
	for name, tt := range map[string]struct {
		list    []byte
		revoked bool
	}{
		"nothing revoked":                     {root.CRL(nil), false},
		"the leaf":                            {ca.Issuer().CRL(nil, peer.Leaf), true},
		"the issuer of the leaf":              {middle.CRL(nil, peer.Chain[1]), true},
		"the intermediate above":              {root.CRL(nil, peer.Chain[2]), true},
		"the leaf, by an expired list":        {ca.Issuer().CRL(old, peer.Leaf), true},
		"among certificates in the file":      {append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: peer.Leaf.Raw}), ca.Issuer().CRL(nil, peer.Leaf)...), true},
		"a list each of two issuers":          {append(root.CRL(nil), ca.Issuer().CRL(nil, peer.Leaf)...), true},
		"another leaf":                        {ca.Issuer().CRL(nil, below.Leaf), false},
		"the serial number, by another":       {root.CRL(nil, peer.Leaf), false},
		"by another CA of the issuer's name":  {ca.Issuer().Namesake().CRL(nil, peer.Leaf), false},
		"by both of the same name":            {append(ca.Issuer().Namesake().CRL(nil, peer.Leaf), ca.Issuer().CRL(nil, peer.Leaf)...), true},
		"the root, which is trusted directly": {root.CRL(nil, root.Certificate()), false},
		"the serial number, of a stranger":    {other.Issuer().CRL(nil, stranger), false},
	} {
		t.Run(name, func(t *testing.T) {
			wary := self.WithRevocations(lists(t, tt.list))
			_, _, err, _ := handshake(wary.ClientTLS([]identity.ID{web}), peer.ServerTLS())
			wantRevoked(t, "our client", err, tt.revoked)
			_, _, _, err = handshake(peer.ClientTLS([]identity.ID{db}), wary.ServerTLS())
			wantRevoked(t, "our server", err, tt.revoked)
			wantRevoked(t, "Agree as the client", certs.Agree(wary, peer), tt.revoked)
			wantRevoked(t, "Agree as the server", certs.Agree(peer, wary), tt.revoked)
		})
	}
}

func wantRevoked(t *testing.T, who string, err error, want bool) {
	t.Helper()
	revoked, ok := errors.AsType[*certs.RevokedError](err)
	switch {
	case ok != want, !want && err != nil:
		t.Errorf("%s: %v, want revoked: %v", who, err, want)
	case want && (revoked.Serial == "" || !strings.Contains(err.Error(), "revoked by its issuer")):
		t.Errorf("%s: %v", who, err)
	}
}

// The error is for a human who has to find the certificate.
func TestRevokedErrorNamesTheCertificate(t *testing.T) {
	ca := certstest.New()
	root := ca.Issuer()
	ca.Intermediate()
	peer := ca.Issue(web)
	for want, list := range map[string][]byte{
		fmt.Sprintf("certificate %x of %s was revoked", peer.Leaf.SerialNumber, web): ca.Issuer().CRL(nil, peer.Leaf),
		fmt.Sprintf("certificate %x of CA \"CN=", peer.Chain[1].SerialNumber):        root.CRL(nil, peer.Chain[1]),
	} {
		err := certs.Agree(ca.Issue(db).WithRevocations(lists(t, list)), peer)
		wantRefusal(t, "a revoked peer", err, want)
	}
}

// What a proof says of a live connection follows the lists, not the clock.
func TestProofIsCheckedAgain(t *testing.T) {
	ca := certstest.New()
	ca.Intermediate()
	client, server := ca.Issue(web), ca.Issue(db)
	cs, ss, cerr, serr := handshake(client.ClientTLS([]identity.ID{db}), server.ServerTLS())
	if cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	ofServer, ofClient := certs.NewProof(cs, client, time.Now()), certs.NewProof(ss, nil, time.Now())
	for name, tt := range map[string]struct {
		list           []byte
		server, client bool
	}{
		"nobody":               {ca.Issuer().CRL(nil), false, false},
		"the server":           {ca.Issuer().CRL(nil, server.Leaf), true, false},
		"the client":           {ca.Issuer().CRL(nil, client.Leaf), false, true},
		"both, by a namesake":  {ca.Issuer().Namesake().CRL(nil, client.Leaf, server.Leaf), false, false},
		"both, by their chain": {ca.Issuer().CRL(nil, client.Leaf, server.Leaf), true, true},
	} {
		r := lists(t, tt.list)
		wantRevoked(t, name+": the server", r.Check(ofServer), tt.server)
		wantRevoked(t, name+": the client", r.Check(ofClient), tt.client)
	}
	if err := (*certs.Revocations)(nil).Check(ofServer); err != nil {
		t.Errorf("without lists: %v", err)
	}
}

func TestProofOutlivesTheCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := certstest.New()
		client, server := ca.Issue(web), ca.Issue(db)
		proof := certs.NewProof(tls.ConnectionState{PeerCertificates: server.Chain}, client, time.Now())
		time.Sleep(25 * time.Hour)
		wantRevoked(t, "by a namesake, long expired", lists(t, ca.Issuer().Namesake().CRL(nil, server.Leaf)).Check(proof), false)
		wantRevoked(t, "long expired", lists(t, ca.Issuer().CRL(nil, server.Leaf)).Check(proof), true)
	})
}

// A crlFile is a file of lists under a Revocations that runs.
type crlFile struct {
	*certs.Revocations
	t     *testing.T
	path  string
	log   *logBook
	woken int
}

// inFile runs test under synctest with a file that has text, or is not there.
func inFile(t *testing.T, text []byte, test func(f *crlFile)) {
	synctest.Test(t, func(t *testing.T) {
		f := &crlFile{t: t, path: filepath.Join(t.TempDir(), "ca-crl.pem"), log: &logBook{}}
		if text != nil {
			write(t, f.path, string(text))
		}
		var err error
		f.Revocations, err = certs.NewRevocations(certs.RevocationsConfig{Path: f.path, Log: f.log.logger()})
		if err != nil {
			t.Fatal(err)
		}
		stop := f.OnChange(func() { f.woken++ })
		defer stop()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.Run(ctx) }()
		test(f)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// pass lets Run look at the file a few times.
func (f *crlFile) pass() {
	time.Sleep(11 * time.Second)
	synctest.Wait()
}

// wantLog checks that what was logged is one line with each of parts, or none.
func (f *crlFile) wantLog(parts ...string) {
	f.t.Helper()
	got := f.log.take()
	if len(parts) == 0 && got != "" || len(parts) > 0 && strings.Count(got, "\n") != 1 {
		f.t.Errorf("logged %q, want one line with %q", got, parts)
	}
	for _, p := range parts {
		if !strings.Contains(got, p) {
			f.t.Errorf("logged %q, want %q in it", got, p)
		}
	}
}

func (f *crlFile) want(revoked int, woken int) {
	f.t.Helper()
	if got := f.Stats().Revoked; got != revoked || f.woken != woken {
		f.t.Errorf("%d certificates are revoked after %d changes, want %d after %d", got, f.woken, revoked, woken)
	}
}

// bubble is when synctest's clock starts; what is to be valid there is issued then.
func TestFileIsReadAgain(t *testing.T) {
	inFile(t, nil, func(f *crlFile) {
		ca := certstest.New()
		a, b := ca.Issue(web).Leaf, ca.Issue(db).Leaf
		f.wantLog("level=INFO", f.path, "no file of revocation lists yet")
		f.pass()
		f.wantLog()
		write(f.t, f.path, string(ca.Issuer().CRL(nil, a)))
		f.pass()
		f.want(1, 1)
		f.wantLog("level=INFO", f.path, "lists=1", "revoked=1")
		f.pass()
		f.want(1, 1)
		write(f.t, f.path, string(ca.Issuer().CRL(nil, a, b)))
		f.pass()
		f.want(2, 2)
		f.log.take()
		// The same length, in place, and dated as the file before.
		info, err := os.Stat(f.path)
		if err != nil {
			f.t.Fatal(err)
		}
		text := ca.Issuer().CRL(nil, b)
		for len(text) < int(info.Size()) {
			text = append(text, '\n')
		}
		if err := os.WriteFile(f.path, text, 0o600); err != nil {
			f.t.Fatal(err)
		}
		if err := os.Chtimes(f.path, info.ModTime(), info.ModTime()); err != nil {
			f.t.Fatal(err)
		}
		f.pass()
		f.want(1, 3)
	})
}

func TestKubernetesSwapsTheDirectory(t *testing.T) {
	v := istiodtest.NewVolume(t, "ca-crl.pem")
	synctest.Test(t, func(t *testing.T) {
		r, err := certs.NewRevocations(certs.RevocationsConfig{Path: v.Path("ca-crl.pem")})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = r.Run(ctx) }()
		ca := certstest.New()
		revoked := []*x509.Certificate{}
		for n := range 4 {
			if got := r.Stats().Revoked; got != n {
				t.Errorf("%d certificates are revoked, want %d", got, n)
			}
			revoked = append(revoked, ca.Issue(id(n)).Leaf)
			v.Swap(map[string]string{"ca-crl.pem": string(ca.Issuer().CRL(nil, revoked...))})
			time.Sleep(5 * time.Second)
		}
		v.Swap(nil) // The ConfigMap lost its key.
		time.Sleep(5 * time.Second)
		if got := r.Stats().Revoked; got != 4 {
			t.Errorf("%d certificates are revoked once the file is gone, want 4", got)
		}
		cancel()
		<-done
	})
}

// hostile are contents that a good list must survive, and what is said of them.
func hostile(ca *certstest.CA, good []byte) map[string]struct {
	text []byte
	says string
} {
	extension := func(id asn1.ObjectIdentifier, value []byte) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) {
			l.ExtraExtensions = []pkix.Extension{{Id: id, Critical: true, Value: value}}
		}
	}
	crl := ca.Issuer().CRL
	entry := func(l *x509.RevocationList) {
		l.RevokedCertificateEntries = []x509.RevocationListEntry{{SerialNumber: big.NewInt(1), RevocationTime: time.Now(),
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 29}, Critical: true, Value: []byte{0x30, 0}}}}}
	}
	block, _ := pem.Decode(good)
	return map[string]struct {
		text []byte
		says string
	}{
		"empty":             {nil, "no list in it"},
		"blank":             {[]byte("\n\n"), "no list in it"},
		"only certificates": {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Roots()[0].Raw}), "no list in it"},
		"garbage":           {[]byte("garbage"), "not a revocation list"},
		"binary garbage":    {bytes.Repeat([]byte{0x30, 0x84, 0xff}, 1000), "not a revocation list"},
		"cut short":         {good[:len(good)/2], "1 of 1 lists are not PEM"},
		"the second cut":    {append(crl(nil), good[:len(good)-20]...), "1 of 2 lists are not PEM"},
		"the first damaged": {append(bytes.Replace(crl(nil), []byte("\nM"), []byte("\n!!"), 1), good...), "1 of 2 lists are not PEM"},
		"DER cut short":     {block.Bytes[:len(block.Bytes)-9], "not a revocation list"},
		"not a list":        {pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: ca.Roots()[0].Raw}), "list 1: not a revocation list"},
		"a delta":           {crl(extension(asn1.ObjectIdentifier{2, 5, 29, 27}, []byte{2, 1, 1})), "a delta list"},
		"an indirect list":  {crl(extension(asn1.ObjectIdentifier{2, 5, 29, 28}, []byte{0x30, 3, 0x84, 1, 0xff})), "an indirect list"},
		"bad distribution":  {crl(extension(asn1.ObjectIdentifier{2, 5, 29, 28}, []byte{0x30, 3, 0x84})), "malformed issuing distribution point"},
		"unknown and vital": {crl(extension(asn1.ObjectIdentifier{1, 2, 3}, nil)), "critical extension 1.2.3"},
		"a vital entry":     {crl(entry), "critical extension 2.5.29.29 of an entry"},
		"too large":         {append(bytes.Repeat([]byte("\n"), 16<<20), good...), "over 16777216 bytes"},
	}
}

func TestHostileFilesChangeNothing(t *testing.T) {
	ca := certstest.New()
	peer := ca.Issue(web)
	good := ca.Issuer().CRL(func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(time.Hour) }, peer.Leaf)
	for name, bad := range hostile(ca, good) {
		t.Run(name, func(t *testing.T) {
			inFile(t, good, func(f *crlFile) {
				f.log.take()
				write(f.t, f.path, string(bad.text))
				f.pass()
				f.want(1, 0)
				f.wantLog("level=WARN", "the earlier ones stay in force", f.path, bad.says)
				f.pass()
				f.wantLog()
			})
			inFile(t, bad.text, func(f *crlFile) {
				if bad.says != "no list in it" {
					f.wantLog("level=ERROR", "no certificate counts as revoked", f.path, bad.says)
				}
				f.want(0, 0)
				write(f.t, f.path, string(good))
				f.pass()
				f.want(1, f.woken)
				if f.woken == 0 {
					f.t.Error("nobody was told of the first good list")
				}
			})
		})
	}
}

// What is no file, or is none any more, is neither waited for nor believed.
func TestFileThatIsNone(t *testing.T) {
	ca := certstest.New()
	good := ca.Issuer().CRL(nil, ca.Issue(web).Leaf)
	for name, tt := range map[string]struct {
		put  func(path string) error
		says string
	}{
		"gone":        {func(string) error { return nil }, "no such file"},
		"a directory": {func(path string) error { return os.Mkdir(path, 0o700) }, "not a regular file"},
		"a pipe":      {func(path string) error { return syscall.Mkfifo(path, 0o600) }, "not a regular file"},
		"endless":     {func(path string) error { return os.Symlink("/dev/zero", path) }, "not a regular file"},
		"a loop":      {func(path string) error { return os.Symlink(filepath.Base(path), path) }, "too many levels"},
	} {
		t.Run(name, func(t *testing.T) {
			inFile(t, good, func(f *crlFile) {
				f.log.take()
				if err := errors.Join(os.Remove(f.path), tt.put(f.path)); err != nil {
					f.t.Fatal(err)
				}
				f.pass()
				f.want(1, 0)
				f.wantLog("level=WARN", "the earlier ones stay in force", f.path, tt.says)
				if err := os.RemoveAll(f.path); err != nil {
					f.t.Fatal(err)
				}
				write(f.t, f.path, string(append(good, ca.Issuer().Namesake().CRL(nil)...)))
				f.pass()
				f.want(1, 1)
			})
		})
	}
}

// An old list in place of a newer one gives nobody back what was revoked.
func TestOlderListIsNotUsed(t *testing.T) {
	ca, other := certstest.New(), certstest.New()
	a, b := ca.Issue(web).Leaf, ca.Issue(db).Leaf
	now := time.Now().Truncate(time.Second)
	list := func(at time.Time, number int64, revoked ...*x509.Certificate) []byte {
		return ca.Issuer().CRL(func(l *x509.RevocationList) {
			l.ThisUpdate, l.NextUpdate, l.Number = at, at.Add(time.Hour), big.NewInt(number)
		}, revoked...)
	}
	inFile(t, list(now, 5, a, b), func(f *crlFile) {
		f.log.take()
		for name, text := range map[string][]byte{
			"older":                  list(now.Add(-2*time.Hour), 4, a),
			"older, a higher number": list(now.Add(-2*time.Hour), 6),
			"a lower number":         list(now, 4),
		} {
			write(f.t, f.path, string(text))
			f.pass()
			if f.Stats().Revoked != 2 || !strings.Contains(f.log.take(), "older than the one in force") {
				f.t.Errorf("%s: %d are revoked", name, f.Stats().Revoked)
			}
		}
		write(f.t, f.path, string(append(list(now.Add(-2*time.Hour), 4), other.Issuer().CRL(nil, a)...)))
		f.pass()
		if got := f.Stats(); got.Revoked != 3 || got.Lists != 2 {
			f.t.Errorf("beside one of another issuer: %+v", got)
		}
		write(f.t, f.path, string(list(now, 6, b)))
		f.pass()
		if got := f.Stats(); got.Revoked != 1 || got.Lists != 1 {
			f.t.Errorf("a newer one: %+v", got)
		}
	})
}

func TestExpiryIsTold(t *testing.T) {
	ca := certstest.New()
	leaf := ca.Issue(web).Leaf
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "ca-crl.pem")
		write(t, path, string(ca.Issuer().CRL(func(l *x509.RevocationList) { l.ThisUpdate, l.NextUpdate = time.Now(), time.Now().Add(time.Hour) }, leaf)))
		var log logBook
		r, err := certs.NewRevocations(certs.RevocationsConfig{Path: path, Log: log.logger()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = r.Run(ctx) }()
		time.Sleep(59 * time.Minute)
		if text := log.take(); strings.Contains(text, "expired") || r.Stats().Expired != 0 {
			t.Errorf("before the end: %s", text)
		}
		time.Sleep(time.Hour)
		if text := log.take(); strings.Count(text, "has expired") != 1 || r.Stats().Expired != 1 || r.Stats().Revoked != 1 {
			t.Errorf("after it: %q, %+v", text, r.Stats())
		}
		cancel()
		<-done
	})
}

func TestRevocationsNeedAPath(t *testing.T) {
	if _, err := certs.NewRevocations(certs.RevocationsConfig{}); err == nil {
		t.Error("no path was accepted")
	}
}

// A Manager's certificates ask its Revocations.
func TestManagerPassesRevocationsOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(true)
		peer := g.Issue(web)
		m := run(t, certs.Config{CA: g, Revocations: lists(t, g.Issuer().CRL(nil, peer.Leaf))})
		cert, err := m.Get(t.Context(), db, certs.RealTime)
		if err != nil {
			t.Fatal(err)
		}
		wantRevoked(t, "Agree", certs.Agree(cert, peer), true)
	})
}

// FuzzRevocationLists: no bytes panic, and what is read is what crypto/x509 reads.
func FuzzRevocationLists(f *testing.F) {
	ca := certstest.New()
	good := ca.Issuer().CRL(nil, ca.Roots()...)
	f.Add(good)
	block, _ := pem.Decode(good)
	f.Add(block.Bytes)
	for _, bad := range hostile(ca, good) {
		if len(bad.text) < 1<<16 {
			f.Add(bad.text)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := certs.ParseCRLs(text)
		if err != nil {
			return
		}
		want := map[string]bool{}
		blocks := 0
		der := [][]byte{text}
		if bytes.Contains(text, []byte("-----BEGIN")) {
			der = nil
			for b, rest := pem.Decode(text); b != nil; b, rest = pem.Decode(rest) {
				if b.Type == "X509 CRL" {
					der = append(der, b.Bytes)
				}
			}
		}
		for _, d := range der {
			l, err := x509.ParseRevocationList(d)
			if err != nil {
				continue // Blank, or an error of ours too.
			}
			blocks++
			for _, e := range l.RevokedCertificateEntries {
				want[fmt.Sprint(blocks, " ", new(big.Int).Abs(e.SerialNumber))] = true
			}
		}
		if len(got) != blocks {
			t.Fatalf("%d lists, want %d", len(got), blocks)
		}
		n := 0
		for i, serials := range got {
			for s := range serials {
				if n++; !want[fmt.Sprint(i+1, " ", new(big.Int).SetBytes([]byte(s)))] {
					t.Errorf("list %d has %x, which it had not", i+1, s)
				}
			}
		}
		if n != len(want) {
			t.Errorf("%d serial numbers, want %d", n, len(want))
		}
	})
}
