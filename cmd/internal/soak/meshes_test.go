package soak

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ztun/ztun/cmd/internal/meshtest"
	"github.com/ztun/ztun/tun/tuntest"
	"github.com/ztun/ztun/xds/securityapi"
)

// Ports of the servers; the denied one is what the policy is about.
const (
	openPort   = 9000
	deniedPort = 9001
)

// meshWorld is a mesh of two nodes. Apps are kernel sockets, and proxies speak
// HBONE to each other, with a Wire between the nodes or without.
type meshWorld struct {
	// Set by newMeshWorld, read-only after.
	mesh  *meshtest.Mesh
	nodes []*meshtest.Node
	pods  []*meshtest.Pod // those with a proxy
	wire  *tuntest.Wire   // nil: a bridge joins all
	ways  []meshRoute
	from  map[*meshtest.Pod]*sockets
	dials time.Duration // a dial takes at most

	harsh bool // the weather; set between loads
}

type meshRoute struct {
	name string
	from *meshtest.Pod
	to   netip.Addr
	free bool // of policies: the server is not in the mesh
	bare bool // what crosses the wire is the connection itself, and no tunnel
}

func newMeshWorld(t *testing.T, o worldOptions) *meshWorld {
	m := meshtest.New(t)
	m.TCP = o.tcp
	w := &meshWorld{mesh: m, from: map[*meshtest.Pod]*sockets{}, dials: dialLimit}
	na := m.Node("na")
	var nb *meshtest.Node
	var out *meshtest.Pod
	over := "a bridge"
	if o.wired {
		far, wire := m.Far(tuntest.Options{Seed: o.seed})
		w.wire, over = wire, "a wire"
		nb, out = m.NodeOn(far, "nb"), m.BareOn(far, "out")
	} else {
		nb, out = m.Node("nb"), m.Bare("out", nil)
	}
	w.nodes = []*meshtest.Node{na, nb}
	a, a2, b := m.Pod("a", na), m.Pod("a2", na), m.Pod("b", nb)
	w.pods = []*meshtest.Pod{a, a2, b}
	for _, p := range append(w.pods, out) {
		w.from[p] = newSockets(t, p)
		accept(t, p, openPort, o.serve)
		accept(t, p, deniedPort, o.serve)
	}
	w.ways = []meshRoute{
		{name: "HBONE over " + over, from: a, to: b.Addr},
		{name: "HBONE over " + over + ", IPv6", from: a, to: b.Addr6},
		{name: "HBONE back over " + over, from: b, to: a.Addr},
		{name: "HBONE on one node", from: a, to: a2.Addr},
		{name: "plaintext out over " + over, from: a, to: out.Addr6, free: true, bare: true},
		{name: "plaintext in over " + over, from: out, to: a.Addr, bare: true},
	}
	return w
}

func (w *meshWorld) routes() (names []string) {
	for _, r := range w.ways {
		names = append(names, r.name)
	}
	return names
}

func (w *meshWorld) policed(route int) bool { return !w.ways[route].free }
func (w *meshWorld) forgets(route int) bool { return w.harsh && w.ways[route].bare }

func (w *meshWorld) dial(route int, k kind) (conn, error) {
	r, port := w.ways[route], uint16(openPort)
	if k == denied {
		port = deniedPort
	}
	return w.from[r.from].dial(netip.AddrPortFrom(r.to, port), w.dials)
}

func (w *meshWorld) deny(told, gone func()) bool {
	told()
	w.mesh.Tell(&securityapi.Authorization{
		Name: "deny", Namespace: meshtest.Namespace, Scope: securityapi.Scope_NAMESPACE, Action: securityapi.Action_DENY,
		Rules: []*securityapi.Rule{{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{{DestinationPorts: []uint32{deniedPort}}}}}}},
	})
	gone()
	w.mesh.ForgetPolicy(meshtest.Namespace + "/deny")
	return true
}

// set changes the weather on the wire.
func (w *meshWorld) set(ab, ba tuntest.Path) {
	if w.wire != nil {
		w.wire.Set(ab, ba)
		w.harsh = isHarsh(ab) || isHarsh(ba)
	}
}

func (w *meshWorld) flows() (n int) {
	for _, p := range w.pods {
		n += int(p.Stack().Stats().Flows + p.Stack().Stats().Pending)
	}
	return n
}

// forget drops what only the test keeps.
func (w *meshWorld) forget() {
	for _, n := range w.nodes {
		n.Records.Forget()
	}
}

func (w *meshWorld) state() string {
	var s strings.Builder
	for _, p := range w.pods {
		fmt.Fprintf(&s, "  stack of %s: %+v\n", p.Name, p.Stack().Stats())
	}
	for _, n := range w.nodes {
		o, c := n.Records.Counts()
		fmt.Fprintf(&s, "  node %s: %d connections opened, %d closed\n", n.Name, o, c)
	}
	if w.wire != nil {
		ab, ba := w.wire.Stats()
		fmt.Fprintf(&s, "  wire: %+v\n  and back: %+v\n", ab, ba)
	}
	return s.String()
}
