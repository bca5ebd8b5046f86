package meshtest

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/xds/securityapi"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

const patience = 30 * time.Second

// serve answers each connection to address in the pod with handle.
func (p *Pod) serve(t *testing.T, address string, handle func(net.Conn)) net.Listener {
	t.Helper()
	l := p.NS.Listen("tcp", address)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c)
		}
	}()
	return l
}

// hello says who called, then repeats what it hears until the end.
func hello(c net.Conn) {
	defer c.Close()
	io.WriteString(c, "hello "+c.RemoteAddr().String()+"\n")
	io.Copy(c, c)
}

// ask connects from the pod, says what, ends its side and returns the answer.
func (p *Pod) ask(t *testing.T, to, what string) (string, error) {
	t.Helper()
	c, err := p.NS.Dial("tcp", to, patience)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, what); err != nil {
		return "", err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// mustAsk is ask for a server that says hello; it returns the client address
// that the server saw.
func (p *Pod) mustAsk(t *testing.T, to string) netip.AddrPort {
	t.Helper()
	got, err := p.ask(t, to, "secret payload")
	if err != nil {
		t.Fatalf("%s -> %s: %v", p.Name, to, err)
	}
	who, rest, _ := strings.Cut(got, "\n")
	if rest != "secret payload" {
		t.Fatalf("%s -> %s: answer %q", p.Name, to, got)
	}
	return netip.MustParseAddrPort(strings.TrimPrefix(who, "hello "))
}

// A layout is where the client and the server of a test live.
type layout struct {
	name    string
	nodes   int
	readers int // of each node
}

// layouts are what every test runs through: streams from pod to pod take a
// tunnel between two nodes, or memory within one, on one thread or from one to
// another. Nothing but the wire in between may tell them apart.
var layouts = []layout{{"two nodes", 2, 1}, {"one node", 1, 1}, {"one node, two readers", 1, 2}}

// two is the usual mesh: a client and a server, on two nodes or on one.
type two struct {
	*Mesh
	na, nb         *Node
	client, server *Pod
}

// eachLayout runs f in a fresh mesh of each layout. What was tunnelled in it
// must have taken the layout's path.
func eachLayout(t *testing.T, f func(t *testing.T, w *two)) {
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			w := l.mesh(t)
			w.client = w.Pod("client", w.na)
			w.server = w.Pod("server", w.nb)
			f(t, w)
			w.checkPaths()
		})
	}
}

// mesh is a mesh with the layout's nodes and no pods.
func (l layout) mesh(t *testing.T) *two {
	m := New(t)
	m.Readers = l.readers
	w := &two{Mesh: m, na: m.Node("na")}
	if w.nb = w.na; l.nodes == 2 {
		w.nb = m.Node("nb")
	}
	return w
}

// joined says that client and server share a node.
func (w *two) joined() bool { return w.na == w.nb }

// checkPaths checks that tunnels were used between nodes only.
func (w *two) checkPaths() {
	for _, n := range []*Node{w.na, w.nb} {
		for _, r := range n.Records.Ended() {
			if r.MutualTLS() && !r.Hairpin && r.Reason == tunnel.OK && r.SameNode != w.joined() {
				w.T.Errorf("joined in memory: %v: %v %v -> %v", r.SameNode, r.Direction, r.Src, r.HBONEAddr)
			}
		}
	}
}

// explain tells of the connections that did not end well, if the test failed.
func (w *two) explain() {
	if w.T.Failed() {
		w.T.Logf("na:\n%snb:\n%s", w.na.Records, w.nb.Records)
	}
}

func addr(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

func TestOutboundToServiceAndPod(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		w.server.serve(t, ":8080", hello)
		vip := w.Service("server", 80, 8080, w.server)
		wire := w.Fabric.Capture("p-server")
		for _, c := range []struct {
			name, to string
			client   netip.Addr
		}{
			{"service", vip.String(), w.client.Addr},
			{"pod v4", addr(w.server.Addr, 8080), w.client.Addr},
			{"pod v6", addr(w.server.Addr6, 8080), w.client.Addr6},
		} {
			t.Run(c.name, func(t *testing.T) {
				if got := w.client.mustAsk(t, c.to).Addr(); got != c.client {
					t.Errorf("server saw %v, want %v", got, c.client)
				}
			})
		}
		rec := w.nb.Records.Wait(t, "inbound record", func(r *tunnel.Record) bool { return r.Direction == tunnel.Inbound })
		if got := rec.SrcIdentity.String(); got != "spiffe://cluster.local/ns/default/sa/client" {
			t.Errorf("source identity %s", got)
		}
		if got := rec.DstIdentity.String(); got != "spiffe://cluster.local/ns/default/sa/server" {
			t.Errorf("destination identity %s", got)
		}
		if leaks := wire.Packets(func(p []byte) bool { return strings.Contains(string(p), "secret payload") }); len(leaks) > 0 {
			t.Errorf("%d packets with the payload on the wire", len(leaks))
		}
		tcp := wire.Packets(func(p []byte) bool { return p[0]>>4 == 4 && p[9] == 6 })
		for _, p := range tcp {
			h := p[int(p[0]&15)*4:]
			if src, dst := int(h[0])<<8|int(h[1]), int(h[2])<<8|int(h[3]); src != 15008 && dst != 15008 {
				t.Errorf("TCP between ports %d and %d on the wire", src, dst)
				break
			}
		}
		if (len(tcp) == 0) != w.joined() {
			t.Errorf("%d TCP packets on the wire", len(tcp))
		}
	})
}

func TestOutboundToOutsideIsPassedThrough(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		outside := w.Bare("outside", nil)
		outside.serve(t, ":8080", hello)
		for _, to := range []netip.Addr{outside.Addr, outside.Addr6} {
			got := w.client.mustAsk(t, addr(to, 8080)).Addr()
			if got != w.client.Addr && got != w.client.Addr6 {
				t.Errorf("outside saw %v, want the pod's address", got)
			}
		}
	})
}

func TestInboundPlaintextAndSTRICT(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		outside := w.Bare("outside", nil)
		w.server.serve(t, ":8080", hello)
		for _, to := range []netip.Addr{w.server.Addr, w.server.Addr6} {
			if got := outside.mustAsk(t, addr(to, 8080)).Addr(); got != outside.Addr && got != outside.Addr6 {
				t.Errorf("server saw %v, want %v", got, outside.Addr)
			}
		}
		strict(w.Mesh, w.server)
		if _, err := outside.ask(t, addr(w.server.Addr, 8080), "x"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("plaintext under STRICT: %v, want ECONNREFUSED", err)
		}
		w.client.mustAsk(t, addr(w.server.Addr, 8080))
	})
}

// strict makes pods refuse plaintext, as istiod says it.
func strict(m *Mesh, pods ...*Pod) {
	m.Tell(&securityapi.Authorization{
		Name: "istio_converted_static_strict", Namespace: "istio-system",
		Scope: securityapi.Scope_WORKLOAD_SELECTOR, Action: securityapi.Action_DENY,
		Rules: []*securityapi.Rule{{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{{
			NotPrincipals: []*securityapi.StringMatch{{MatchType: &securityapi.StringMatch_Presence{Presence: &securityapi.Presence{}}}},
		}}}}}},
	})
	for _, p := range pods {
		p.Workload.AuthorizationPolicies = append(p.Workload.AuthorizationPolicies, "istio-system/istio_converted_static_strict")
		m.Tell(p.Workload)
	}
}

func TestLoopbackAndOwnAddressAreUntouched(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		w.server.serve(t, ":8080", hello)
		for _, to := range []string{"127.0.0.1:8080", "127.0.0.2:8080", "[::1]:8080", addr(w.server.Addr, 8080), addr(w.server.Addr6, 8080)} {
			w.server.mustAsk(t, to)
		}
		if s := w.server.Stack().Stats(); s.PacketsIn != 0 {
			t.Errorf("%d packets crossed the device", s.PacketsIn)
		}
	})
}

func TestRefusalsReachTheApp(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		w.Service("empty", 80, 8080)
		denied := w.Service("server", 80, 8080, w.server)
		w.server.serve(t, ":8080", hello)
		w.server.serve(t, ":8081", hello)
		w.Tell(&securityapi.Authorization{
			Name: "deny-8080", Namespace: Namespace, Scope: securityapi.Scope_NAMESPACE, Action: securityapi.Action_DENY,
			Rules: []*securityapi.Rule{{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{{DestinationPorts: []uint32{8080}}}}}}},
		})
		for _, c := range []struct {
			name, to string
			want     error
		}{
			{"closed port", addr(w.server.Addr, 7777), syscall.ECONNREFUSED},
			{"closed port v6", addr(w.server.Addr6, 7777), syscall.ECONNREFUSED},
			{"denied", denied.String(), syscall.ECONNREFUSED},
		} {
			t.Run(c.name, func(t *testing.T) {
				if got, err := w.client.ask(t, c.to, "x"); !errors.Is(err, c.want) {
					t.Errorf("answer %q, %v; want %v", got, err, c.want)
				}
			})
		}
		w.client.mustAsk(t, addr(w.server.Addr, 8081))
	})
}
