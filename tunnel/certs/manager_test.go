package certs_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
)

func marshalKey(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// run starts a manager that ends with the test.
func run(t *testing.T, cfg certs.Config) *certs.Manager {
	t.Helper()
	m, stop := start(t, cfg)
	t.Cleanup(stop)
	return m
}

// start starts a manager; stop ends it, and returns when all of it has ended.
func start(t *testing.T, cfg certs.Config) (m *certs.Manager, stop func()) {
	t.Helper()
	m = certs.NewManager(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	return m, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

// gate is a CA that notes what it is asked for and when, and answers when it
// is told to, at once while open.
type gate struct {
	*certstest.CA
	open bool // set before use

	// mu guards the fields below.
	mu    sync.Mutex
	calls []call
	err   error         // what to answer with
	ttl   time.Duration // of what is issued; 0: as asked
	back  time.Duration // how far to date it back
	hold  map[identity.ID]chan struct{}
}

type call struct {
	id  identity.ID
	at  time.Time
	ttl time.Duration
}

func newGate(open bool) *gate {
	return &gate{CA: certstest.New(), open: open, hold: make(map[identity.ID]chan struct{})}
}

func (g *gate) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	g.mu.Lock()
	g.calls = append(g.calls, call{id, time.Now(), ttl})
	hold := make(chan struct{})
	if !g.open {
		g.hold[id] = hold
	} else {
		close(hold)
	}
	g.mu.Unlock()
	select {
	case <-hold:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	g.mu.Lock()
	err, short, back := g.err, g.ttl, g.back
	g.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if short > 0 {
		ttl = short
	}
	if back == 0 {
		return g.CA.Sign(ctx, id, csr, ttl)
	}
	block, _ := pem.Decode(csr)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	leaf := certstest.Leaf(ttl, id.String())
	leaf.NotBefore = leaf.NotBefore.Add(-back)
	return g.SignKey(req.PublicKey, leaf)
}

func (g *gate) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err = err
}

func (g *gate) release(id identity.ID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.hold[id])
	delete(g.hold, id)
}

func (g *gate) asked() []identity.ID {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []identity.ID
	for _, c := range g.calls {
		out = append(out, c.id)
	}
	return out
}

// pauses are the times between calls.
func (g *gate) pauses() []time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []time.Duration
	for i := 1; i < len(g.calls); i++ {
		out = append(out, g.calls[i].at.Sub(g.calls[i-1].at))
	}
	return out
}

func id(n int) identity.ID {
	return identity.MustParse(fmt.Sprintf("spiffe://cluster.local/ns/default/sa/a%03d", n))
}

func state(m *certs.Manager, id identity.ID) string {
	for _, s := range m.Dump() {
		if s.ID == id {
			return s.State
		}
	}
	return ""
}

func TestOneFetchServesAllWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := run(t, certs.Config{CA: g})
		var got [50]*certs.Certificate
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() { got[i], _ = m.Get(t.Context(), web, certs.RealTime) })
		}
		synctest.Wait()
		if s := state(m, web); s != "Initializing" {
			t.Errorf("state %q", s)
		}
		if _, ok := m.Current(web); ok {
			t.Error("Current has a certificate before there is one")
		}
		g.release(web)
		wg.Wait()
		for _, c := range got {
			if c == nil || c != got[0] {
				t.Fatalf("waiters got %v and %v", got[0], c)
			}
		}
		if n := len(g.asked()); n != 1 {
			t.Errorf("%d fetches", n)
		}
		if c, ok := m.Current(web); !ok || c != got[0] {
			t.Errorf("Current = %v, %v", c, ok)
		}
		if s := state(m, web); s != "Available" {
			t.Errorf("state %q", s)
		}
	})
}

func TestRequest(t *testing.T) {
	key, text, err := certs.NewRequest(web)
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		t.Fatalf("not one PEM request: %q", text)
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := req.CheckSignature(); err != nil || req.SignatureAlgorithm != x509.ECDSAWithSHA256 {
		t.Errorf("signature %v, %v", req.SignatureAlgorithm, err)
	}
	if pub, ok := req.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&key.PublicKey) || pub.Curve.Params().Name != "P-256" {
		t.Errorf("key %T", req.PublicKey)
	}
	if len(req.Subject.Names) != 0 || len(req.Extensions) != 1 || !req.Extensions[0].Critical || len(req.URIs) != 1 || req.URIs[0].String() != web.String() {
		t.Errorf("subject %v, extensions %v, URIs %v", req.Subject, req.Extensions, req.URIs)
	}
	other, _, err := certs.NewRequest(web)
	if err != nil || other.Equal(key) {
		t.Errorf("the same key twice (%v)", err)
	}
}

func TestRenewalAtHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(true)
		m := run(t, certs.Config{CA: g})
		first, err := m.Get(t.Context(), web, certs.RealTime)
		if err != nil {
			t.Fatal(err)
		}
		if g.calls[0].ttl != 24*time.Hour {
			t.Errorf("asked for %v", g.calls[0].ttl)
		}
		time.Sleep(12*time.Hour - 2*time.Second)
		synctest.Wait()
		if c, _ := m.Current(web); c != first {
			t.Error("renewed before half of its life")
		}
		g.Rotate()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		second, ok := m.Current(web)
		if !ok || second == first || second.Key().Equal(first.Key()) {
			t.Fatalf("after half of its life: %v, was %v", second, first)
		}
		if len(second.Roots) != 2 {
			t.Errorf("%d roots, want the new one and the old", len(second.Roots))
		}
		time.Sleep(60 * time.Hour)
		synctest.Wait()
		if n := len(g.asked()); n != 7 {
			t.Errorf("%d fetches in 72 h, want 7", n)
		}
	})
}

// A CA that dates back (istiod: two minutes) by more than it issues for makes
// certificates whose half-life is past when they come.
func TestShortLifeDoesNotHotLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(true)
		g.ttl, g.back = 10*time.Second, 2*time.Minute
		m := run(t, certs.Config{CA: g})
		if _, err := m.Get(t.Context(), web, certs.RealTime); err != nil {
			t.Fatal(err)
		}
		for range 60 {
			time.Sleep(time.Second)
			synctest.Wait()
			if _, ok := m.Current(web); !ok {
				t.Fatal("no certificate in between")
			}
		}
		if n := len(g.asked()); n < 10 || n > 20 {
			t.Errorf("%d fetches in a minute, want one in about 5 s", n)
		}
	})
}

func TestPriorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := run(t, certs.Config{CA: g, Concurrency: 2})
		get := func(n int, p certs.Priority) {
			go m.Get(t.Context(), id(n), p)
			synctest.Wait()
			time.Sleep(time.Millisecond)
		}
		get(0, certs.Background)
		get(1, certs.Background) // both places are taken
		get(2, certs.Background)
		get(3, certs.Warmup)
		get(4, certs.RealTime)
		m.Prefetch(id(5))
		get(6, certs.RealTime)
		get(7, certs.Warmup)
		get(2, certs.RealTime) // raised: the oldest of all
		get(6, certs.Background)
		get(7, certs.Background) // asking for less lowers nothing
		if got := g.asked(); len(got) != 2 {
			t.Fatalf("%d fetches at once, want 2", len(got))
		}
		want := []int{0, 1, 2, 4, 6, 3, 5, 7}
		for i := range want {
			g.release(g.asked()[i])
			synctest.Wait()
		}
		for i, n := range want {
			if got := g.asked()[i]; got != id(n) {
				t.Errorf("fetch %d was for %v, want %v", i, got, id(n))
			}
		}
	})
}

func TestEightFetchesAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := run(t, certs.Config{CA: g})
		for n := range 20 {
			m.Prefetch(id(n))
		}
		synctest.Wait()
		if n := len(g.asked()); n != 8 {
			t.Errorf("%d fetches at once, want 8", n)
		}
		g.release(g.asked()[0])
		synctest.Wait()
		if n := len(g.asked()); n != 9 {
			t.Errorf("%d fetches after one has ended, want 9", n)
		}
	})
}

var errDown = errors.New("the CA is down")

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(true)
		g.fail(errDown)
		m := run(t, certs.Config{CA: g})
		_, err := m.Get(t.Context(), web, certs.RealTime)
		if !errors.Is(err, errDown) || !errors.Is(err, certs.ErrUnavailable) {
			t.Errorf("Get: %v", err)
		}
		if _, err := m.Get(t.Context(), web, certs.RealTime); !errors.Is(err, errDown) || len(g.asked()) != 1 {
			t.Errorf("Get while unavailable: %v after %d fetches, want the last error and no fetch", err, len(g.asked()))
		}
		if s := state(m, web); !strings.HasPrefix(s, "Unavailable: ") || !strings.Contains(s, errDown.Error()) {
			t.Errorf("state %q", s)
		}
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		base := time.Second
		for i, p := range g.pauses() {
			if p < base*79/100 || p > base*121/100 {
				t.Errorf("pause %d is %v, want %v ±20 %%", i, p, base)
			}
			base = min(2*base, 150*time.Second)
		}
		g.fail(nil)
		time.Sleep(200 * time.Second)
		synctest.Wait()
		if _, ok := m.Current(web); !ok {
			t.Error("no certificate after the CA came back")
		}
		// The next failure starts from one second again.
		g.fail(errDown)
		time.Sleep(12*time.Hour + time.Minute)
		synctest.Wait()
		ps := g.pauses()
		i := slices.IndexFunc(ps, func(p time.Duration) bool { return p > time.Hour })
		if i < 0 || len(ps) < i+2 || ps[i+1] > 1300*time.Millisecond {
			t.Errorf("pauses %v: no reset after success", ps)
		}
	})
}

func TestRetryIsBounded(t *testing.T) {
	for n := 1; n < 200; n++ {
		if d := certs.RetryIn(n); d < 790*time.Millisecond || d > 180*time.Second {
			t.Errorf("after %d failures %v", n, d)
		}
	}
}

func TestOldCertificateServesWhileItIsValid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(true)
		m := run(t, certs.Config{CA: g, TTL: 10 * time.Minute})
		old, err := m.Get(t.Context(), web, certs.RealTime)
		if err != nil {
			t.Fatal(err)
		}
		g.fail(errDown)
		time.Sleep(10*time.Minute - 2*time.Second)
		synctest.Wait()
		if n := len(g.asked()); n < 3 {
			t.Errorf("%d fetches, want renewals to be tried", n)
		}
		if c, err := m.Get(t.Context(), web, certs.RealTime); err != nil || c != old {
			t.Errorf("Get = %v, %v, want the old certificate", c, err)
		}
		if s := m.Dump()[0]; s.State != "Available" || !errors.Is(s.Err, errDown) || s.Next.After(old.NotAfter) {
			t.Errorf("status %+v, want it available, with the error, and a try when it ends at the latest", s)
		}
		tries := len(g.asked())
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if _, ok := m.Current(web); ok {
			t.Error("Current returns an expired certificate")
		}
		if _, err := m.Get(t.Context(), web, certs.RealTime); !errors.Is(err, errDown) {
			t.Errorf("Get: %v", err)
		}
		if n := len(g.asked()); n == tries {
			t.Error("no try when the certificate ended")
		}
	})
}

func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := run(t, certs.Config{CA: g, Concurrency: 1})
		errs := make(chan error, 2)
		for n := range 2 { // one being fetched, one in the queue
			go func() {
				_, err := m.Get(t.Context(), id(n), certs.RealTime)
				errs <- err
			}()
			synctest.Wait()
		}
		m.Forget(id(0))
		m.Forget(id(1))
		m.Forget(id(2))
		for range 2 {
			if err := <-errs; !errors.Is(err, certs.ErrForgotten) {
				t.Errorf("waiter got %v", err)
			}
		}
		synctest.Wait()
		if got := g.asked(); len(got) != 1 || len(m.Dump()) != 0 {
			t.Errorf("fetched %v, left %v", got, m.Dump())
		}
		// The place of the dropped fetch is free again.
		go m.Get(t.Context(), id(0), certs.RealTime)
		synctest.Wait()
		g.release(id(0))
		synctest.Wait()
		if _, ok := m.Current(id(0)); !ok {
			t.Error("no certificate after asking again")
		}
		m.Forget(id(0))
		if _, ok := m.Current(id(0)); ok {
			t.Error("a forgotten certificate is current")
		}
		time.Sleep(24 * time.Hour)
		if n := len(g.asked()); n != 2 {
			t.Errorf("%d fetches: a forgotten identity is renewed", n)
		}
	})
}

func TestFetchHasADeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := run(t, certs.Config{CA: g})
		start := time.Now()
		_, err := m.Get(t.Context(), web, certs.RealTime)
		if took := time.Since(start); !errors.Is(err, certs.ErrUnavailable) || took != 20*time.Second {
			t.Errorf("Get: %v after %v", err, took)
		}
		if !strings.Contains(err.Error(), "no answer in time") {
			t.Errorf("%v does not say why", err)
		}
	})
}

func TestGetStopsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := run(t, certs.Config{CA: g})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := m.Get(ctx, web, certs.RealTime); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Get: %v", err)
		}
		g.release(web)
		synctest.Wait()
		if _, ok := m.Current(web); !ok {
			t.Error("the fetch ended with its waiter")
		}
	})
}

func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := run(t, certs.Config{CA: g, MaxIdentities: 3, MaxWaiters: 2})
		go m.Get(t.Context(), id(0), certs.RealTime)
		go m.Get(t.Context(), id(1), certs.RealTime)
		synctest.Wait()
		if _, err := m.Get(t.Context(), id(2), certs.RealTime); !errors.Is(err, certs.ErrBusy) {
			t.Errorf("third waiter: %v", err)
		}
		m.Prefetch(id(3))
		if _, err := m.Get(t.Context(), id(4), certs.RealTime); !errors.Is(err, certs.ErrBusy) {
			t.Errorf("fourth identity: %v", err)
		}
		if n := len(m.Dump()); n != 3 {
			t.Errorf("%d identities", n)
		}
		g.release(id(0))
		g.release(id(1))
		synctest.Wait()
		go m.Get(t.Context(), id(2), certs.RealTime)
		synctest.Wait()
		g.release(id(2))
		synctest.Wait()
		if _, ok := m.Current(id(2)); !ok {
			t.Error("the places of waiters were not given back")
		}
		if _, err := m.Get(t.Context(), identity.ID{}, certs.RealTime); !errors.Is(err, certs.ErrUnavailable) {
			t.Errorf("the zero identity: %v", err)
		}
	})
}

func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(false)
		m := certs.NewManager(certs.Config{CA: g, Concurrency: 1})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		errs := make(chan error, 2)
		for n := range 2 {
			go func() {
				_, err := m.Get(t.Context(), id(n), certs.RealTime)
				errs <- err
			}()
		}
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		for range 2 {
			if err := <-errs; !errors.Is(err, certs.ErrClosed) {
				t.Errorf("waiter got %v", err)
			}
		}
		if _, err := m.Get(t.Context(), web, certs.RealTime); !errors.Is(err, certs.ErrClosed) {
			t.Errorf("Get after the end: %v", err)
		}
		m.Prefetch(web)
		m.Forget(web)
		if err := m.Run(t.Context()); err == nil {
			t.Error("Run runs twice")
		}
	})
}

func TestRootsAreHeldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := certstest.New()
		m := run(t, certs.Config{CA: ca})
		get := func(n int) *certs.Certificate {
			t.Helper()
			c, err := m.Get(t.Context(), id(n), certs.RealTime)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		first, second := get(1), get(2)
		if first.Roots[0] != second.Roots[0] {
			t.Error("two identities of one CA have each their own copy of its root")
		}
		ca.Rotate()
		third := get(3)
		if got, want := third.Roots, ca.Roots(); len(got) != len(want) || !slices.EqualFunc(got, want, (*x509.Certificate).Equal) {
			t.Errorf("after a rotation there are %d roots, want the CA's %d", len(got), len(want))
		}
		if len(first.Roots) != 1 {
			t.Errorf("a certificate from before the rotation has %d roots, want 1", len(first.Roots))
		}
	})
}
