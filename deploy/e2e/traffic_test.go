package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
)

// hbonePort is the only port on which pods of the mesh meet on the wire.
const hbonePort = 15008

func TestAcrossNodes(t *testing.T) {
	talk(t, "node2", ipv4, "to a service and to a pod across nodes: HBONE, both identities in the logs, nothing but 15008 on the wire")
}

func TestOneNode(t *testing.T) {
	talk(t, "node1", ipv4, "the same on one node, where the proxy joins both ends in memory")
}

func TestAcrossNodesIPv6(t *testing.T) {
	talk(t, "node2", ipv6, "the same across nodes over IPv6")
}

func TestOneNodeIPv6(t *testing.T) {
	talk(t, "node1", ipv6, "the same on one node over IPv6")
}

// A family is an index of a pod's addresses, and what a service says of it.
type family int

const (
	ipv4 family = iota
	ipv6
)

func (f family) String() string { return [...]string{"IPv4", "IPv6"}[f] }

// talk sends every kind of traffic from a pod of node1 to one of another node,
// or of its own, and checks what logs and wires show of it.
func talk(t *testing.T, node string, f family, text string) {
	ctx := claim(t, text)
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: node})
	p.enrolled("client", "server")
	p.apply(familyService, p.name, f)
	from, to := p.get("client").Status.PodIPs[f].IP, p.get("server").Status.PodIPs[f].IP
	var joined []string
	if node == "node1" {
		joined = []string{`path="same-node"`}
	}
	p.meshed("client", "server", "http://only/", joined...)
	var wires []*cluster.Wire
	for _, n := range world.Nodes {
		w, err := n.Wire()
		if err != nil {
			t.Fatal(err)
		}
		wires = append(wires, w)
	}
	for _, command := range [][]string{
		{"get", "http://only/"},
		{"get", "http://" + net.JoinHostPort(to, "8080") + "/"},
		{"tcp", "only:9001"},
		{"grpc", net.JoinHostPort(to, "9002")},
	} {
		a := p.ask("client", command...)
		if a.Error != "" {
			t.Errorf("%v: %s", command, a.Error)
		}
		if host, _, err := net.SplitHostPort(a.Seen.Peer); command[0] != "grpc" && (err != nil || host != from) {
			t.Errorf("%v: the server saw %s, want the client's address %s", command, a.Seen.Peer, from)
		}
	}
	hbone := 0
	for _, w := range wires {
		hbone += wantOnlyHBONE(t, w.Close(), from, to)
	}
	// On one node the proxy hands streams over in memory.
	if across := node != "node1"; across && hbone == 0 {
		t.Error("the wires saw no HBONE")
	}
	p.logged(append(joined, net.JoinHostPort(to, "9002"), `direction="outbound"`, p.identity("client"), p.identity("server"))...)
}

const familyService = `{apiVersion: v1, kind: Service, metadata: {name: only, namespace: %[1]s}, spec: {
  ipFamilies: [%[2]s], selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}, {name: first, port: 9001}]}}`

// wantOnlyHBONE wants nothing else between two pods, and counts its segments.
func wantOnlyHBONE(t *testing.T, segments []cluster.Segment, a, b string) (hbone int) {
	t.Helper()
	one, two := netip.MustParseAddr(a), netip.MustParseAddr(b)
	for _, s := range segments {
		between := s.From.Addr() == one && s.To.Addr() == two || s.From.Addr() == two && s.To.Addr() == one
		if !between {
			continue
		}
		if s.From.Port() != hbonePort && s.To.Port() != hbonePort {
			t.Errorf("a segment that is not HBONE between pods: %v -> %v, %d bytes", s.From, s.To, s.Payload)
			return hbone
		}
		hbone++
	}
	return hbone
}

const peerAuthentication = `{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: default, namespace: %s}, spec: {mtls: {mode: %s}}}`

func TestModes(t *testing.T) {
	ctx := claim(t, "STRICT refuses plain text of a pod that is not in the mesh, PERMISSIVE lets it in")
	mesh(t)
	p := newPlace(ctx, t)
	p.run(pod{name: "outside", node: "node1"}, pod{name: "inside", node: "node1", labels: []string{ambient}},
		pod{name: "server", node: "node2", labels: []string{ambient}})
	p.enrolled("inside", "server")
	url := "http://" + net.JoinHostPort(p.get("server").Status.PodIP, "8080") + "/"
	p.until("PERMISSIVE", works, "outside", "get", url)
	p.apply(peerAuthentication, p.name, "STRICT")
	p.until("STRICT", fails, "outside", "get", "-timeout=2s", url)
	if a := p.ask("inside", "get", url); a.Error != "" {
		t.Errorf("STRICT, a pod of the mesh: %s", a.Error)
	}
	p.apply(peerAuthentication, p.name, "PERMISSIVE")
	p.until("PERMISSIVE again", works, "outside", "get", url)
}

const policy = `{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: %[2]s, namespace: %[1]s},
  spec: {selector: {matchLabels: {app: server}}, action: %[3]s, rules: [%[4]s]}}`

func TestPolicies(t *testing.T) {
	ctx := claim(t, "AuthorizationPolicy allows and denies by principal, namespace and port")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "good", node: "node1"}, pod{name: "bad", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("good", "bad", "server")
	const url, port = "http://server/", "server:9001"
	p.until("no policy yet", works, "bad", "get", url)
	for _, c := range []struct {
		name, action, rule   string
		goodWeb, badWeb, raw bool // raw: good's, to port 9001
	}{
		{"allow-principal", "ALLOW", `{from: [{source: {principals: ["cluster.local/ns/` + p.name + `/sa/good"]}}]}`, true, false, true},
		{"deny-principal", "DENY", `{from: [{source: {principals: ["cluster.local/ns/` + p.name + `/sa/bad"]}}]}`, true, false, true},
		{"allow-namespace", "ALLOW", `{from: [{source: {namespaces: [elsewhere]}}]}`, false, false, false},
		{"deny-port", "DENY", `{to: [{operation: {ports: ["9001"]}}]}`, true, true, false},
	} {
		p.apply(policy, p.name, c.name, c.action, c.rule)
		for _, e := range []struct {
			works   bool
			from    string
			command []string
		}{{c.goodWeb, "good", []string{"get", url}}, {c.badWeb, "bad", []string{"get", url}}, {c.raw, "good", []string{"tcp", port}}} {
			ok := fails
			if e.works {
				ok = works
			}
			p.until(fmt.Sprintf("%s: %s %v to work: %t", c.name, e.from, e.command, e.works), ok, e.from, e.command...)
		}
		if err := world.Delete(ctx, fmt.Sprintf(policy, p.name, c.name, c.action, c.rule)); err != nil {
			t.Fatal(err)
		}
		p.until("without "+c.name, works, "bad", "get", url)
		p.until("without "+c.name, works, "good", "tcp", port)
	}
}

func TestPolicyCuts(t *testing.T) {
	ctx := claim(t, "a policy that comes later cuts a live connection")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.until("a way to the server", works, "client", "tcp", "server:9001")
	live := p.begin("client", "echo", "-for=60s", "server:9000")
	p.apply(policy, p.name, "deny-all", "DENY", `{from: [{source: {namespaces: [`+p.name+`]}}]}`)
	var e echoed
	live.end(&e)
	if e.Error == "" {
		t.Errorf("the connection lived on: %+v", e)
	}
}
