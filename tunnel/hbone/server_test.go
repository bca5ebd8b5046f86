package hbone_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/hbone/hbonetest"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A silent client takes a place among the handshakes, but not everyone's.
func TestServerBoundsHandshakes(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		var failed []error
		cert := b.ca.Issue(idB)
		s := hbone.NewServer(hbone.ServerConfig{
			Loop: b.loop, Handshakes: b.shakes, MaxHandshakes: 4, MaxPerSource: 3,
			TLS:    func(done func(*tls.Config, error)) func() { done(cert.ServerTLS(), nil); return nil },
			Handle: accept,
			Failed: func(_, _ netip.AddrPort, err error) { failed = append(failed, err) },
		})
		var conns []*hbonetest.Conn
		for _, from := range []string{"10.0.0.7:1", "10.0.0.7:2", "10.0.0.7:3", "10.0.0.7:4", "10.0.0.8:1", "10.0.0.8:2"} {
			c, end := newWire(t, b.loop, 64<<10)
			conns = append(conns, c)
			b.loop.Do(func() { s.Serve(end, netip.MustParseAddrPort(from), addrB) })
		}
		synctest.Wait()
		for _, i := range []int{3, 5} {
			if _, err := conns[i].Read(make([]byte, 1)); !errors.Is(err, splice.ErrReset) {
				t.Errorf("connection %d: %v, want a reset", i, err)
			}
		}
		b.loop.Do(func() {
			if len(failed) != 2 || !errors.Is(failed[0], hbone.ErrLimit) || s.Stats().Handshakes.Load() != 4 {
				t.Errorf("failed %v, %d handshakes", failed, s.Stats().Handshakes.Load())
			}
		})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if s.Stats().Handshakes.Load() != 0 || s.Stats().Conns.Load() != 0 {
			t.Errorf("%d handshakes, %d connections", s.Stats().Handshakes.Load(), s.Stats().Conns.Load())
		}
		b.loop.Do(s.Close)
	})
}

// The certificate may take its time; the connection may be gone by then.
func TestServerWaitsForItsCertificate(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		var ready []func(*tls.Config, error)
		cancelled := 0
		s := hbone.NewServer(hbone.ServerConfig{
			Loop: b.loop, Handshakes: b.shakes, Handle: accept,
			TLS: func(done func(*tls.Config, error)) func() {
				ready = append(ready, done)
				return func() { cancelled++ }
			},
		})
		b.loop.Do(func() {
			b.net.listeners[addrB] = func(end splice.End, remote netip.AddrPort) { s.Serve(end, remote, addrB) }
		})
		calls := b.connect(1, target())
		synctest.Wait()
		cfg := b.ca.Issue(idB).ServerTLS()
		b.loop.Do(func() { ready[0](cfg, nil) })
		b.wantAll(waited(calls), nil)

		none := errors.New("no certificate")
		c, end := newWire(t, b.loop, 64<<10)
		b.loop.Do(func() { s.Serve(end, addrA, addrB); ready[1](nil, none) })
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, splice.ErrReset) {
			t.Errorf("%v, want a reset", err)
		}
		c, end = newWire(t, b.loop, 64<<10)
		b.loop.Do(func() { s.Serve(end, addrA, addrB); s.Close() })
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, splice.ErrReset) || cancelled != 1 {
			t.Errorf("%v after %d cancels, want a reset after 1", err, cancelled)
		}
	})
}

func TestServerRefusesPlaintextAndNonsense(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		for _, hello := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x00\x05hello", "\x16\x03\x01\xff\xff"} {
			c, end := newWire(t, b.loop, 64<<10)
			b.loop.Do(func() { b.server.Serve(end, addrA, addrB) })
			_, _ = c.Write([]byte(hello))
			_ = c.CloseWrite()
			_, _ = io.ReadAll(c)
		}
		synctest.Wait()
		if got := b.server.Stats().HandshakeFails.Load(); got != 3 {
			t.Errorf("%d handshakes failed, want 3", got)
		}
	})
}

// A client that has said all it has to say is not a client that has gone.
func TestWatchIgnoresAHalfClose(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		var held *hbone.Incoming
		b.handle = func(in *hbone.Incoming) {
			held = in
			in.Watch(func(err error) { t.Errorf("gone: %v", err) })
		}
		calls := waited(b.connect(1, target()))
		b.loop.Do(func() { held.Refuse(503, hbone.ConnectionRefused) })
		synctest.Wait()
		var status *hbone.StatusError
		if !errors.As(calls[0].err, &status) {
			t.Errorf("err = %v", calls[0].err)
		}
	})
}

// Whatever bytes come instead of a handshake, the connection ends and nothing
// panics.
func FuzzServerHandshake(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{22, 3, 1, 0, 4, 1, 0, 0, 0})
	f.Add([]byte{21, 3, 3, 0, 2, 2, 40})
	f.Fuzz(func(t *testing.T, hello []byte) {
		synctest.Test(t, func(t *testing.T) {
			loop := splicetest.NewLoop()
			defer loop.Close()
			shakes := hbone.NewHandshakes(hbone.HandshakesConfig{})
			defer shakes.Close()
			wire, end := newWire(t, loop, 64<<10)
			done := make(chan error, 1)
			loop.Do(func() {
				shakes.Start(loop, end, hbone.AsServer, fuzzTLS(), addrB, addrA, func(_ *hbone.TLS, err error) { done <- err })
			})
			_, _ = wire.Write(hello)
			_ = wire.CloseWrite()
			if err := <-done; err == nil {
				t.Error("a handshake out of nothing")
			}
			_, _ = io.ReadAll(wire)
		})
	})
}

// fuzzTLS is made once: its times lie outside of any bubble, which does not
// matter before a certificate was looked at.
var fuzzTLS = sync.OnceValue(func() *tls.Config { return certstest.New().Issue(idB).ServerTLS() })
