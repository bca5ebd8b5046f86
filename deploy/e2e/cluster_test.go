package e2e

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestPlainPods(t *testing.T) {
	ctx := claim(t, "without a mesh, pods reach services by name, on one node and across")
	p := newPlace(ctx, t)
	p.run(pod{name: "client", node: "node1"}, pod{name: "near", node: "node1"}, pod{name: "far", node: "node2"})
	for _, server := range []string{"near", "far"} {
		a := p.until("an answer of "+server, works, "client", "get", "http://"+server+"/")
		if a.Seen.Host != server {
			t.Errorf("asked %s, %s answered", server, a.Seen.Host)
		}
		if want := p.get("client").Status.PodIP; !strings.HasPrefix(a.Seen.Peer, want+":") {
			t.Errorf("%s saw %s, want the client's address %s", server, a.Seen.Peer, want)
		}
		for _, command := range [][]string{{"tcp", server + ":9001"}, {"grpc", server + ":9002"}} {
			if a := p.ask("client", command...); a.Error != "" {
				t.Errorf("%v: %s", command, a.Error)
			}
		}
	}
}

func TestKubectl(t *testing.T) {
	ctx := claim(t, "exec, logs and port-forward reach a pod of the mesh")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "server", node: "node2", container: `stdin: false`})
	p.enrolled("server")
	if out, err := world.Exec(ctx, p.name, "server", "/app", "get", "http://127.0.0.1:8080/"); err != nil || !strings.Contains(out, `"host":"server"`) {
		t.Errorf("exec: %v: %s", err, out)
	}
	if _, err := world.Logs(ctx, p.name, "server", "app"); err != nil {
		t.Error(err)
	}
	address, err := world.Forward(ctx, p.name, "server", 8080)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get("http://" + address + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(body), `"host":"server"`) {
		t.Errorf("port-forward: %v: %s", err, body)
	}
}
