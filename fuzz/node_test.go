package fuzz

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"runtime/metrics"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/mesh"
	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

// Who is in the mesh of a node: the pod "app", two peers that speak HBONE and
// one that does not. Everything else is outside.
var (
	appAddr    = netip.MustParseAddr("10.0.0.1")
	appAddr6   = netip.MustParseAddr("fd00::1")
	peerAddr   = netip.MustParseAddr("10.0.0.2")
	peerAddr6  = netip.MustParseAddr("fd00::2")
	friendAddr = netip.MustParseAddr("10.0.0.4")
	plainAddr  = netip.MustParseAddr("10.0.0.3")
	webVIP     = netip.MustParseAddr("10.96.0.10") // of peer, port 80 to 8080
	emptyVIP   = netip.MustParseAddr("10.96.0.11") // without endpoints
	outside    = netip.MustParseAddr("192.0.2.1")
)

// appPort is where the app listens, on every address; it listens to all ports
// in fact, so that nobody is kept away but by the proxy.
const appPort = 8080

// patience bounds waits for what must happen.
const patience = 30 * time.Second

func accountID(name string) identity.ID {
	return identity.MustParse("spiffe://cluster.local/ns/default/sa/" + name)
}

func principal(name string) *securityapi.StringMatch {
	return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Exact{Exact: accountID(name).Principal()}}
}

// nodePolicies are those of the app: the friend may reach any port but 9999, the
// peer the app's port and the proxy's, and nobody may in plain text.
var nodePolicies = []*securityapi.Authorization{
	{Name: "allow", Namespace: "default", Scope: securityapi.Scope_NAMESPACE, Rules: []*securityapi.Rule{
		{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{{Principals: []*securityapi.StringMatch{principal("friend")}}}}}},
		{Clauses: []*securityapi.Clause{
			{Matches: []*securityapi.Match{{Principals: []*securityapi.StringMatch{principal("peer")}}}},
			{Matches: []*securityapi.Match{{DestinationPorts: []uint32{appPort, 9999, 15001, 15006, 15008}}}},
		}},
	}},
	{Name: "deny", Namespace: "default", Scope: securityapi.Scope_NAMESPACE, Action: securityapi.Action_DENY, Rules: []*securityapi.Rule{
		{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{{DestinationPorts: []uint32{9999}}}}}},
	}},
}

// A site is what the nodes of one fuzz target share.
type site struct {
	engine *netstack.Engine
	shakes *hbone.Handshakes
	store  *mesh.Store
	certs  issued
}

func newSite(f *testing.F) *site {
	e, err := netstack.New(netstack.Config{Readers: 1, Memory: 256 << 20})
	if err != nil {
		f.Fatal(err)
	}
	s := &site{engine: e, shakes: hbone.NewHandshakes(hbone.HandshakesConfig{Timeout: patience}), store: mesh.NewStore(mesh.Config{LocalNode: localNode}), certs: issued{}}
	f.Cleanup(func() { s.shakes.Close(); e.Close() })
	ca := certstest.New()
	for _, name := range []string{"app", "peer", "friend"} {
		s.certs[accountID(name)] = ca.Issue(accountID(name))
	}
	workload := func(name string, protocol workloadapi.TunnelProtocol, addrs ...netip.Addr) *workloadapi.Workload {
		w := &workloadapi.Workload{Uid: "c1//Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name, Node: localNode, TunnelProtocol: protocol}
		for _, a := range addrs {
			w.Addresses = append(w.Addresses, a.AsSlice())
		}
		return w
	}
	service := func(name string, vip netip.Addr) *workloadapi.Service {
		return &workloadapi.Service{Name: name, Namespace: "default", Hostname: name + ".default.svc.cluster.local", Addresses: []*workloadapi.NetworkAddress{{Address: vip.AsSlice()}},
			Ports: []*workloadapi.Port{{ServicePort: 80, TargetPort: appPort}, {ServicePort: 81, TargetPort: 8081}}}
	}
	member := map[string]*workloadapi.PortList{"default/web.default.svc.cluster.local": {}}
	peer, app := workload("peer", workloadapi.TunnelProtocol_HBONE, peerAddr, peerAddr6), workload("app", workloadapi.TunnelProtocol_HBONE, appAddr, appAddr6)
	peer.Services, app.Services = member, map[string]*workloadapi.PortList{"default/own.default.svc.cluster.local": {}}
	var list []xds.Resource
	for _, w := range []*workloadapi.Workload{app, peer, workload("friend", workloadapi.TunnelProtocol_HBONE, friendAddr), workload("plain", workloadapi.TunnelProtocol_NONE, plainAddr)} {
		list = append(list, xds.Resource{Name: w.Uid, Body: encoded(&workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: w}})})
	}
	for _, v := range []*workloadapi.Service{service("web", webVIP), service("empty", emptyVIP), service("own", netip.MustParseAddr("10.96.0.12"))} {
		list = append(list, xds.Resource{Name: serviceName(v), Body: encoded(&workloadapi.Address{Type: &workloadapi.Address_Service{Service: v}})})
	}
	bad := s.store.Addresses().Apply(list, nil)
	list = nil
	for _, p := range nodePolicies {
		list = append(list, xds.Resource{Name: p.Namespace + "/" + p.Name, Body: encoded(proto.Message(p))})
	}
	if bad = append(bad, s.store.Authorizations().Apply(list, nil)...); len(bad) > 0 {
		f.Fatal(bad)
	}
	return s
}

// issued is an hbone.CertSource of certificates that are there.
type issued map[identity.ID]*certs.Certificate

func (c issued) Current(id identity.ID) (*certs.Certificate, bool) {
	cert, ok := c[id]
	return cert, ok
}

func (c issued) Get(_ context.Context, id identity.ID, _ certs.Priority) (*certs.Certificate, error) {
	if cert, ok := c[id]; ok {
		return cert, nil
	}
	return nil, certs.ErrUnavailable
}

// A node is the pod "app" with its proxy, and a second stack that plays the
// pod's kernel, the network and all peers. A tap lies between the two.
type node struct {
	*testing.T
	site   *site
	tap    *tap
	proxy  *netstack.Stack
	pod    *tunnel.Pod
	kernel *netstack.Stack
	far    *hbone.Server // of peer
	near   *hbone.Pool   // of peer and friend

	// mu guards what follows.
	mu      sync.Mutex
	reached []connection // that somebody opened to the app
}

func newNode(t *testing.T, s *site) *node {
	n := &node{T: t, site: s}
	options := tun.Options{MTU: 1500, Offload: true}
	a, b := tuntest.Pair(t, options)
	c, d := tuntest.Pair(t, options)
	n.tap = newTap(t, b, c)
	addrs := []netip.Addr{appAddr, appAddr6}
	limits := netstack.Limits{Connections: 300, PendingInbound: 64, PendingOutbound: 64, Memory: 64 << 20, Withheld: patience}
	var err error
	if n.proxy, err = s.engine.Add(a, netstack.StackConfig{Name: "default/app", Addrs: addrs, Limits: limits}, n.serve); err != nil {
		t.Fatal(err)
	}
	if n.kernel, err = s.engine.Add(d, netstack.StackConfig{Name: "kernel", Addrs: addrs}, func(*netstack.Stack) (netstack.Handler, error) { return world{n}, nil }); err != nil {
		t.Fatal(err)
	}
	loop := n.kernel.Loop()
	certificate := s.certs[accountID("peer")].ServerTLS()
	n.far = hbone.NewServer(hbone.ServerConfig{
		Loop: loop, Handshakes: s.shakes, Handle: echoConnect,
		TLS:    func(done func(*tls.Config, error)) func() { done(certificate, nil); return nil },
		Failed: func(netip.AddrPort, netip.AddrPort, error) {},
	})
	waits := hbone.NewCertificates(loop, s.certs, patience)
	n.near = hbone.NewPool(hbone.PoolConfig{Loop: loop, Dialer: n.kernel, Handshakes: s.shakes, Certificates: waits})
	t.Cleanup(func() {
		n.do(func() { n.near.Close(); n.far.Close() })
		waits.Close()
		waits.Wait()
		n.pod.Close()
		n.proxy.Close()
		n.kernel.Close()
		n.tap.close()
	})
	return n
}

// serve makes the proxy's side.
func (n *node) serve(stack *netstack.Stack) (netstack.Handler, error) {
	var err error
	n.pod, err = tunnel.NewPod(tunnel.Config{
		Workload: tunnel.Workload{Name: "app", Namespace: "default", ServiceAccount: "app"},
		Addrs:    []netip.Addr{appAddr, appAddr6}, Stack: stack, Mesh: n.site.store, Certs: n.site.certs,
		Handshakes: n.site.shakes, Recorder: nobody{},
	})
	return proxied{n.pod}, err
}

type proxied struct{ pod *tunnel.Pod }

func (h proxied) HandleTCP(r *netstack.Request) { h.pod.HandleTCP(r) }
func (h proxied) HandleTunnel(end splice.End, remote, local netip.AddrPort) {
	h.pod.HandleTunnel(end, remote, local)
}
func (h proxied) HandleUDP(d *netstack.Datagram) { d.Forward() }

// nobody records.
type nobody struct{}

func (nobody) Opened(*tunnel.Record) {}
func (nobody) Closed(*tunnel.Record) {}
func (nobody) Failed(*tunnel.Record) {}

// A world answers what comes out of the proxy.
type world struct{ *node }

func (w world) HandleTCP(r *netstack.Request) {
	switch {
	case r.Inbound():
		w.reach(r.Src(), r.Dst())
		w.accept(r, echo)
	case r.Dst() == netip.AddrPortFrom(peerAddr, netstack.TunnelPort):
		w.accept(r, func(end splice.End) { w.far.Serve(end, r.Src(), r.Dst()) })
	default:
		r.Refuse(netstack.RefuseReset)
	}
}

// HandleTunnel takes what the proxy opens to the app's own port 15008.
func (w world) HandleTunnel(end splice.End, remote, local netip.AddrPort) {
	w.reach(remote, local)
	end.Reset(nil)
	end.Close()
}

func (w world) HandleUDP(*netstack.Datagram) {}

func (w world) accept(r *netstack.Request, serve func(splice.End)) {
	r.Accept(func(end splice.End, err error) {
		if err == nil {
			serve(end)
		}
	})
}

func (n *node) reach(src, dst netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reached = append(n.reached, connection{src: src, dst: dst})
}

// seen is who has reached the app so far.
func (n *node) seen() []connection {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.reached)
}

// do runs f on the loop of everything but the proxy, and waits for it.
func (n *node) do(f func()) {
	done := make(chan struct{})
	n.kernel.Loop().Post(func() { defer close(done); f() })
	<-done
}

func echoConnect(in *hbone.Incoming) {
	if end, err := in.Accept(nil); err == nil {
		echo(end)
	}
}

// echo sends back what comes, and ends as the other side does.
func echo(end splice.End) {
	var pending []byte
	buf, eof, over := make([]byte, 16<<10), false, false
	end.Notify(func() {
		for !over {
			n, err := end.Write(pending)
			switch pending = pending[n:]; {
			case len(pending) > 0 && errors.Is(err, splice.ErrAgain):
				return
			case len(pending) > 0 || eof:
				_ = end.CloseWrite()
				end.Close()
				over = true
				return
			}
			n, err = end.Read(buf)
			pending = buf[:n]
			switch {
			case errors.Is(err, splice.ErrAgain):
				return
			case err == io.EOF:
				eof = true
			case err != nil:
				end.Close()
				over = true
			}
		}
	})
}

// A call is a connection whose echo is awaited.
type call struct {
	end  splice.End
	out  []byte
	want []byte
	got  []byte
	last bool // nothing is to be sent after out
	over bool
	done chan error // one for each of say
}

func newCall(end splice.End) *call {
	c := &call{end: end, done: make(chan error, 4)}
	end.Notify(c.ready)
	return c
}

// say sends p and waits for its echo; with last, for the end too. On the loop.
func (c *call) say(p []byte, last bool) {
	c.out, c.want, c.last = append(c.out, p...), append(c.want, p...), last
	c.ready()
}

func (c *call) ready() {
	if c.over {
		return
	}
	if len(c.out) > 0 {
		n, err := c.end.Write(c.out)
		c.out = c.out[n:]
		if err != nil && !errors.Is(err, splice.ErrAgain) {
			c.finish(err)
			return
		}
		if len(c.out) == 0 && c.last {
			_ = c.end.CloseWrite()
		}
	}
	buf := make([]byte, 16<<10)
	for !c.over {
		n, err := c.end.Read(buf)
		c.got = append(c.got, buf[:n]...)
		switch {
		case errors.Is(err, splice.ErrAgain):
			if !c.last && len(c.want) > 0 && len(c.got) >= len(c.want) {
				c.heard()
			}
			return
		case err != nil:
			if err == io.EOF && c.last {
				err = nil
			}
			c.finish(err)
		}
	}
}

func (c *call) heard() {
	var err error
	if !bytes.Equal(c.got, c.want) {
		err = fmt.Errorf("%d bytes of %d came back, or others", len(c.got), len(c.want))
	}
	c.got, c.want = nil, nil
	c.done <- err
}

func (c *call) finish(err error) {
	c.over = true
	c.end.Close()
	if err != nil {
		c.done <- err
		return
	}
	c.heard()
}

// wait waits for the echo of what was said.
func (n *node) wait(what string, done <-chan error) {
	n.Helper()
	select {
	case err := <-done:
		if err != nil {
			n.Fatalf("%s: %v", what, err)
		}
	case <-time.After(patience):
		n.Fatalf("%s: nothing happens; %s", what, n.tap)
	}
}

// dial opens a connection from the kernel's side; ready gets its end, on the loop.
func (n *node) dial(src, dst netip.AddrPort, ready func(splice.End)) <-chan error {
	done := make(chan error, 1)
	n.do(func() {
		n.kernel.Dial(src, dst, patience, func(end splice.End, err error) {
			if err == nil {
				ready(end)
			}
			done <- err
		})
	})
	return done
}

// outbound lets the app call the peer and wants the echo.
func (n *node) outbound(src, dst netip.AddrPort, data []byte) {
	n.Helper()
	var c *call
	n.wait("the app's connect", n.dial(src, dst, func(end splice.End) { c = newCall(end); c.say(data, true) }))
	n.wait("the app's echo", c.done)
}

// inbound opens a stream from a workload of the mesh to the app.
func (n *node) inbound(name string, from netip.Addr) *call {
	n.Helper()
	var c *call
	done := make(chan error, 1)
	target := hbone.Target{Local: accountID(name), Peer: "app", Want: []identity.ID{accountID("app")}, Src: from, Dst: netip.AddrPortFrom(appAddr, netstack.TunnelPort)}
	n.do(func() {
		n.near.Connect(target, &hbone.Connect{Authority: netip.AddrPortFrom(appAddr, appPort).String(), Client: netip.AddrPortFrom(from, 40000)}, func(t *hbone.Tunnel, err error) {
			if err == nil {
				c = newCall(t.Stream)
			}
			done <- err
		})
	})
	n.wait(name+"'s tunnel to the app", done)
	return c
}

var _ splice.End = (*h2.Stream)(nil)

// bounded fails if memory or goroutines have grown beyond all reason.
func bounded(t *testing.T) {
	t.Helper()
	const most = 400 << 20
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	if metrics.Read(heap); heap[0].Value.Uint64() > most {
		runtime.GC()
		if metrics.Read(heap); heap[0].Value.Uint64() > most {
			t.Errorf("%d bytes of heap", heap[0].Value.Uint64())
		}
	}
	if n := runtime.NumGoroutine(); n > 3000 {
		t.Errorf("%d goroutines", n)
	}
}
