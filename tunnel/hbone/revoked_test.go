package hbone_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/splice"
)

// A crl is a file of what is revoked. Nothing looks at it but change.
type crl struct {
	*certs.Revocations
	t    *testing.T
	path string
}

func newCRL(t *testing.T) *crl {
	t.Helper()
	c := &crl{t: t, path: filepath.Join(t.TempDir(), "ca-crl.pem")}
	var err error
	if c.Revocations, err = certs.NewRevocations(certs.RevocationsConfig{Path: c.path}); err != nil {
		t.Fatal(err)
	}
	return c
}

// change revokes leaves, and returns when that is in force.
func (c *crl) change(by certstest.Issuer, leaves ...*x509.Certificate) {
	c.t.Helper()
	if err := os.WriteFile(c.path, by.CRL(nil, leaves...), 0o600); err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	changed := make(chan struct{})
	defer c.OnChange(func() { close(changed) })()
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	<-changed
	cancel()
	<-done
}

func (c *crl) wantRejected(source, destination uint64) {
	c.t.Helper()
	got := c.Stats().Rejected
	if got["source"] != source || got["destination"] != destination {
		c.t.Errorf("rejected %v, want %d as source and %d as destination", got, source, destination)
	}
}

// revokedBench is a bench whose pool and whose server, for peers at addrB,
// follow a file; their handshakes do not, so that only what comes after them is
// tested.
func inRevokedBubble(t *testing.T, test func(b *bench, list *crl, server *hbone.Server)) {
	var list *crl
	inBubble(t, func(c *hbone.PoolConfig) {
		list = newCRL(t)
		c.Revocations = list.Revocations
	}, func(t *testing.T, b *bench) {
		cert := b.ca.Issue(idB)
		b.source.set(cert)
		server := hbone.NewServer(hbone.ServerConfig{
			Loop: b.loop, Handshakes: b.shakes, Handle: func(in *hbone.Incoming) { b.handle(in) }, Revocations: list.Revocations,
			TLS: func(done func(*tls.Config, error)) func() { done(cert.ServerTLS(), nil); return nil },
		})
		b.loop.Do(func() {
			b.net.listeners[addrB] = func(end splice.End, remote netip.AddrPort) { server.Serve(end, remote, addrB) }
		})
		test(b, list, server)
		b.loop.Do(server.Close)
	})
}

func (b *bench) leaf(which string) *x509.Certificate {
	id := idA
	if which == "server" {
		id = idB
	}
	cert, _ := b.source.Current(id)
	return cert.Leaf
}

func TestCutRevokedEndsTheTunnels(t *testing.T) {
	for _, who := range []string{"client", "server"} {
		t.Run(who, func(t *testing.T) {
			inRevokedBubble(t, func(b *bench, list *crl, server *hbone.Server) {
				var served []error
				b.handle = func(in *hbone.Incoming) {
					end, err := in.Accept(nil)
					if err != nil {
						b.t.Error(err)
						return
					}
					end.Notify(func() {
						if _, err := end.Read(make([]byte, 64)); err != splice.ErrAgain {
							served = append(served, err)
							end.Notify(nil)
						}
					})
				}
				calls := waited(b.connect(150, target())) // Two connections.
				b.wantAll(calls, nil)
				cut := func() { b.loop.Do(func() { b.pool.CutRevoked(); server.CutRevoked() }); synctest.Wait() }
				list.change(b.ca.Issuer().Namesake(), b.leaf(who))
				cut()
				list.change(b.ca.Issuer(), b.ca.Issue(idB).Leaf)
				cut()
				b.wantConns(2)
				list.wantRejected(0, 0)

				list.change(b.ca.Issuer(), b.leaf(who))
				cut()
				b.wantConns(0)
				b.loop.Do(func() {
					_, err := calls[0].tunnel.Stream.Read(make([]byte, 1))
					_, revoked := errors.AsType[*certs.RevokedError](err)
					if !errors.Is(err, splice.ErrReset) || revoked != (who == "server") {
						t.Errorf("the client's stream: %v", err)
					}
					if len(served) != len(calls) {
						t.Fatalf("%d streams of the server have ended, want %d", len(served), len(calls))
					}
					for _, err := range served {
						_, revoked := errors.AsType[*certs.RevokedError](err)
						if !errors.Is(err, splice.ErrReset) || revoked != (who == "client") {
							t.Fatalf("a stream of the server: %v", err)
						}
					}
				})
				if who == "server" {
					list.wantRejected(2, 0)
				} else {
					list.wantRejected(0, 2)
				}
			})
		})
	}
}

// A handshake may have been judged by older lists than those that CutRevoked
// went by before it was over.
func TestRevokedBetweenHandshakeAndUse(t *testing.T) {
	inRevokedBubble(t, func(b *bench, list *crl, server *hbone.Server) {
		list.change(b.ca.Issuer(), b.leaf("server"))
		calls := waited(b.connect(2, target()))
		for _, c := range calls {
			if _, err := b.outcome(c); err == nil || !errors.As(err, new(*certs.RevokedError)) {
				t.Errorf("to a revoked server: %v", err)
			}
		}
		b.wantConns(0)
		list.wantRejected(1, 0)
		list.change(b.ca.Issuer(), b.leaf("client"))
		for _, c := range waited(b.connect(2, target())) {
			if _, err := b.outcome(c); err == nil || errors.As(err, new(*certs.RevokedError)) {
				t.Errorf("as a revoked client: %v, want the server's refusal", err)
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := server.Stats().Conns.Load(); n != 0 {
			t.Errorf("the server has %d connections", n)
		}
		if got := list.Stats().Rejected; got["source"] != 1 || got["destination"] == 0 {
			t.Errorf("rejected %v", got)
		}
	})
}

// Nobody who waits for a connection hangs when it is cut.
func TestCutRevokedAnswersWhoWaits(t *testing.T) {
	inRevokedBubble(t, func(b *bench, list *crl, server *hbone.Server) {
		b.handle = func(*hbone.Incoming) {}
		calls := waited(b.connect(3, target()))
		list.change(b.ca.Issuer(), b.leaf("server"))
		b.loop.Do(b.pool.CutRevoked)
		for _, c := range waited(calls) {
			if done, err := b.outcome(c); !done || !errors.As(err, new(*certs.RevokedError)) {
				t.Errorf("answered %v: %v", done, err)
			}
		}
	})
}
