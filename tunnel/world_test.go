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

// A world is a mesh in memory: pods on one loop, joined by a network that
// loses nothing.
type world struct {
	t      testing.TB
	loop   *splicetest.Loop
	store  *mesh.Store
	ca     *certstest.CA
	certs  *certSource
	shakes *hbone.Handshakes
	pods   map[netip.Addr]*pod
	hosts  map[netip.AddrPort]func(*app) // outside of the mesh
	silent map[netip.AddrPort]bool       // answers nothing
	raw    map[netip.AddrPort]func(*splicetest.PipeEnd)
	dials  []dialled
	ends   []*splicetest.PipeEnd // of tunnels, the accepting sides
	edit   func(*tunnel.Config)  // for pods made from now on
}

// dialled is one Dial of a stack.
type dialled struct{ src, dst netip.AddrPort }

// inWorld runs test in a fresh world under synctest.
func inWorld(t *testing.T, test func(w *world)) {
	synctest.Test(t, func(t *testing.T) { test(newWorld(t)) })
}

func newWorld(t testing.TB) *world {
	w := &world{
		t:      t,
		loop:   splicetest.NewLoop(),
		store:  mesh.NewStore(mesh.Config{}),
		ca:     certstest.New(),
		shakes: hbone.NewHandshakes(hbone.HandshakesConfig{}),
		pods:   make(map[netip.Addr]*pod),
		hosts:  make(map[netip.AddrPort]func(*app)),
		silent: make(map[netip.AddrPort]bool),
	}
	w.certs = &certSource{ca: w.ca, have: make(map[identity.ID]*certs.Certificate)}
	t.Cleanup(func() {
		for _, p := range w.pods {
			p.Close()
		}
		w.shakes.Close()
		w.loop.Close()
	})
	return w
}

// certSource issues what it is asked for, unless it is told not to.
type certSource struct {
	ca *certstest.CA

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
		s.have[id] = s.ca.Issue(id)
	}
	return s.have[id], nil
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
	p := &pod{w: w, addr: netip.MustParseAddr(ip), workload: workload(name, ip), listen: make(map[uint16]func(*app)), records: &recorder{t: w.t}}
	cfg := tunnel.Config{
		Workload: tunnel.Workload{Name: name, Namespace: "default", ServiceAccount: name},
		Addrs:    []netip.Addr{p.addr}, Stack: stack{w, p}, Mesh: w.store, Certs: w.certs, Handshakes: w.shakes, Recorder: p.records,
	}
	if w.edit != nil {
		w.edit(&cfg)
	}
	var err error
	if p.Pod, err = tunnel.NewPod(cfg); err != nil {
		w.t.Fatal(err)
	}
	w.loop.Do(func() { w.pods[p.addr] = p })
	return p
}

// serve makes the pod's app listen.
func (p *pod) serve(port uint16, handle func(*app)) {
	p.w.loop.Do(func() { p.listen[port] = handle })
}

// A stack is a pod's TCP.
type stack struct {
	w *world
	p *pod
}

func (s stack) Loop() splice.Loop { return s.w.loop }

func (s stack) Dial(src, dst netip.AddrPort, timeout time.Duration, done func(splice.End, error)) (cancel func()) {
	w := s.w
	w.dials = append(w.dials, dialled{src, dst})
	if w.silent[dst] {
		return w.loop.AfterFunc(timeout, func() { done(nil, fmt.Errorf("dial: %w", syscall.ETIMEDOUT)) })
	}
	stopped := false
	w.loop.Post(func() {
		if !stopped {
			s.connect(src, dst, done)
		}
	})
	return func() { stopped = true }
}

// connect delivers a SYN.
func (s stack) connect(src, dst netip.AddrPort, done func(splice.End, error)) {
	w := s.w
	if accept := w.raw[dst]; accept != nil {
		ours, theirs := splicetest.Pipe(w.loop, 64<<10)
		accept(theirs)
		done(ours, nil)
		return
	}
	target := w.pods[dst.Addr()]
	var handle func(*app)
	switch {
	case target == s.p:
		if src.Addr() == dst.Addr() {
			done(nil, fmt.Errorf("dial: the kernel answered over lo"))
			return
		}
		handle = target.listen[dst.Port()]
	case target != nil && dst.Port() == tunnel.TunnelPort:
		ours, theirs := splicetest.Pipe(w.loop, 64<<10)
		w.ends = append(w.ends, theirs)
		target.HandleTunnel(theirs, netip.AddrPortFrom(src.Addr(), 50000), dst)
		done(ours, nil)
		return
	case target != nil:
		target.HandleTCP(&request{w: w, src: netip.AddrPortFrom(src.Addr(), 50001), dst: dst, inbound: true, answer: func(end *splicetest.PipeEnd, r netstack.Refusal) {
			if end == nil {
				done(nil, fmt.Errorf("dial: %w", errnos[r]))
				return
			}
			done(end, nil)
		}})
		return
	default:
		handle = w.hosts[dst]
	}
	if handle == nil {
		err := syscall.ECONNREFUSED
		if target == nil {
			err = syscall.EHOSTUNREACH
		}
		done(nil, fmt.Errorf("dial: %w", err))
		return
	}
	ours, theirs := splicetest.Pipe(w.loop, 64<<10)
	handle(newApp(w, theirs, src))
	done(ours, nil)
}

var errnos = map[netstack.Refusal]error{
	netstack.RefuseReset: syscall.ECONNREFUSED, netstack.RefuseUnreachable: syscall.EHOSTUNREACH,
	netstack.RefuseProhibited: syscall.EHOSTUNREACH, netstack.RefuseSilent: syscall.ETIMEDOUT,
}

// A request is a SYN.
type request struct {
	w        *world
	src, dst netip.AddrPort
	inbound  bool
	answered bool
	answer   func(*splicetest.PipeEnd, netstack.Refusal)
}

func (r *request) Src() netip.AddrPort { return r.src }
func (r *request) Dst() netip.AddrPort { return r.dst }
func (r *request) Inbound() bool       { return r.inbound }

func (r *request) once() {
	if r.answered {
		r.w.t.Error("a request was answered twice")
	}
	r.answered = true
}

func (r *request) Accept(done func(splice.End, error)) {
	r.once()
	r.w.loop.Post(func() {
		theirs, ours := splicetest.Pipe(r.w.loop, 64<<10)
		r.answer(theirs, 0)
		done(ours, nil)
	})
}

func (r *request) Refuse(how netstack.Refusal) {
	r.once()
	r.answer(nil, how)
}

// An app is one end of an app's connection: it reads all there is.
type app struct {
	w       *world
	end     *splicetest.PipeEnd
	from    netip.AddrPort // whom a server sees
	got     []byte
	eof     bool
	err     error // a reset
	refused error // a client was
	echo    bool
	hold    bool // does not read
}

func newApp(w *world, end *splicetest.PipeEnd, from netip.AddrPort) *app {
	a := &app{w: w, end: end, from: from}
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
	a := &app{w: p.w}
	r := &request{w: p.w, src: netip.AddrPortFrom(p.addr, 40000), dst: netip.MustParseAddrPort(dst), answer: a.answered}
	p.w.loop.Do(func() { p.HandleTCP(r) })
	return a
}

// call dials and waits for the outcome.
func (p *pod) call(dst string) *app {
	a := p.dial(dst)
	synctest.Wait()
	return a
}

func (a *app) send(s string) {
	a.w.loop.Do(func() {
		if n, err := a.end.Write([]byte(s)); n != len(s) {
			a.w.t.Errorf("send: %v", err)
		}
	})
	synctest.Wait()
}

func (a *app) closeWrite() {
	a.w.loop.Do(func() { _ = a.end.CloseWrite() })
	synctest.Wait()
}

func (a *app) reset() {
	a.w.loop.Do(func() { a.end.Reset(errors.New("test")) })
	synctest.Wait()
}

// want checks what the app has seen so far: its bytes, then "open", "eof",
// "reset" or the error of its connect.
func (a *app) want(got, state string) {
	a.w.t.Helper()
	var is, all string
	a.w.loop.Do(func() {
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
	p.w.loop.Do(func() { list = p.records.closed })
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
	p.w.loop.Do(func() { list = p.records.failed })
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
func (a *app) answered(end *splicetest.PipeEnd, how netstack.Refusal) {
	if end == nil {
		a.refused = errnos[how]
		return
	}
	a.end = end
	end.Notify(a.ready)
}
