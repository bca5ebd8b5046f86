// Package meshtest builds meshes for tests out of the real parts: network
// namespaces joined by a bridge, pods on TUN devices by podnet, an engine and
// a test CA for each node. The control plane is whatever the test tells the
// nodes' stores. It needs a kernel, see netnstest.
package meshtest

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/podnet"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/mesh"
	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

// Namespace is the Kubernetes namespace of every pod.
const Namespace = "default"

// Mesh is a network with nodes and pods.
type Mesh struct {
	T      testing.TB
	Fabric *netnstest.NS // the bridge that joins all pods, and their gateway
	CA     *certstest.CA
	Log    *slog.Logger // of the engines of nodes made later; nil: none
	// Readers is how many readers nodes made later have; 0 is 1.
	Readers int
	// TCP is that of nodes made later.
	TCP netstack.TCP
	// NoJoin leaves streams between pods of nodes made later to tunnels.
	NoJoin bool
	near   *Network // that of the Fabric
	nodes  []*Node
	pods   []*Pod
}

// New makes an empty mesh.
func New(t testing.TB) *Mesh {
	t.Helper()
	m := &Mesh{T: t, Fabric: netnstest.New(t, "fabric"), CA: certstest.New()}
	m.near = m.network(m.Fabric, 1)
	return m
}

// Node is one node's proxy, in this process.
type Node struct {
	Name       string
	Store      *mesh.Store
	Records    *Records
	mesh       *Mesh
	network    *Network
	engine     *netstack.Engine
	certs      *certs.Manager
	handshakes *hbone.Handshakes
	neighbours *tunnel.Neighbours
	readers    int
	stopCerts  context.CancelFunc
	certsDone  chan struct{}
}

// Node makes a node; its proxy runs.
func (m *Mesh) Node(name string) *Node {
	m.T.Helper()
	n := &Node{Name: name, mesh: m, network: m.near, Records: &Records{}, Store: mesh.NewStore(mesh.Config{LocalNode: name})}
	n.start()
	m.nodes = append(m.nodes, n)
	m.T.Cleanup(n.stop)
	return n
}

func (n *Node) start() {
	n.mesh.T.Helper()
	n.readers = max(n.mesh.Readers, 1)
	// Two processors more than readers, as netstack.Config asks.
	procs := n.readers + 2
	for _, other := range n.mesh.nodes {
		procs += other.readers
	}
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), procs))
	if !n.mesh.NoJoin {
		n.neighbours = tunnel.NewNeighbours()
	}
	var err error
	cfg := netstack.Config{Readers: n.readers, TCP: n.mesh.TCP}
	if n.mesh.Log != nil {
		cfg.Log = n.mesh.Log.With("node", n.Name)
	}
	if n.engine, err = netstack.New(cfg); err != nil {
		n.mesh.T.Fatal(err)
	}
	n.handshakes = hbone.NewHandshakes(hbone.HandshakesConfig{})
	n.certs = certs.NewManager(certs.Config{CA: n.mesh.CA})
	var ctx context.Context
	ctx, n.stopCerts = context.WithCancel(context.Background())
	n.certsDone = make(chan struct{})
	go func() {
		defer close(n.certsDone)
		n.certs.Run(ctx)
	}()
}

func (n *Node) stop() {
	for _, p := range n.mesh.pods {
		if p.Node == n {
			p.StopProxy()
		}
	}
	n.handshakes.Close()
	n.engine.Close()
	n.stopCerts()
	<-n.certsDone
}

// Pod is a namespace with an interface on the fabric.
type Pod struct {
	Name     string
	NS       *netnstest.NS
	Addr     netip.Addr // IPv4
	Addr6    netip.Addr
	Node     *Node // nil: not in the mesh
	Workload *workloadapi.Workload
	mesh     *Mesh
	attached *podnet.Attachment
	watch    context.CancelFunc
	watching chan struct{}
	file     *os.File // kept, so that a next proxy can have it
	dev      *tun.Device
	stack    *netstack.Stack
	tunnel   *tunnel.Pod
}

// Bare makes a pod that is not in the mesh: a namespace on the fabric. node
// may be nil, else a later Join puts it behind that node's proxy.
func (m *Mesh) Bare(name string, node *Node) *Pod {
	m.T.Helper()
	if node != nil {
		return m.bare(node.network, name, node)
	}
	return m.bare(m.near, name, nil)
}

func (m *Mesh) bare(net *Network, name string, node *Node) *Pod {
	m.T.Helper()
	i := byte(len(m.pods) + 10)
	p := &Pod{
		Name: name, mesh: m, Node: node, NS: netnstest.New(m.T, name),
		Addr: net.addr(i), Addr6: net.addr6(i),
	}
	port := "p-" + name
	netnstest.Veth(m.T, net.NS, port, p.NS, "eth0")
	net.NS.Port("br0", port)
	p.NS.Addr("eth0", p.Addr.String()+"/16", p.Addr6.String()+"/64")
	p.NS.Route("0.0.0.0/0", net.gateway().String(), "eth0")
	p.NS.Route("::/0", net.gateway6().String(), "eth0")
	p.NS.Settled() // Else what it sends to its own address may leave by this route.
	p.Workload = &workloadapi.Workload{
		Uid: "Kubernetes//Pod/" + Namespace + "/" + name, Name: name, Namespace: Namespace,
		Addresses:      [][]byte{p.Addr.AsSlice(), p.Addr6.AsSlice()},
		ServiceAccount: name, WorkloadName: name, CanonicalName: name, CanonicalRevision: "v1",
		WorkloadType: workloadapi.WorkloadType_POD,
	}
	if node != nil {
		p.Workload.Node = node.Name
	}
	m.pods = append(m.pods, p)
	return p
}

// Pod makes a pod in the mesh, behind node's proxy.
func (m *Mesh) Pod(name string, node *Node) *Pod {
	m.T.Helper()
	p := m.Bare(name, node)
	p.Join(podnet.Config{})
	return p
}

// Join attaches the pod and starts its proxy.
func (p *Pod) Join(cfg podnet.Config) {
	p.mesh.T.Helper()
	p.Attach(cfg)
	p.Workload.TunnelProtocol = workloadapi.TunnelProtocol_HBONE
	p.mesh.Tell(p.Workload)
	p.StartProxy()
}

// Attach captures the pod. Nobody reads its device yet.
func (p *Pod) Attach(cfg podnet.Config) {
	t := p.mesh.T
	t.Helper()
	a, err := podnet.Attach(t.Context(), p.NS.File(), cfg, nil)
	if err != nil {
		t.Fatalf("attach %s: %v", p.Name, err)
	}
	p.attached, p.file = a, a.File
	ctx, cancel := context.WithCancel(context.Background())
	p.watch, p.watching = cancel, make(chan struct{})
	go func() {
		defer close(p.watching)
		a.Watch(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-p.watching
		p.StopProxy()
		p.file.Close()
		a.Close()
	})
}

// Attachment is what podnet holds of the pod.
func (p *Pod) Attachment() *podnet.Attachment { return p.attached }

// StartProxy makes the node's proxy read the pod's device.
func (p *Pod) StartProxy() {
	t := p.mesh.T
	t.Helper()
	file, err := dup(p.file)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := tun.New(file, tun.Options{MTU: p.attached.MTU(), Offload: p.attached.Offload})
	if err != nil {
		t.Fatal(err)
	}
	p.dev = dev
	icmp, err := p.attached.OpenICMP()
	if err != nil {
		t.Fatal(err)
	}
	cfg := netstack.StackConfig{
		ICMP: icmp,
		Name: Namespace + "/" + p.Name, Addrs: p.attached.Addrs(),
		BypassInbound:     p.attached.State().BypassInbound,
		CaptureDNS:        p.attached.State().CaptureDNS,
		VirtualInterfaces: len(p.attached.State().VirtualInterfaces) > 0,
	}
	for _, f := range p.attached.Older() {
		cfg.Older = append(cfg.Older, netstack.Tuple{Local: f.Local, Remote: f.Remote})
	}
	p.stack, err = p.Node.engine.Add(dev, cfg, func(s *netstack.Stack) (netstack.Handler, error) {
		var err error
		p.tunnel, err = tunnel.NewPod(tunnel.Config{
			Workload: tunnel.Workload{Name: p.Name, Namespace: Namespace, ServiceAccount: p.Name},
			Addrs:    cfg.Addrs, Stack: s, Mesh: p.Node.Store, Certs: p.Node.certs,
			Handshakes: p.Node.handshakes, Recorder: p.Node.Records, Neighbours: p.Node.neighbours,
		})
		return handler{p.tunnel}, err
	})
	if err != nil {
		t.Fatalf("proxy of %s: %v", p.Name, err)
	}
	p.waitForCertificate()
}

// waitForCertificate waits for the certificate of a pod that the mesh knows:
// without it neighbours take the wire.
func (p *Pod) waitForCertificate() {
	w := p.Node.Store.Snapshot().Local(p.Name, Namespace, p.Name)
	if w == nil || w.Identity.IsZero() {
		return
	}
	netnstest.Eventually(p.mesh.T, "certificate of "+p.Name, func() bool {
		_, ok := p.Node.certs.Current(w.Identity)
		return ok
	})
}

// Crash ends the pod's proxy as kill -9 does: nothing more is read from the
// device nor written to it.
func (p *Pod) Crash() {
	p.mesh.T.Helper()
	p.stack.StopReading()
	if err := muzzle(p.dev.FD()); err != nil {
		p.mesh.T.Fatal(err)
	}
	p.StopProxy()
}

// StopProxy ends the pod's proxy in order: its flows are reset.
func (p *Pod) StopProxy() {
	if p.stack == nil {
		return
	}
	p.tunnel.Close()
	p.stack.Close()
	p.stack, p.tunnel = nil, nil
}

// Stack is the pod's stack while its proxy runs.
func (p *Pod) Stack() *netstack.Stack { return p.stack }

// Tunnel is what decides for the pod while its proxy runs.
func (p *Pod) Tunnel() *tunnel.Pod { return p.tunnel }

type handler struct{ pod *tunnel.Pod }

func (h handler) HandleTCP(r *netstack.Request) { h.pod.HandleTCP(r) }
func (h handler) HandleTunnel(end splice.End, remote, local netip.AddrPort) {
	h.pod.HandleTunnel(end, remote, local)
}
func (h handler) HandleUDP(d *netstack.Datagram) { d.Forward() }

// Tell gives every node a workload, service or policy, as a control plane would.
func (m *Mesh) Tell(what ...proto.Message) {
	m.T.Helper()
	for _, n := range m.nodes {
		n.Tell(what...)
	}
}

// Tell gives one node's store a resource.
func (n *Node) Tell(what ...proto.Message) {
	n.mesh.T.Helper()
	for _, w := range what {
		h, name := n.Store.Addresses(), ""
		switch r := w.(type) {
		case *workloadapi.Workload:
			name, w = r.Uid, &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: r}}
		case *workloadapi.Service:
			name, w = r.Namespace+"/"+r.Hostname, &workloadapi.Address{Type: &workloadapi.Address_Service{Service: r}}
		case *securityapi.Authorization:
			name, h = r.Namespace+"/"+r.Name, n.Store.Authorizations()
		default:
			n.mesh.T.Fatalf("cannot tell a %T", w)
		}
		b, err := proto.Marshal(w)
		if err != nil {
			n.mesh.T.Fatal(err)
		}
		if bad := h.Apply([]xds.Resource{{Name: name, Version: "1", Body: b}}, nil); len(bad) > 0 {
			n.mesh.T.Fatalf("%s: %v", name, bad)
		}
	}
}

// Forget removes an address resource from every node.
func (m *Mesh) Forget(names ...string) {
	for _, n := range m.nodes {
		n.Store.Addresses().Apply(nil, names)
	}
}

// ForgetPolicy removes policies from every node.
func (m *Mesh) ForgetPolicy(names ...string) {
	for _, n := range m.nodes {
		n.Store.Authorizations().Apply(nil, names)
	}
}

// Service makes a service of the pods, on a VIP of either family.
func (m *Mesh) Service(name string, port, target uint16, pods ...*Pod) netip.AddrPort {
	m.T.Helper()
	i := byte(len(name)) + byte(port)
	vip, vip6 := netip.AddrFrom4([4]byte{10, 96, 0, i}), netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x96, 15: i})
	host := name + "." + Namespace + ".svc.cluster.local"
	m.Tell(&workloadapi.Service{
		Name: name, Namespace: Namespace, Hostname: host, Canonical: true,
		Addresses: []*workloadapi.NetworkAddress{{Address: vip.AsSlice()}, {Address: vip6.AsSlice()}},
		Ports:     []*workloadapi.Port{{ServicePort: uint32(port), TargetPort: uint32(target)}},
	})
	for _, p := range pods {
		if p.Workload.Services == nil {
			p.Workload.Services = map[string]*workloadapi.PortList{}
		}
		p.Workload.Services[Namespace+"/"+host] = &workloadapi.PortList{
			Ports: []*workloadapi.Port{{ServicePort: uint32(port), TargetPort: uint32(target)}},
		}
		m.Tell(p.Workload)
	}
	return netip.AddrPortFrom(vip, port)
}

// Records keeps what a node's pods recorded.
type Records struct {
	// mu guards the fields below.
	mu     sync.Mutex
	closed []tunnel.Record
	failed []tunnel.Record
	opened int
	// forgotten is how many closed ones Forget has dropped.
	forgotten int
}

func (r *Records) Opened(*tunnel.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened++
}

func (r *Records) Closed(rec *tunnel.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = append(r.closed, *rec)
}

func (r *Records) Failed(rec *tunnel.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = append(r.failed, *rec)
}

// Forget drops the records kept so far; Counts stay.
func (r *Records) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forgotten += len(r.closed)
	r.closed, r.failed = nil, nil
}

// Wait returns the first closed or failed record that matches.
func (r *Records) Wait(t testing.TB, what string, match func(*tunnel.Record) bool) (rec tunnel.Record) {
	t.Helper()
	netnstest.Eventually(t, what, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, list := range [][]tunnel.Record{r.closed, r.failed} {
			for i := range list {
				if match(&list[i]) {
					rec = list[i]
					return true
				}
			}
		}
		return false
	})
	return rec
}

// Opened is how many connections were opened, Closed how many of them ended.
func (r *Records) Counts() (opened, closed int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.opened, r.forgotten + len(r.closed)
}

// Ended returns the connections that were opened and have ended.
func (r *Records) Ended() []tunnel.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.closed)
}

// String lists what did not end well, for a failing test.
func (r *Records) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var s string
	for _, list := range [][]tunnel.Record{r.closed, r.failed} {
		for i := range list {
			rec := &list[i]
			if rec.Reason == tunnel.OK {
				continue
			}
			s += fmt.Sprintf("%v %v -> %v %s sent=%d received=%d reason=%v %s\n", rec.Direction, rec.Src, rec.Dst, rec.HBONEAddr, rec.Sent, rec.Received, rec.Reason, rec.Error())
		}
	}
	return s
}
