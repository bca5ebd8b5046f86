package e2e

import (
	"strings"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
)

func TestEnrolRunning(t *testing.T) {
	ctx := claim(t, "a connection older than the mesh survives that its pods come in and leave; one made in the mesh is reset when they leave, never continued in plain text")
	mesh(t)
	p := newPlace(ctx, t)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.until("a way to the server", works, "client", "tcp", "server:9001")
	older := p.begin("client", "echo", "-for=12s", "server:9000")
	p.apply("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {%s}}}", p.name, ambient)
	p.enrolled("client", "server")
	p.meshed("client", "server", "http://server/")

	// From a port of its own, so that the wire tells it from the older one.
	const port = 30123
	var wires []*cluster.Wire
	for _, n := range world.Nodes {
		w, err := n.Wire()
		if err != nil {
			t.Fatal(err)
		}
		wires = append(wires, w)
	}
	inside := p.begin("client", "echo", "-for=60s", "-source-port=30123", "server:9000")
	p.apply("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {}}}", p.name)
	p.left("client", "server")
	older.wantOpen("the connection that is older than the mesh")
	var cut, whole echoed
	inside.end(&cut)
	t.Logf("of the mesh: %d rounds, then %s", cut.Rounds, cut.Error)
	if !strings.Contains(cut.Error, "reset") {
		t.Errorf("a connection of the mesh, after its pods left it: %q, want a reset", cut.Error)
	}
	for _, w := range wires {
		for _, s := range w.Close() {
			if s.Payload > 0 && (s.From.Port() == port || s.To.Port() == port) {
				t.Fatalf("a connection of the mesh in plain text: %v -> %v, %d bytes", s.From, s.To, s.Payload)
			}
		}
	}
	p.until("the server without the mesh", works, "client", "get", "http://server/")
	older.end(&whole)
	t.Logf("older than the mesh: %d rounds, the slowest %d ms", whole.Rounds, whole.Longest)
	if whole.Error != "" {
		t.Errorf("a connection older than the mesh after %d rounds: %s", whole.Rounds, whole.Error)
	}
}
