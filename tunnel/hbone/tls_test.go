package hbone_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/hbone/hbonetest"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

var (
	idA   = identity.MustParse("spiffe://cluster.local/ns/default/sa/a")
	idB   = identity.MustParse("spiffe://cluster.local/ns/default/sa/b")
	addrA = netip.MustParseAddrPort("10.0.0.1:40000")
	addrB = netip.MustParseAddrPort("10.0.0.2:15008")
)

// A tlsPair is one of our TLS ends and a foreign crypto/tls peer.
type tlsPair struct {
	loop    *splicetest.Loop
	shakes  *hbone.Handshakes
	wire    *hbonetest.Conn
	foreign *tls.Conn
	ours    *hbone.TLS
}

func newTLSPair(t testing.TB, role hbone.Role, size int) *tlsPair {
	ca := certstest.New()
	return newTLSPairWith(t, role, size, ca.Issue(idA), ca.Issue(idB))
}

// newTLSPairWith makes a pair with our certificate and the foreign one.
func newTLSPairWith(t testing.TB, role hbone.Role, size int, our, foreign *certs.Certificate) *tlsPair {
	p := &tlsPair{loop: splicetest.NewLoop(), shakes: hbone.NewHandshakes(hbone.HandshakesConfig{})}
	t.Cleanup(func() { p.shakes.Close(); p.loop.Close() })
	wire, end := newWire(t, p.loop, size)
	p.wire = wire
	cfg := our.ServerTLS()
	p.foreign = tls.Client(wire, foreign.ClientTLS([]identity.ID{our.ID}))
	if role == hbone.AsClient {
		cfg = our.ClientTLS([]identity.ID{foreign.ID})
		p.foreign = tls.Server(wire, foreign.ServerTLS())
	}
	type result struct {
		t   *hbone.TLS
		err error
	}
	results := make(chan result, 1)
	p.loop.Do(func() {
		p.shakes.Start(p.loop, end, role, cfg, addrA, addrB, func(c *hbone.TLS, err error) { results <- result{c, err} })
	})
	if err := p.foreign.Handshake(); err != nil {
		t.Fatalf("foreign handshake: %v", err)
	}
	r := <-results
	if r.err != nil {
		t.Fatalf("our handshake: %v", r.err)
	}
	p.ours = r.t
	return p
}

// send writes data from our side as the transport takes it, then closes.
func (p *tlsPair) send(data []byte) {
	p.loop.Do(func() {
		rest := data
		done := false
		p.ours.Notify(func() {
			for len(rest) > 0 {
				n, err := p.ours.Write(rest[:min(len(rest), 100<<10)])
				rest = rest[n:]
				if err != nil {
					return
				}
			}
			if !done {
				done = true
				_ = p.ours.CloseWrite()
			}
		})
	})
}

func random(n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{1})
	_, _ = src.Read(b)
	return b
}

func roles(t *testing.T, test func(t *testing.T, role hbone.Role)) {
	for role, name := range map[hbone.Role]string{hbone.AsClient: "client", hbone.AsServer: "server"} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { test(t, role) }) })
	}
}

func TestTLSReceivesAllUntilCloseNotify(t *testing.T) {
	roles(t, func(t *testing.T, role hbone.Role) {
		p := newTLSPair(t, role, 10_000)
		want := random(1 << 20)
		r := collect(p.loop, p.ours)
		go func() {
			_, _ = p.foreign.Write(want)
			_ = p.foreign.CloseWrite()
		}()
		if got, err := r.wait(t); err != nil || !bytes.Equal(got, want) {
			t.Errorf("received %d bytes, %v; want %d, nil", len(got), err, len(want))
		}
	})
}

func TestTLSSendsAllThroughASlowTransport(t *testing.T) {
	roles(t, func(t *testing.T, role hbone.Role) {
		p := newTLSPair(t, role, 5_000)
		want := random(1 << 20)
		p.send(want)
		got, err := io.ReadAll(p.foreign)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("received %d bytes, %v; want %d, nil", len(got), err, len(want))
		}
	})
}

func TestTLSHalfCloseLeavesTheOtherDirectionOpen(t *testing.T) {
	roles(t, func(t *testing.T, role hbone.Role) {
		p := newTLSPair(t, role, 64<<10)
		p.send([]byte("question"))
		if got, err := io.ReadAll(p.foreign); string(got) != "question" || err != nil {
			t.Fatalf("ReadAll = %q, %v", got, err)
		}
		r := collect(p.loop, p.ours)
		go func() {
			_, _ = p.foreign.Write([]byte("answer"))
			_ = p.foreign.CloseWrite()
		}()
		if got, err := r.wait(t); string(got) != "answer" || err != nil {
			t.Errorf("answer = %q, %v", got, err)
		}
	})
}

func TestTLSTruncationIsAReset(t *testing.T) {
	roles(t, func(t *testing.T, role hbone.Role) {
		p := newTLSPair(t, role, 64<<10)
		r := collect(p.loop, p.ours)
		_, _ = p.foreign.Write([]byte("cut"))
		_ = p.wire.CloseWrite() // a FIN without close_notify
		if got, err := r.wait(t); string(got) != "cut" || !errors.Is(err, splice.ErrReset) {
			t.Errorf("got %q, %v; want %q and a reset", got, err, "cut")
		}
	})
}

func TestTLSResetOfTheTransportIsAReset(t *testing.T) {
	roles(t, func(t *testing.T, role hbone.Role) {
		p := newTLSPair(t, role, 64<<10)
		r := collect(p.loop, p.ours)
		_ = p.wire.Close()
		if _, err := r.wait(t); !errors.Is(err, splice.ErrReset) {
			t.Errorf("err = %v, want a reset", err)
		}
		p.loop.Do(func() {
			if _, err := p.ours.Write([]byte("x")); !errors.Is(err, splice.ErrReset) {
				t.Errorf("Write = %v, want a reset", err)
			}
			p.ours.Close()
		})
	})
}

func TestTLSResetReachesThePeerWithoutCloseNotify(t *testing.T) {
	roles(t, func(t *testing.T, role hbone.Role) {
		p := newTLSPair(t, role, 64<<10)
		p.loop.Do(func() { p.ours.Reset(errors.New("test")) })
		if _, err := io.ReadAll(p.foreign); err == nil {
			t.Error("the peer saw a clean end")
		}
	})
}

func TestTLSCorruptRecordAlertsThePeerAndResets(t *testing.T) {
	roles(t, func(t *testing.T, role hbone.Role) {
		p := newTLSPair(t, role, 64<<10)
		r := collect(p.loop, p.ours)
		// A record that no key has sealed.
		_, _ = p.wire.Write(append([]byte{23, 3, 3, 0, 32}, make([]byte, 32)...))
		if _, err := r.wait(t); !errors.Is(err, splice.ErrReset) {
			t.Errorf("err = %v, want a reset", err)
		}
	})
}

func TestTLSKeepsNothingWhileIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newTLSPair(t, hbone.AsServer, 64<<10)
		r := collect(p.loop, p.ours)
		_, _ = p.foreign.Write(random(100 << 10))
		synctest.Wait()
		p.loop.Do(func() {
			if len(r.data) != 100<<10 {
				t.Errorf("received %d", len(r.data))
			}
			_, _ = p.ours.Write([]byte("x"))
			if in, out := hbone.Held(p.ours); in || out {
				t.Errorf("holds buffers: in %v, out %v", in, out)
			}
		})
	})
}

func TestTLSResidueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newTLSPair(t, hbone.AsServer, 1000)
		p.loop.Do(func() {
			total := 0
			for range 100 {
				n, err := p.ours.Write(make([]byte, 64<<10))
				total += n
				if errors.Is(err, splice.ErrAgain) {
					break
				}
			}
			if total > 256<<10 {
				t.Errorf("took %d bytes while the transport took nothing", total)
			}
			p.ours.Reset(errors.New("test"))
		})
	})
}

func TestHandshakeTimesOut(t *testing.T) {
	for role, name := range map[hbone.Role]string{hbone.AsClient: "client", hbone.AsServer: "server"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				loop := splicetest.NewLoop()
				defer loop.Close()
				shakes := hbone.NewHandshakes(hbone.HandshakesConfig{Timeout: 3 * time.Second})
				defer shakes.Close()
				cert := certstest.New().Issue(idA)
				cfg := cert.ServerTLS()
				if role == hbone.AsClient {
					cfg = cert.ClientTLS([]identity.ID{idB})
				}
				wire, end := newWire(t, loop, 64<<10)
				start := time.Now()
				errs := make(chan error, 1)
				loop.Do(func() {
					shakes.Start(loop, end, role, cfg, addrA, addrB, func(_ *hbone.TLS, err error) { errs <- err })
				})
				if err := <-errs; !errors.Is(err, hbone.ErrHandshakeTimeout) || time.Since(start) != 3*time.Second {
					t.Errorf("err = %v after %v", err, time.Since(start))
				}
				if _, err := io.ReadAll(wire); !errors.Is(err, splice.ErrReset) {
					t.Errorf("the peer saw %v, want a reset", err)
				}
			})
		})
	}
}

// A rejected client learns why: the alert is not overtaken by the reset.
func TestHandshakeRejectionReachesThePeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		loop := splicetest.NewLoop()
		defer loop.Close()
		shakes := hbone.NewHandshakes(hbone.HandshakesConfig{})
		defer shakes.Close()
		ca := certstest.New()
		server := ca.Issue(idB)
		other := ca.Issue(identity.MustParse("spiffe://elsewhere/ns/default/sa/a"))
		wire, end := newWire(t, loop, 64<<10)
		errs := make(chan error, 1)
		loop.Do(func() {
			shakes.Start(loop, end, hbone.AsServer, server.ServerTLS(), addrB, addrA, func(_ *hbone.TLS, err error) { errs <- err })
		})
		c := tls.Client(wire, other.ClientTLS([]identity.ID{idB}))
		if err := c.Handshake(); err != nil {
			t.Fatalf("handshake: %v", err) // it completes for the client, golden/hbone.txt
		}
		if err := <-errs; err == nil {
			t.Error("a client of another trust domain was accepted")
		}
		_, err := c.Read(make([]byte, 1))
		if !hbone.IsAlert(err) {
			t.Errorf("the client saw %v, want an alert", err)
		}
		_ = wire.Close()
	})
}

func TestHandshakeCancelResetsAndCallsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		loop := splicetest.NewLoop()
		defer loop.Close()
		shakes := hbone.NewHandshakes(hbone.HandshakesConfig{})
		defer shakes.Close()
		wire, end := newWire(t, loop, 64<<10)
		var cancel func()
		loop.Do(func() {
			cancel = shakes.Start(loop, end, hbone.AsClient, certstest.New().Issue(idA).ClientTLS(nil), addrA, addrB, func(*hbone.TLS, error) { t.Error("done was called") })
		})
		synctest.Wait()
		loop.Do(cancel)
		if _, err := io.ReadAll(wire); !errors.Is(err, splice.ErrReset) {
			t.Errorf("the peer saw %v, want a reset", err)
		}
	})
}

func TestHandshakesCloseFailsWhatRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		loop := splicetest.NewLoop()
		defer loop.Close()
		shakes := hbone.NewHandshakes(hbone.HandshakesConfig{Workers: 2, Queue: 2})
		cert := certstest.New().Issue(idA)
		errs := make(chan error, 8)
		for range 5 {
			_, end := newWire(t, loop, 64<<10)
			loop.Do(func() {
				shakes.Start(loop, end, hbone.AsClient, cert.ClientTLS(nil), addrA, addrB, func(_ *hbone.TLS, err error) { errs <- err })
			})
		}
		synctest.Wait()
		if err := <-errs; !errors.Is(err, hbone.ErrBusy) {
			t.Errorf("the fifth got %v, want ErrBusy", err)
		}
		shakes.Close()
		for range 4 {
			if err := <-errs; !errors.Is(err, hbone.ErrClosed) {
				t.Errorf("err = %v, want ErrClosed", err)
			}
		}
	})
}

// After a burst a few goroutines are left, with the stacks they have grown.
func TestHandshakesLeaveFewGoroutines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		loop := splicetest.NewLoop()
		defer loop.Close()
		shakes := hbone.NewHandshakes(hbone.HandshakesConfig{})
		defer shakes.Close()
		cert := certstest.New().Issue(idA)
		workers := func() int {
			synctest.Wait()
			b := make([]byte, 4<<20)
			return strings.Count(string(b[:runtime.Stack(b, true)]), "hbone.(*Handshakes).work(")
		}
		const burst = 100
		for round := range 2 {
			errs := make(chan error, burst)
			var wires []net.Conn
			for range burst {
				wire, end := newWire(t, loop, 64<<10)
				wires = append(wires, wire)
				loop.Do(func() {
					shakes.Start(loop, end, hbone.AsClient, cert.ClientTLS(nil), addrA, addrB, func(_ *hbone.TLS, err error) { errs <- err })
				})
			}
			if n := workers(); n != burst {
				t.Errorf("round %d: %d goroutines for %d handshakes", round, n, burst)
			}
			for _, w := range wires {
				_, _ = w.Write([]byte("this is not TLS"))
			}
			for range burst {
				if err := <-errs; err == nil {
					t.Error("a handshake with nobody succeeded")
				}
			}
			if n := workers(); n > 20 || n == 0 {
				t.Errorf("round %d: %d goroutines are left", round, n)
			}
			for _, w := range wires {
				_ = w.Close()
			}
		}
	})
}

// "If the request_update field is set to update_requested, then the receiver
// MUST send a KeyUpdate of its own" (RFC 8446 section 4.6.3), even if it has
// nothing else to send.
func TestTLSAnswersKeyUpdateWithoutAWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := certstest.New()
		our, foreign := ca.Issue(idA), ca.Issue(idB)
		keys := &keyLog{secrets: make(map[string][]byte)}
		loop := splicetest.NewLoop()
		defer loop.Close()
		shakes := hbone.NewHandshakes(hbone.HandshakesConfig{})
		defer shakes.Close()
		wire, end := newWire(t, loop, 64<<10)
		done := make(chan *hbone.TLS, 1)
		loop.Do(func() {
			shakes.Start(loop, end, hbone.AsServer, our.ServerTLS(), addrA, addrB, func(c *hbone.TLS, err error) { done <- c })
		})
		cfg := foreign.ClientTLS([]identity.ID{idA})
		cfg.KeyLogWriter = keys
		c := tls.Client(wire, cfg)
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		ours := <-done
		if c.ConnectionState().CipherSuite != tls.TLS_AES_128_GCM_SHA256 {
			t.Skip("the record is written by hand for AES-128-GCM only")
		}
		collect(loop, ours)
		_, _ = wire.Write(sealRecord(t, keys.secrets["CLIENT_TRAFFIC_SECRET_0"], []byte{24, 0, 0, 1, 1}))
		synctest.Wait()
		if wire.Buffered() == 0 {
			t.Fatal("no KeyUpdate came back")
		}
		loop.Do(func() { _, _ = ours.Write([]byte("under the next key")) })
		buf := make([]byte, 64)
		n, err := c.Read(buf)
		if string(buf[:n]) != "under the next key" || err != nil {
			t.Errorf("Read = %q, %v", buf[:n], err)
		}
		loop.Do(func() { ours.Reset(errors.New("test")) })
	})
}

type keyLog struct{ secrets map[string][]byte }

func (k *keyLog) Write(line []byte) (int, error) {
	f := strings.Fields(string(line))
	k.secrets[f[0]], _ = hex.DecodeString(f[2])
	return len(line), nil
}

// sealRecord seals the first record under a TLS 1.3 traffic secret for
// AES-128-GCM with SHA-256, holding a handshake message.
func sealRecord(t *testing.T, secret, message []byte) []byte {
	expand := func(label string, n int) []byte {
		info := []byte{0, byte(n), byte(len("tls13 " + label))}
		info = append(info, "tls13 "+label...)
		out, err := hkdf.Expand(sha256.New, secret, string(append(info, 0)), n)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	block, err := aes.NewCipher(expand("key", 16))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	inner := append(message, 22)
	head := []byte{23, 3, 3, 0, byte(len(inner) + gcm.Overhead())}
	return append(head, gcm.Seal(nil, expand("iv", 12), inner, head)...)
}
