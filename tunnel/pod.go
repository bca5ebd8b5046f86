package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/mesh"
)

// TunnelPort is where pods accept HBONE.
const TunnelPort = mesh.HBONEPort

// A Request is a SYN that has not been answered; *netstack.Request is one.
// Exactly one of Accept and Refuse must be called, on the loop.
type Request interface {
	Src() netip.AddrPort
	Dst() netip.AddrPort
	// Inbound is false for a connection that an app of the pod opens.
	Inbound() bool
	// Accept completes the handshake; done runs once, not before Accept has
	// returned.
	Accept(done func(splice.End, error))
	Refuse(netstack.Refusal)
}

// A Stack is a pod's TCP; *netstack.Stack is one.
type Stack interface {
	hbone.Dialer
	Loop() splice.Loop
}

// A Mesh is where a Pod reads the world; *mesh.Store is one.
type Mesh interface {
	Snapshot() *mesh.Snapshot
	OnChange(wake func()) (stop func())
}

var (
	_ Request = (*netstack.Request)(nil)
	_ Stack   = (*netstack.Stack)(nil)
	_ Mesh    = (*mesh.Store)(nil)
)

// A Prefetcher is a CertSource that can be told which identity is wanted soon.
type Prefetcher interface{ Prefetch(identity.ID) }

// Workload names a pod's workload as the control plane does.
type Workload struct{ Name, Namespace, ServiceAccount string }

// String is namespace/name, for logs.
func (w Workload) String() string { return w.Namespace + "/" + w.Name }

// Config is what a Pod needs. Workload, Addrs, Stack, Mesh, Certs, Handshakes
// and Recorder are required.
type Config struct {
	Workload   Workload
	Addrs      []netip.Addr // the pod's, as its stack has them; see SetAddrs
	Stack      Stack
	Mesh       Mesh
	Certs      hbone.CertSource
	Handshakes *hbone.Handshakes // shared by all pods
	Recorder   Recorder
	// Neighbours are the pods of this process, this one among them, to be
	// reached in memory. Nil: every tunnel goes through the network.
	Neighbours *Neighbours
	// Revocations end live connections to peers that are revoked; Certs' have the
	// same. Nil: nobody is.
	Revocations *certs.Revocations
	Log         *slog.Logger // default: nothing is logged

	// PolicyLog takes every decision of a policy, at Debug, or at Info if
	// PolicyInfo is set. Default: Log.
	PolicyLog  *slog.Logger
	PolicyInfo bool

	// NoResponseBaggage leaves the baggage out of answers and does not believe
	// that of requests.
	NoResponseBaggage bool
	// ProxyPorts are the proxy's own ports, which nobody may reach. Default
	// 15001, 15006, 15008.
	ProxyPorts []uint16

	// H2Client and H2Server are for the tunnels of either direction.
	H2Client, H2Server h2.Config
	Limits             Limits
	Timeouts           Timeouts
}

// Limits bound what one pod can cost. A zero field means its default.
type Limits struct {
	Conns      int // live and pending; 32768
	Pending    int // not yet accepted; 4096
	Tunnels    int // connections to peers, and from peers; 500 and 2048
	Handshakes int // with peers that dialled, at once; 64
	Dials      int // to peers, at once; 32
}

// Timeouts bound every wait. A zero field means its default.
type Timeouts struct {
	Workload    time.Duration // for the control plane to tell who the pod is; 5 s
	Certificate time.Duration // for the pod's own certificate; 5 s
	Connect     time.Duration // TCP; 10 s
	Answer      time.Duration // of a peer to a CONNECT; 16 s
	Idle        time.Duration // of a tunnel without connections; 5 min
}

func (c *Config) setDefaults() {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.PolicyLog == nil {
		c.PolicyLog = c.Log
	}
	if c.ProxyPorts == nil {
		c.ProxyPorts = []uint16{15001, 15006, TunnelPort}
	}
	for _, n := range []struct {
		v   *int
		def int
	}{{&c.Limits.Conns, 32768}, {&c.Limits.Pending, 4096}} {
		if *n.v <= 0 {
			*n.v = n.def
		}
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&c.Timeouts.Workload, 5 * time.Second},
		{&c.Timeouts.Certificate, 5 * time.Second},
		{&c.Timeouts.Connect, 10 * time.Second},
		{&c.Timeouts.Answer, 16 * time.Second},
	} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
}

// Validate names every problem of the configuration.
func (c *Config) Validate() error {
	var errs []error
	for name, missing := range map[string]bool{
		"Workload.Name": c.Workload.Name == "", "Addrs": len(c.Addrs) == 0, "Stack": c.Stack == nil, "Mesh": c.Mesh == nil,
		"Certs": c.Certs == nil, "Handshakes": c.Handshakes == nil, "Recorder": c.Recorder == nil,
	} {
		if missing {
			errs = append(errs, fmt.Errorf("tunnel: config: %s is missing", name))
		}
	}
	return errors.Join(errs...)
}

// A Pod answers what one pod's edges ask.
type Pod struct {
	// Set by NewPod, read-only after.
	cfg  Config
	loop splice.Loop
	log  *slog.Logger
	// policyLog is asked before a line for it is made.
	policyLog *slog.Logger
	addrs     atomic.Pointer[[]netip.Addr] // written by SetAddrs
	certs     *hbone.Certificates
	pool      *hbone.Pool
	peers     *hbone.Server
	stats     Stats
	memory    *splice.Budget // of streams to neighbours

	quit      chan struct{} // closed by Close
	quitOnce  sync.Once
	stopWatch func()
	stopLists func()      // no more calls of listsChanged
	changed   atomic.Bool // onMesh is posted
	relisted  atomic.Bool // onLists is posted

	// Owned by the loop.
	self     *self
	awaiting map[*await]struct{} // who wait for the workload
	conns    map[*conn]struct{}
	pending  int
	recheck  recheck
	// published is the workload's UID under which Neighbours has the pod.
	published string
	proofs    proofs
	draining  bool
	closed    bool
	drained   []chan<- struct{} // closed when the last connection has ended
}

// Stats count what a Pod does. They may be read from anywhere.
type Stats struct {
	Live    atomic.Int64  // connections, pending ones included
	Pending atomic.Int64  // not yet accepted
	Limited atomic.Uint64 // refused by a limit
	Cut     atomic.Uint64 // live connections cut by a policy or the workload's end
	Checks  atomic.Uint64 // policy checks, those of live connections included
	// SameNode are the connections to neighbours that were handed over in memory.
	SameNode atomic.Uint64
}

// NewPod returns a Pod that is ready for its stack's requests. Close must be
// called.
func NewPod(cfg Config) (*Pod, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	p := &Pod{
		cfg:  cfg,
		loop: cfg.Stack.Loop(),
		log:  cfg.Log, policyLog: cfg.PolicyLog,
		quit:     make(chan struct{}),
		awaiting: make(map[*await]struct{}),
		conns:    make(map[*conn]struct{}),
		self:     &self{},
	}
	p.SetAddrs(cfg.Addrs)
	p.certs = hbone.NewCertificates(p.loop, cfg.Certs, cfg.Timeouts.Certificate)
	p.pool = hbone.NewPool(hbone.PoolConfig{
		Loop:          p.loop,
		Dialer:        cfg.Stack,
		Handshakes:    cfg.Handshakes,
		Certificates:  p.certs,
		Revocations:   cfg.Revocations,
		H2:            cfg.H2Client,
		DialTimeout:   cfg.Timeouts.Connect,
		AnswerTimeout: cfg.Timeouts.Answer,
		IdleTimeout:   cfg.Timeouts.Idle,
		MaxConns:      cfg.Limits.Tunnels,
		MaxDials:      cfg.Limits.Dials,
		MaxWaiters:    cfg.Limits.Pending,
	})
	p.peers = hbone.NewServer(hbone.ServerConfig{
		Loop:          p.loop,
		Handshakes:    cfg.Handshakes,
		TLS:           p.serverTLS,
		Revocations:   cfg.Revocations,
		H2:            cfg.H2Server,
		Handle:        p.handleConnect,
		Failed:        p.tunnelFailed,
		Idle:          p.checkDrained,
		MaxConns:      cfg.Limits.Tunnels,
		MaxHandshakes: cfg.Limits.Handshakes,
	})
	if cfg.Neighbours != nil {
		p.memory = splice.NewBudget(podMemory, cfg.Neighbours.memory)
	}
	p.stopWatch = cfg.Mesh.OnChange(p.meshChanged)
	p.meshChanged()
	p.stopLists = cfg.Revocations.OnChange(p.listsChanged)
	return p, nil
}

// SetAddrs says which addresses the pod has now, as its stack does. Connections
// live on. It may be called from anywhere.
func (p *Pod) SetAddrs(addrs []netip.Addr) {
	own := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		own = append(own, a.Unmap().WithZone(""))
	}
	p.addrs.Store(&own)
}

// Stats returns the counters of the pod, of its tunnels to peers and of those
// from peers.
func (p *Pod) Stats() (*Stats, *hbone.PoolStats, *hbone.ServerStats) {
	return &p.stats, p.pool.Stats(), p.peers.Stats()
}

// HandleTCP answers a SYN; not while the pod drains, so that its sender repeats
// it and whoever serves the pod next answers.
func (p *Pod) HandleTCP(r Request) {
	switch {
	case p.draining:
		r.Refuse(Draining.Refusal())
	case r.Inbound():
		p.handlePlain(r)
	default:
		p.handleOutbound(r)
	}
}

// HandleTunnel serves a connection that a peer opened to TunnelPort.
func (p *Pod) HandleTunnel(end splice.End, remote, local netip.AddrPort) {
	p.peers.Serve(end, remote, local)
}

// Drain answers no more SYNs, asks peers to open no more streams, and returns
// when the last connection and the last peer's tunnel have ended, or with ctx's
// cause. Streams and tunnels that were under way when the peer was asked are
// still served: stop the stack from accepting first, or there is no end of them. It may
// be called from any goroutine but the loop's.
func (p *Pod) Drain(ctx context.Context) error {
	done := make(chan struct{})
	p.loop.Post(func() {
		if !p.draining {
			p.draining = true
			p.publish()
			p.pool.Drain()
			p.peers.Drain()
		}
		p.drained = append(p.drained, done)
		p.checkDrained()
	})
	select {
	case <-done:
		return nil
	case <-p.quit:
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("tunnel: drain %v: %w", p.cfg.Workload, context.Cause(ctx))
	}
}

// ErrClosed is what a closed Pod's methods return.
var ErrClosed = errors.New("tunnel: pod is closed")

// closeTimeout bounds how long Close waits for the loop, which may have ended.
const closeTimeout = 5 * time.Second

// Close cuts every connection and returns when the pod's goroutines are gone.
// It may be called from any goroutine but the loop's, more than once, and must
// come before the end of the loop.
func (p *Pod) Close() {
	p.quitOnce.Do(func() {
		done := make(chan struct{})
		p.loop.Post(func() { p.teardown(); close(done) })
		close(p.quit)
		p.stopWatch()
		p.stopLists()
		p.certs.Close()
		timer := time.NewTimer(closeTimeout)
		defer timer.Stop()
		select {
		case <-done:
		case <-timer.C:
		}
	})
	p.certs.Wait()
}

func (p *Pod) teardown() {
	p.closed = true
	p.publish()
	for c := range p.conns {
		c.cut(Closed, nil)
	}
	for a := range p.awaiting {
		a.stop()
	}
	clear(p.awaiting)
	p.pool.Close()
	p.peers.Close()
	p.checkDrained()
}

func (p *Pod) checkDrained() {
	if len(p.drained) == 0 || len(p.conns) > 0 || p.peers.Stats().Conns.Load() > 0 {
		return
	}
	for _, done := range p.drained {
		close(done)
	}
	p.drained = nil
}

// A Live is a connection that has not ended, as of the moment it was asked for.
type Live struct {
	Record
	Accepted bool
}

// Connections returns the connections that have been counted and not closed,
// with the bytes moved so far. It may be called from any goroutine but the
// loop's.
func (p *Pod) Connections(ctx context.Context) ([]Live, error) {
	result := make(chan []Live, 1)
	p.loop.Post(func() {
		list := make([]Live, 0, len(p.conns))
		for c := range p.conns {
			if c.opened {
				l := Live{Record: c.rec, Accepted: c.join != nil}
				l.Duration = time.Since(l.Start)
				if c.join != nil {
					l.setBytes(c.join.Counts())
				}
				list = append(list, l)
			}
		}
		result <- list
	})
	select {
	case list := <-result:
		return list, nil
	case <-p.quit:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, fmt.Errorf("tunnel: connections of %v: %w", p.cfg.Workload, context.Cause(ctx))
	}
}

// Report tells the Recorder, if it is a Progresser, how far the connections are,
// and returns when it has been told of all, or with ctx's cause. It may be called
// from any goroutine but the loop's.
func (p *Pod) Report(ctx context.Context) error {
	r, ok := p.cfg.Recorder.(Progresser)
	if !ok {
		return nil
	}
	done := make(chan struct{})
	p.loop.Post(func() {
		list := make([]*conn, 0, len(p.conns))
		for c := range p.conns {
			if c.opened && c.join != nil {
				list = append(list, c)
			}
		}
		p.report(r, list, done)
	})
	select {
	case <-done:
		return nil
	case <-p.quit:
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("tunnel: report of %v: %w", p.cfg.Workload, context.Cause(ctx))
	}
}

// report tells of one turn's worth and comes again for the rest.
func (p *Pod) report(r Progresser, list []*conn, done chan<- struct{}) {
	now := list[:min(recheckTurn, len(list))]
	for _, c := range now {
		if !c.over {
			c.rec.setBytes(c.join.Counts())
			r.Progress(&c.rec)
		}
	}
	if list = list[len(now):]; len(list) > 0 {
		p.loop.Post(func() { p.report(r, list, done) })
		return
	}
	close(done)
}

// isProxyPort reports whether port is one of the proxy's own.
func (p *Pod) isProxyPort(port uint16) bool { return slices.Contains(p.cfg.ProxyPorts, port) }

// isSelf reports whether a is the pod's address.
func (p *Pod) isSelf(a netip.Addr) bool { return slices.Contains(*p.addrs.Load(), a) }

// source returns the pod's address to dial dst from: the one the app chose if
// it can be, else the pod's first of the family.
func (p *Pod) source(app, dst netip.Addr) (netip.Addr, bool) {
	if app.Is4() == dst.Is4() && p.isSelf(app) {
		return app, true
	}
	for _, a := range *p.addrs.Load() {
		if a.Is4() == dst.Is4() {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// canonical turns IPv4 in IPv6 into IPv4 and drops a zone.
func canonical(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
