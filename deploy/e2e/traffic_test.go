package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
)

// hbonePort is the only port on which pods of the mesh meet on the wire.
const hbonePort = 15008

func TestAcrossNodes(t *testing.T) {
	ctx := claim(t, "to a service and to a pod across nodes: HBONE, both identities in the logs, nothing but 15008 on the wire")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.talk("client", "server")
}

func TestOneNode(t *testing.T) {
	ctx := claim(t, "the same on one node")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node1"})
	p.talk("client", "server")
}

// talk sends every kind of traffic, and checks what logs and wires show of it.
func (p *place) talk(client, server string) {
	p.t.Helper()
	p.enrolled(client, server)
	from, to := p.get(client), p.get(server)
	p.until("an answer of "+server, works, client, "get", "http://"+server+"/")
	var wires []*cluster.Wire
	for _, n := range world.Nodes {
		w, err := n.Wire()
		if err != nil {
			p.t.Fatal(err)
		}
		wires = append(wires, w)
	}
	for _, command := range [][]string{
		{"get", "http://" + server + "/"},
		{"get", "http://" + net.JoinHostPort(to.Status.PodIP, "8080") + "/"},
		{"tcp", server + ":9001"},
		{"grpc", net.JoinHostPort(to.Status.PodIP, "9002")},
	} {
		a := p.ask(client, command...)
		if a.Error != "" {
			p.t.Errorf("%v: %s", command, a.Error)
		}
		if command[0] != "grpc" && !strings.HasPrefix(a.Seen.Peer, from.Status.PodIP+":") {
			p.t.Errorf("%v: the server saw %s, want the client's address %s", command, a.Seen.Peer, from.Status.PodIP)
		}
	}
	hbone := 0
	for _, w := range wires {
		hbone += wantOnlyHBONE(p.t, w.Close(), from.Status.PodIP, to.Status.PodIP)
	}
	// On one node the proxy hands streams over in memory.
	if across := from.Spec.NodeName != to.Spec.NodeName; across && hbone == 0 {
		p.t.Error("the wires saw no HBONE")
	}
	p.logged("direction=\"inbound\"", p.identity(client), p.identity(server))
	p.logged("direction=\"outbound\"", p.identity(client), p.identity(server))
}

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
