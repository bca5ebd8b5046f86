package e2e

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
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
	ctx := claim(t, "kubectl exec, logs and port-forward reach a pod of the mesh")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.apply(peerAuthentication, p.name, "STRICT")
	p.run(pod{name: "server", node: "node2", spec: fmt.Sprintf(
		`initContainers: [{name: first, image: %q, imagePullPolicy: Never, args: [get, "http://127.0.0.1:1/"]}]`, cluster.AppImage)})
	p.enrolled("server")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"exec", "server", "--", "/app", "get", "http://127.0.0.1:8080/"}, `"host":"server"`},
		{[]string{"logs", "server", "-c", "first"}, "connection refused"},
	} {
		out, err := world.RunKubectl(ctx, "", append([]string{"-n", p.name}, c.args...)...)
		if err != nil || !strings.Contains(out, c.want) {
			t.Errorf("kubectl %v: %v: %s", c.args, err, out)
		}
	}
	body, err := cluster.Fetch(ctx, "http://"+p.forward("server", "8080")+"/")
	if err != nil || !strings.Contains(body, `"host":"server"`) {
		t.Errorf("kubectl port-forward: %v: %s", err, body)
	}
}

// forward runs kubectl port-forward for the rest of the case, and returns the address to reach the pod's port at.
func (p *place) forward(name, port string) string {
	p.t.Helper()
	cmd := world.Kubectl(p.ctx, "-n", p.name, "port-forward", "pod/"+name, ":"+port)
	out, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		// Forwarding from 127.0.0.1:40123 -> 8080
		if fields := strings.Fields(lines.Text()); len(fields) == 5 && fields[0] == "Forwarding" {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return fields[2]
		}
	}
	p.t.Fatalf("kubectl port-forward ended: %v", lines.Err())
	return ""
}
