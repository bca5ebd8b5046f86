package lab

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

// The command of a node's other proxy becomes the process that the lab knows,
// with a stock ztunnel's environment and as the lab's root.
func TestNodeRunsAnotherProxy(t *testing.T) {
	command := `NOTE='two words' sh -c 'env >seen.new; id -u >>seen.new; mv seen.new seen; exec sleep 100000'`
	l := start(t, Options{
		Files: map[string]string{"mesh.yaml": plainMesh},
		Nodes: map[string]NodePrograms{"node-a": {Proxy: command}},
	})
	dir := runtimeDir + "/nodes/node-a/"
	var seen string
	netnstest.Eventually(t, "the command runs", func() (ok bool) {
		var code int
		seen, code = run(t, l, "fabric", "cat", dir+"seen")
		return code == 0
	})
	lines := strings.Split(strings.TrimSpace(seen), "\n")
	for _, want := range []string{
		"NOTE=two words", "PROXY_MODE=shared", "CLUSTER_ID=Kubernetes", "NODE_NAME=node-a",
		"INPOD_UDS=" + dir + "agent.sock", "AUTH_TOKEN=" + dir + "token", "XDS_ROOT_CA=" + dir + "root-cert.pem", "0",
	} {
		if !slices.Contains(lines, want) {
			t.Errorf("no line %q in:\n%s", want, seen)
		}
	}
	netnstest.Eventually(t, "the lab knows the command's process", func() bool {
		status, err := l.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(status.Nodes, func(n NodeStatus) bool { return n.Name == "node-a" })
		got, _ := run(t, l, "fabric", "cat", fmt.Sprintf("/proc/%d/cmdline", status.Nodes[i].Proxy.PID))
		return got == "sleep\x00100000\x00"
	})
	if seen, code := run(t, l, "fabric", "cat", runtimeDir+"/nodes/node-b/seen"); code == 0 {
		t.Errorf("the other node ran it too: %s", seen)
	}
}
