package tunnel_test

import (
	"context"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/identity"
)

// A listed is a world whose pods follow a file of revoked certificates, each
// with a certificate source of its own.
type listed struct {
	*world
	lists   *certs.Revocations
	path    string
	sources map[string]*certSource
}

func inListed(t *testing.T, test func(w *listed)) {
	inWorld(t, func(w *world) {
		l := &listed{world: w, path: filepath.Join(t.TempDir(), "ca-crl.pem"), sources: map[string]*certSource{}}
		var err error
		if l.lists, err = certs.NewRevocations(certs.RevocationsConfig{Path: l.path}); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = l.lists.Run(ctx) }()
		w.edit = func(c *tunnel.Config) {
			s := &certSource{ca: w.ca, have: map[identity.ID]*certs.Certificate{}, lists: l.lists}
			l.sources[c.Workload.Name], c.Certs, c.Revocations = s, s, l.lists
		}
		test(l)
		stop()
		<-done
	})
}

func account(name string) identity.ID {
	return identity.MustParse("spiffe://cluster.local/ns/default/sa/" + name)
}

// revoke makes the certificates of the named pods the only revoked ones, and
// returns when everybody has heard of it.
func (l *listed) revoke(names ...string) {
	l.t.Helper()
	var leaves []*x509.Certificate
	for _, name := range names {
		cert, _ := l.sources[name].Current(account(name))
		leaves = append(leaves, cert.Leaf)
	}
	if err := os.WriteFile(l.path, l.ca.Issuer().CRL(nil, leaves...), 0o600); err != nil {
		l.t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	synctest.Wait()
}

func (l *listed) wantRejected(source, destination bool) {
	l.t.Helper()
	got := l.lists.Stats().Rejected
	if got["source"] > 0 != source || got["destination"] > 0 != destination {
		l.t.Errorf("rejected %v, want some as source: %v, as destination: %v", got, source, destination)
	}
}

// Whoever is revoked loses the connections it has, in both directions, and
// gets no new ones; nobody else notices.
func TestRevokedServer(t *testing.T) {
	inListed(t, func(w *listed) {
		a, b := pair(w.world)
		c := w.pod("c", "10.0.0.3")
		b.serve(80, echoes)
		c.serve(80, echoes)
		for _, addr := range []string{"10.0.0.2:80", "10.0.0.3:80"} {
			a.call(addr).want("", "open")
		}
		w.revoke("c", "b", "a")
		w.revoke() // A newer list may give back what an older one took.
		doomed, spared := a.call("10.0.0.2:80"), a.call("10.0.0.3:80")
		doomed.send("x")
		spared.send("y")
		doomed.want("x", "open")
		before := w.lists.Stats().Rejected["source"]

		w.revoke("b")
		doomed.want("x", "reset")
		rec := a.last(tunnel.CertRevoked)
		if rec.Direction != tunnel.Outbound || rec.Reason.Flag() != "CERT_REVOKED" || rec.Sent != 1 || rec.Received != 1 {
			t.Errorf("record %+v", rec)
		}
		if got := w.lists.Stats().Rejected["source"]; got != before+1 {
			t.Errorf("%d rejected as source, want %d", got, before+1)
		}
		spared.send("z")
		spared.want("yz", "open")
		a.call("10.0.0.2:80").want("", "no route to host")
		a.last(tunnel.CertRevoked)
		if rec := a.last(tunnel.CertRevoked); rec.SameNode {
			t.Error("a revoked neighbour was met in memory")
		}

		w.sources["b"].renew(account("b"))
		again := a.call("10.0.0.2:80")
		again.send("new")
		again.want("new", "open")
	})
}

func TestRevokedClient(t *testing.T) {
	inListed(t, func(w *listed) {
		a, b := pair(w.world)
		b.serve(80, echoes)
		doomed := a.call("10.0.0.2:80")
		doomed.send("x")
		w.revoke("a")
		doomed.want("x", "reset")
		rec := b.last(tunnel.CertRevoked)
		if rec.Direction != tunnel.Inbound || rec.SrcIdentity != account("a") {
			t.Errorf("record %+v", rec)
		}
		w.wantRejected(false, true)
		a.call("10.0.0.2:80").want("", "no route to host")
		a.last(tunnel.TLSFailed)
		b.lastFailed(tunnel.CertRevoked)

		w.sources["a"].renew(account("a"))
		again := a.call("10.0.0.2:80")
		again.send("new")
		again.want("new", "open")
	})
}

// A pod that is gone, or whose proxy stops, is not asked any more.
func TestClosedPodHearsOfNoList(t *testing.T) {
	inListed(t, func(w *listed) {
		a, b := pair(w.world)
		b.serve(80, echoes)
		a.call("10.0.0.2:80").want("", "open")
		a.Close()
		w.revoke("b")
		w.wantRejected(false, false)
	})
}
