package tunnel_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/mesh"
	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

// A world is a mesh in memory: pods joined by a network that loses nothing.
type world struct {
	t      testing.TB
	path   path
	store  *mesh.Store
	ca     *certstest.CA
	certs  *certSource
	shakes *hbone.Handshakes
	loops  []*splicetest.Loop
	joins  *tunnel.Neighbours   // nil: none
	edit   func(*tunnel.Config) // for pods made from now on

	// mu guards the fields below.
	mu     sync.Mutex
	pods   map[netip.Addr]*pod
	hosts  map[netip.AddrPort]func(*app) // outside of the mesh
	silent map[netip.AddrPort]bool       // answers nothing
	raw    map[netip.AddrPort]func(splice.End)
	ends   []splice.End // of tunnels, the accepting sides
}

// A path is the way that streams take from pod to pod.
type path struct {
	name  string
	joins bool // in memory
	apart bool // each pod has a loop of its own
}

// paths are what every test runs through: nobody may be able to tell them
// apart, but by the tunnels dialled and Record.SameNode.
var paths = []path{{name: "wire"}, {name: "wire, two loops", apart: true}, {name: "joined", joins: true}, {name: "joined, two loops", joins: true, apart: true}}

// inWorld runs test in a fresh world for each path, under synctest.
func inWorld(t *testing.T, test func(w *world)) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(newWorld(t, p)) })
		})
	}
}

func newWorld(t testing.TB, p path) *world {
	w := &world{
		t:      t,
		path:   p,
		store:  mesh.NewStore(mesh.Config{}),
		ca:     certstest.New(),
		shakes: hbone.NewHandshakes(hbone.HandshakesConfig{}),
		pods:   make(map[netip.Addr]*pod),
		hosts:  make(map[netip.AddrPort]func(*app)),
		silent: make(map[netip.AddrPort]bool),
	}
	if p.joins {
		w.joins = tunnel.NewNeighbours()
	}
	w.certs = &certSource{ca: w.ca, have: make(map[identity.ID]*certs.Certificate)}
	t.Cleanup(func() {
		for _, p := range w.pods {
			p.Close()
		}
		w.shakes.Close()
		for _, l := range w.loops {
			l.Close()
		}
	})
	return w
}

// loop returns the loop for one more pod.
func (w *world) loop() *splicetest.Loop {
	if len(w.loops) == 0 || w.path.apart {
		w.loops = append(w.loops, splicetest.NewLoop())
	}
	return w.loops[len(w.loops)-1]
}

// silence makes an address answer nothing.
func (w *world) silence(addr string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.silent[netip.MustParseAddrPort(addr)] = true
}

// wantTunnels checks how many tunnels were dialled so far; streams in memory
// need none.
func (w *world) wantTunnels(n int) {
	w.t.Helper()
	if w.path.joins {
		n = 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.ends) != n {
		w.t.Errorf("%d tunnels were dialled, want %d", len(w.ends), n)
	}
}

// wire is a connection between two loops.
func wire(x, y *splicetest.Loop) (a, b splice.End) {
	if x == y {
		return splicetest.Pipe(x, 64<<10)
	}
	return splice.Pipe(x, y, nil, nil)
}

// certSource issues what it is asked for, unless it is told not to.
type certSource struct {
	ca    *certstest.CA
	lists *certs.Revocations // of what it issues; nil: none

	mu      sync.Mutex
	have    map[identity.ID]*certs.Certificate
	refuses bool
	hangs   bool
}

func (s *certSource) Current(id identity.ID) (*certs.Certificate, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.have[id]
	return c, ok
}

// Prefetch implements tunnel.Prefetcher.
func (s *certSource) Prefetch(id identity.ID) {
	s.mu.Lock()
	hangs := s.hangs
	s.mu.Unlock()
	if !hangs {
		_, _ = s.Get(context.Background(), id, certs.Warmup)
	}
}

func (s *certSource) Get(ctx context.Context, id identity.ID, _ certs.Priority) (*certs.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hangs {
		s.mu.Unlock()
		<-ctx.Done()
		s.mu.Lock()
		return nil, ctx.Err()
	}
	if s.refuses {
		return nil, certs.ErrUnavailable
	}
	if s.have[id] == nil {
		s.have[id] = s.ca.Issue(id).WithRevocations(s.lists)
	}
	return s.have[id], nil
}

// renew forgets the certificate of id and issues another.
func (s *certSource) renew(id identity.ID) {
	s.mu.Lock()
	delete(s.have, id)
	s.mu.Unlock()
	s.Prefetch(id)
}

// put tells the mesh of workloads, services and policies.
func (w *world) put(messages ...proto.Message) {
	w.t.Helper()
	for _, m := range messages {
		switch m := m.(type) {
		case *workloadapi.Workload:
			w.apply(w.store.Addresses(), m.Uid, &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: m}})
		case *workloadapi.Service:
			w.apply(w.store.Addresses(), m.Namespace+"/"+m.Hostname, &workloadapi.Address{Type: &workloadapi.Address_Service{Service: m}})
		case *securityapi.Authorization:
			w.apply(w.store.Authorizations(), m.Namespace+"/"+m.Name, m)
		default:
			w.t.Fatalf("put %T", m)
		}
	}
}

func (w *world) apply(h xds.Handler, name string, m proto.Message) {
	w.t.Helper()
	body, err := proto.Marshal(m)
	if err != nil {
		w.t.Fatal(err)
	}
	if rejected := h.Apply([]xds.Resource{{Name: name, Body: body}}, nil); len(rejected) > 0 {
		w.t.Fatal(rejected)
	}
}

// A pod is a Pod and what surrounds it.
type pod struct {
	*tunnel.Pod
	w        *world
	loop     *splicetest.Loop
	addr     netip.Addr
	workload *workloadapi.Workload
	listen   map[uint16]func(*app)
	records  *recorder
}

// workload describes a pod that speaks HBONE.
func workload(name, ip string) *workloadapi.Workload {
	return &workloadapi.Workload{
		Uid:               "Kubernetes//Pod/default/" + name,
		Name:              name,
		Namespace:         "default",
		ServiceAccount:    name,
		TrustDomain:       "cluster.local",
		ClusterId:         "Kubernetes",
		WorkloadName:      name,
		WorkloadType:      workloadapi.WorkloadType_DEPLOYMENT,
		CanonicalName:     name,
		CanonicalRevision: "v1",
		TunnelProtocol:    workloadapi.TunnelProtocol_HBONE,
		Addresses:         [][]byte{netip.MustParseAddr(ip).AsSlice()},
		Capacity:          wrapperspb.UInt32(1),
	}
}

// pod starts a pod that the mesh knows.
func (w *world) pod(name, ip string) *pod {
	p := w.start(name, ip)
	w.put(p.workload)
	synctest.Wait()
	return p
}

// start starts a pod that the mesh does not know yet.
func (w *world) start(name, ip string) *pod {
	w.t.Helper()
	p := &pod{w: w, loop: w.loop(), addr: netip.MustParseAddr(ip), workload: workload(name, ip), listen: make(map[uint16]func(*app)), records: &recorder{t: w.t}}
	cfg := tunnel.Config{
		Workload: tunnel.Workload{Name: name, Namespace: "default", ServiceAccount: name},
		Addrs:    []netip.Addr{p.addr}, Stack: stack{w, p}, Mesh: w.store, Certs: w.certs, Handshakes: w.shakes, Recorder: p.records,
		Neighbours: w.joins,
	}
	if w.edit != nil {
		w.edit(&cfg)
	}
	var err error
	if p.Pod, err = tunnel.NewPod(cfg); err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods[p.addr] = p
	return p
}

// serve makes the pod's app listen.
func (p *pod) serve(port uint16, handle func(*app)) {
	p.loop.Do(func() { p.listen[port] = handle })
}

// A stack is a pod's TCP.
type stack struct {
	w *world
	p *pod
}

func (s stack) Loop() splice.Loop { return s.p.loop }

func (s stack) Dial(src, dst netip.AddrPort, timeout time.Duration, done func(splice.End, error)) (cancel func()) {
	s.w.mu.Lock()
	silent := s.w.silent[dst]
	s.w.mu.Unlock()
	if silent {
		return s.p.loop.AfterFunc(timeout, func() { done(nil, fmt.Errorf("dial: %w", syscall.ETIMEDOUT)) })
	}
	stopped := false
	s.p.loop.Post(func() {
		if !stopped {
			s.connect(src, dst, done)
		}
	})
	return func() { stopped = true }
}

// connect delivers a SYN.
func (s stack) connect(src, dst netip.AddrPort, done func(splice.End, error)) {
	w, loop := s.w, s.p.loop
	w.mu.Lock()
	raw, target, handle := w.raw[dst], w.pods[dst.Addr()], w.hosts[dst]
	w.mu.Unlock()
	switch {
	case raw != nil:
		ours, theirs := splicetest.Pipe(loop, 64<<10)
		raw(theirs)
		done(ours, nil)
		return
	case target == s.p && src.Addr() == dst.Addr():
		done(nil, fmt.Errorf("dial: the kernel answered over lo"))
		return
	case target == s.p:
		handle = target.listen[dst.Port()]
	case target != nil && dst.Port() == tunnel.TunnelPort:
		ours, theirs := wire(loop, target.loop)
		w.mu.Lock()
		w.ends = append(w.ends, theirs)
		w.mu.Unlock()
		target.loop.Post(func() { target.HandleTunnel(theirs, netip.AddrPortFrom(src.Addr(), 50000), dst) })
		done(ours, nil)
		return
	case target != nil:
		r := &request{pod: target, from: loop, src: netip.AddrPortFrom(src.Addr(), 50001), dst: dst, inbound: true}
		r.answer = func(end splice.End, how netstack.Refusal) {
			if end == nil {
				done(nil, fmt.Errorf("dial: %w", errnos[how]))
				return
			}
			done(end, nil)
		}
		target.loop.Post(func() { target.HandleTCP(r) })
		return
	}
	if handle == nil {
		err := syscall.ECONNREFUSED
		if target == nil {
			err = syscall.EHOSTUNREACH
		}
		done(nil, fmt.Errorf("dial: %w", err))
		return
	}
	ours, theirs := splicetest.Pipe(loop, 64<<10)
	handle(newApp(w, loop, theirs, src))
	done(ours, nil)
}

var errnos = map[netstack.Refusal]error{
	netstack.RefuseReset: syscall.ECONNREFUSED, netstack.RefuseUnreachable: syscall.EHOSTUNREACH,
	netstack.RefuseProhibited: syscall.EHOSTUNREACH, netstack.RefuseSilent: syscall.ETIMEDOUT,
}

// A request is a SYN.
type request struct {
	pod      *pod             // whose stack has it
	from     *splicetest.Loop // of who sent it
	src, dst netip.AddrPort
	inbound  bool
	answered bool
	answer   func(splice.End, netstack.Refusal) // runs on from
}

func (r *request) Src() netip.AddrPort { return r.src }
func (r *request) Dst() netip.AddrPort { return r.dst }
func (r *request) Inbound() bool       { return r.inbound }

func (r *request) once() {
	if r.answered {
		r.pod.w.t.Error("a request was answered twice")
	}
	r.answered = true
}

func (r *request) Accept(done func(splice.End, error)) {
	r.once()
	theirs, ours := wire(r.from, r.pod.loop)
	r.from.Post(func() { r.answer(theirs, 0) })
	r.pod.loop.Post(func() { done(ours, nil) })
}

func (r *request) Refuse(how netstack.Refusal) {
	r.once()
	r.from.Post(func() { r.answer(nil, how) })
}

// handle makes the pod answer r, on its loop.
func (p *pod) handle(r *request) {
	r.pod, r.from = p, p.loop
	p.loop.Do(func() { p.HandleTCP(r) })
}

// An app is one end of an app's connection: it reads all there is.
type app struct {
	w       *world
	loop    *splicetest.Loop
	end     splice.End
	from    netip.AddrPort // whom a server sees
	got     []byte
	eof     bool
	err     error // a reset
	refused error // a client was
	echo    bool
	hold    bool // does not read
}

func newApp(w *world, loop *splicetest.Loop, end splice.End, from netip.AddrPort) *app {
	a := &app{w: w, loop: loop, end: end, from: from}
	end.Notify(a.ready)
	return a
}

func (a *app) ready() {
	buf := make([]byte, 64<<10)
	for !a.eof && a.err == nil && !a.hold {
		n, err := a.end.Read(buf)
		a.got = append(a.got, buf[:n]...)
		if a.echo {
			_, _ = a.end.Write(buf[:n])
		}
		switch {
		case errors.Is(err, splice.ErrAgain):
			return
		case err == io.EOF:
			a.eof = true
			if a.echo {
				_ = a.end.CloseWrite()
			}
		case err != nil:
			a.err = err
		}
	}
}

// echoes is an app that sends back what it gets.
func echoes(a *app) { a.echo = true }

// dial makes the pod's app connect. Its outcome is known after synctest.Wait.
func (p *pod) dial(dst string) *app {
	a := &app{w: p.w, loop: p.loop}
	p.handle(&request{src: netip.AddrPortFrom(p.addr, 40000), dst: netip.MustParseAddrPort(dst), answer: a.answered})
	return a
}

// plaintext makes somebody in the network connect to the pod, and waits for the
// outcome.
func (p *pod) plaintext(src, dst string) *app {
	a := &app{w: p.w, loop: p.loop}
	p.handle(&request{src: netip.MustParseAddrPort(src), dst: netip.MustParseAddrPort(dst), inbound: true, answer: a.answered})
	synctest.Wait()
	return a
}

// call dials and waits for the outcome.
func (p *pod) call(dst string) *app {
	a := p.dial(dst)
	synctest.Wait()
	return a
}

func (a *app) send(s string) {
	a.loop.Do(func() {
		if n, err := a.end.Write([]byte(s)); n != len(s) {
			a.w.t.Errorf("send: %v", err)
		}
	})
	synctest.Wait()
}

func (a *app) closeWrite() {
	a.loop.Do(func() { _ = a.end.CloseWrite() })
	synctest.Wait()
}

func (a *app) reset() {
	a.loop.Do(func() { a.end.Reset(errors.New("test")) })
	synctest.Wait()
}

// want checks what the app has seen so far: its bytes, then "open", "eof",
// "reset" or the error of its connect.
func (a *app) want(got, state string) {
	a.w.t.Helper()
	var is, all string
	a.loop.Do(func() {
		all = string(a.got)
		switch {
		case a.refused != nil:
			is = a.refused.Error()
		case a.end == nil:
			is = "pending"
		case errors.Is(a.err, splice.ErrReset):
			is = "reset"
		case a.err != nil:
			is = a.err.Error()
		case a.eof:
			is = "eof"
		default:
			is = "open"
		}
	})
	if all != got || is != state {
		a.w.t.Errorf("the app got %.80q and is %s, want %.80q and %s", all, is, got, state)
	}
}

// A recorder keeps what a Pod tells, and watches that each connection is
// closed exactly once.
type recorder struct {
	t      testing.TB
	open   map[*tunnel.Record]bool
	closed []tunnel.Record
	failed []tunnel.Record

	progress []netip.AddrPort // clients whose connections were told of
	moved    [2]uint64        // bytes, request and response
}

func (r *recorder) Opened(rec *tunnel.Record) {
	if r.open == nil {
		r.open = make(map[*tunnel.Record]bool)
	}
	r.open[rec] = true
}

func (r *recorder) Closed(rec *tunnel.Record) {
	if !r.open[rec] {
		r.t.Errorf("closed and not open: %+v", rec)
	}
	delete(r.open, rec)
	r.closed = append(r.closed, *rec)
	r.move(rec)
}

func (r *recorder) move(rec *tunnel.Record) {
	request, response := rec.Untold()
	r.moved[0] += request
	r.moved[1] += response
}

// Progress implements tunnel.Progresser.
func (r *recorder) Progress(rec *tunnel.Record) {
	if !r.open[rec] {
		r.t.Errorf("told of what is not open: %+v", rec)
	}
	r.progress = append(r.progress, rec.Src)
	r.move(rec)
}

func (r *recorder) Failed(rec *tunnel.Record) { r.failed = append(r.failed, *rec) }

// last returns the record of the connection that ended last, which must have
// ended for this reason.
func (p *pod) last(why tunnel.Reason) tunnel.Record {
	p.w.t.Helper()
	var list []tunnel.Record
	p.loop.Do(func() { list = p.records.closed })
	if len(list) == 0 {
		p.w.t.Fatalf("nothing has closed, want %v", why)
	}
	rec := list[len(list)-1]
	if rec.Reason != why {
		p.w.t.Errorf("closed: %v (%v), want %v", rec.Reason, rec.Err, why)
	}
	return rec
}

// lastFailed is last for early denies.
func (p *pod) lastFailed(why tunnel.Reason) tunnel.Record {
	p.w.t.Helper()
	var list []tunnel.Record
	p.loop.Do(func() { list = p.records.failed })
	if len(list) == 0 {
		p.w.t.Fatalf("nothing has failed, want %v", why)
	}
	rec := list[len(list)-1]
	if rec.Reason != why {
		p.w.t.Errorf("failed: %v (%v), want %v", rec.Reason, rec.Err, why)
	}
	return rec
}

// answered is the answer to the app's SYN.
func (a *app) answered(end splice.End, how netstack.Refusal) {
	if end == nil {
		a.refused = errnos[how]
		return
	}
	a.end = end
	end.Notify(a.ready)
}
