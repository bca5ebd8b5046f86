package hbone_test

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"crypto/tls"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A network delivers dials, on one loop, to whoever listens.
type network struct {
	loop      *splicetest.Loop
	listeners map[netip.AddrPort]func(end splice.End, remote netip.AddrPort)
	dials     int
	port      uint16
	ends      []*splicetest.PipeEnd // of the accepting sides
}

func newNetwork(loop *splicetest.Loop) *network {
	return &network{loop: loop, listeners: make(map[netip.AddrPort]func(splice.End, netip.AddrPort)), port: 30000}
}

// Dial implements hbone.Dialer. Nobody at the address is a refusal; a nil
// listener never answers.
func (n *network) Dial(src, dst netip.AddrPort, timeout time.Duration, done func(splice.End, error)) (cancel func()) {
	n.dials++
	stopped := false
	stop := func() { stopped = true }
	listen, ok := n.listeners[dst]
	switch {
	case !ok:
		n.loop.Post(func() {
			if !stopped {
				done(nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED))
			}
		})
	case listen == nil:
		return n.loop.AfterFunc(timeout, func() { done(nil, fmt.Errorf("dial: %w", syscall.ETIMEDOUT)) })
	default:
		n.port++
		from := netip.AddrPortFrom(src.Addr(), n.port)
		n.loop.Post(func() {
			if stopped {
				return
			}
			ours, theirs := splicetest.Pipe(n.loop, 64<<10)
			n.ends = append(n.ends, theirs)
			listen(theirs, from)
			done(ours, nil)
		})
	}
	return stop
}

// certSource holds certificates that can be changed.
type certSource struct {
	mu    sync.Mutex
	certs map[identity.ID]*certs.Certificate
	gets  int
	wait  chan struct{} // Get waits for it; nil: not
}

func (s *certSource) Current(id identity.ID) (*certs.Certificate, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.certs[id]
	return c, ok
}

func (s *certSource) Get(ctx context.Context, id identity.ID, _ certs.Priority) (*certs.Certificate, error) {
	s.mu.Lock()
	s.gets++
	wait := s.wait
	s.mu.Unlock()
	if wait != nil {
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if c, ok := s.Current(id); ok {
		return c, nil
	}
	return nil, certs.ErrUnavailable
}

func (s *certSource) set(c *certs.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.certs[c.ID] = c
}

// A bench is a pool of identity a and servers, on one loop.
type bench struct {
	t      testing.TB
	loop   *splicetest.Loop
	net    *network
	ca     *certstest.CA
	shakes *hbone.Handshakes
	source *certSource
	certs  *hbone.Certificates
	pool   *hbone.Pool
	server *hbone.Server // at addrB, as idB
	handle func(*hbone.Incoming)
}

func newBench(t testing.TB, edit func(*hbone.PoolConfig)) *bench {
	b := &bench{t: t, loop: splicetest.NewLoop(), ca: certstest.New(), shakes: hbone.NewHandshakes(hbone.HandshakesConfig{})}
	b.net = newNetwork(b.loop)
	b.source = &certSource{certs: make(map[identity.ID]*certs.Certificate)}
	b.source.set(b.ca.Issue(idA))
	b.certs = hbone.NewCertificates(b.loop, b.source, 5*time.Second)
	cfg := hbone.PoolConfig{Loop: b.loop, Dialer: b.net, Handshakes: b.shakes, Certificates: b.certs}
	if edit != nil {
		edit(&cfg)
	}
	b.pool = hbone.NewPool(cfg)
	b.handle = accept
	b.server = b.serve(addrB, idB, func(in *hbone.Incoming) { b.handle(in) }, h2.Config{})
	t.Cleanup(func() {
		b.loop.Do(func() { b.pool.Close(); b.server.Close() })
		b.certs.Close()
		b.certs.Wait()
		b.shakes.Close()
		b.loop.Close()
	})
	return b
}

// serve listens at addr as id.
func (b *bench) serve(addr netip.AddrPort, id identity.ID, handle func(*hbone.Incoming), cfg h2.Config) *hbone.Server {
	cert := b.ca.Issue(id)
	s := hbone.NewServer(hbone.ServerConfig{
		Loop: b.loop, Handshakes: b.shakes, H2: cfg, Handle: handle,
		TLS: func(done func(*tls.Config, error)) func() { done(cert.ServerTLS(), nil); return nil },
	})
	b.loop.Do(func() {
		b.net.listeners[addr] = func(end splice.End, remote netip.AddrPort) { s.Serve(end, remote, addr) }
	})
	return s
}

// accept answers 200 and echoes.
func accept(in *hbone.Incoming) {
	end, err := in.Accept(nil)
	if err != nil {
		return
	}
	echo(end)
}

// echo sends back what end delivers, and ends as it does.
func echo(end splice.End) {
	buf := make([]byte, 4096)
	closed := false
	end.Notify(func() {
		for !closed {
			n, err := end.Read(buf)
			if n > 0 {
				_, _ = end.Write(buf[:n])
				continue
			}
			if err == splice.ErrAgain {
				return
			}
			closed = true
			_ = end.CloseWrite()
			end.Close()
		}
	})
}

// A call is one Connect and its outcome.
type call struct {
	tunnel *hbone.Tunnel
	err    error
	done   bool
	cancel func()
}

func target() hbone.Target {
	return hbone.Target{Local: idA, Peer: "uid-b", Want: []identity.ID{idB}, Src: addrA.Addr(), Dst: addrB}
}

// connect starts n Connects at once.
func (b *bench) connect(n int, to hbone.Target) []*call {
	return b.connectAnd(n, to, func([]*call) {})
}

// connectAnd is connect followed by then, before anything else happens.
func (b *bench) connectAnd(n int, to hbone.Target, then func([]*call)) []*call {
	calls := make([]*call, n)
	b.loop.Do(func() {
		for i := range calls {
			c := &call{}
			calls[i] = c
			c.cancel = b.pool.Connect(to, &hbone.Connect{Authority: "10.0.0.2:8080", Client: addrA}, func(t *hbone.Tunnel, err error) {
				if c.done {
					b.t.Error("answered twice")
				}
				c.tunnel, c.err, c.done = t, err, true
			})
			if c.done {
				b.t.Error("answered before Connect has returned")
			}
		}
		then(calls)
	})
	return calls
}

// end closes the tunnels of calls cleanly.
func (b *bench) end(calls []*call) {
	b.loop.Do(func() {
		for _, c := range calls {
			if c.tunnel != nil {
				s := c.tunnel.Stream
				_ = s.CloseWrite()
				s.Notify(func() {
					if _, err := s.Read(make([]byte, 64)); err != splice.ErrAgain {
						s.Close()
					}
				})
			}
		}
	})
}

// count returns how many calls got a tunnel, and how many an error.
func count(calls []*call) (ok, failed int) {
	for _, c := range calls {
		switch {
		case c.tunnel != nil:
			ok++
		case c.err != nil:
			failed++
		}
	}
	return ok, failed
}
