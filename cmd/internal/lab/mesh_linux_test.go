package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun/netnstest"
)

const example = "../../../deploy/examples/hello/hello.yaml"

// A meshLab is a lab of the example, in a directory that the test may change.
type meshLab struct {
	*Lab
	t    *testing.T
	file string
	yaml string
}

func startMesh(t *testing.T) *meshLab {
	t.Helper()
	text, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m := &meshLab{t: t, file: filepath.Join(dir, "hello.yaml")}
	m.write(string(text))
	m.Lab = start(t, Options{Dir: dir, Proxy: realProxy})
	m.answers("client")
	t.Cleanup(func() {
		if t.Failed() {
			m.Logs(context.Background(), "", false, os.Stderr)
		}
	})
	return m
}

func (m *meshLab) write(yaml string) {
	m.t.Helper()
	m.yaml = yaml
	if err := os.WriteFile(m.file, []byte(yaml), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// call calls the service from a pod.
func (m *meshLab) call(pod string) (string, int) {
	m.t.Helper()
	return run(m.t, m.Lab, pod, "ztun", "lab", "call", "http://server", "--timeout", "2s")
}

// answers waits until the service answers a pod.
func (m *meshLab) answers(pod string) {
	m.t.Helper()
	netnstest.Eventually(m.t, "the service answers "+pod, func() bool {
		out, code := m.call(pod)
		return code == 0 && strings.Contains(out, "server: server")
	})
}

// refuses waits until the service refuses a pod.
func (m *meshLab) refuses(pod string) {
	m.t.Helper()
	netnstest.Eventually(m.t, "the service refuses "+pod, func() bool {
		_, code := m.call(pod)
		return code == int(syscall.ECONNREFUSED)
	})
}

func (m *meshLab) pod(name string) PodStatus {
	m.t.Helper()
	status, err := m.Status(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	for _, p := range status.Pods {
		if p.Name == name {
			return p
		}
	}
	m.t.Fatalf("no pod %s in %+v", name, status.Pods)
	return PodStatus{}
}

func TestPolicyFollowsTheDirectory(t *testing.T) {
	m := startMesh(t)
	m.refuses("stranger")
	m.write(strings.ReplaceAll(m.yaml, "sa/client", "sa/stranger"))
	m.answers("stranger")
	m.refuses("client")
}

func TestProxiesHoldNoCapability(t *testing.T) {
	m := startMesh(t)
	status, err := m.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range status.Nodes {
		if n.CapEff != "0000000000000000" {
			t.Errorf("CapEff of the proxy of %s = %q, want none", n.Name, n.CapEff)
		}
	}
}

// A pod leaves the mesh and comes back without its containers noticing.
func TestEnrolmentFollowsTheLabel(t *testing.T) {
	m := startMesh(t)
	before := m.pod("client")
	meshed := m.yaml
	m.write(strings.Replace(meshed, "labels: {app: client}", "labels: {app: client, istio.io/dataplane-mode: none}", 1))
	netnstest.Eventually(t, "the pod has left the mesh", func() bool {
		p := m.pod("client")
		out, _ := run(t, m.Lab, "client", "ip", "rule")
		return !p.Enrolled && p.Phase == "" && !strings.Contains(out, "iif ztun0")
	})
	// Without an identity the policy refuses it, in plain text.
	address := m.pod("server").Addresses[0]
	if out, code := run(t, m.Lab, "client", "ztun", "lab", "call", fmt.Sprintf("http://%s:8080", address), "--timeout", "2s"); code == 0 {
		t.Errorf("call from outside of the mesh = %q, want a refusal", out)
	}
	m.write(meshed)
	m.answers("client")
	after := m.pod("client")
	if after.Containers[0].PID != before.Containers[0].PID || after.Containers[0].Starts != 1 {
		t.Errorf("container was %+v and is %+v, want the same process", before.Containers[0], after.Containers[0])
	}
}

// Whatever of the mesh's own processes dies, it comes back, and meanwhile no
// pod is without capture.
func TestMeshSurvivesItsOwnProcesses(t *testing.T) {
	m := startMesh(t)
	for _, process := range []string{"control", "attach/node-a", "attach/node-b", "proxy/node-a", "proxy/node-b"} {
		t.Run(process, func(t *testing.T) {
			m := &meshLab{Lab: m.Lab, t: t}
			if err := m.Kill(t.Context(), process, unix.SIGKILL, false); err != nil {
				t.Fatal(err)
			}
			if out, _ := run(t, m.Lab, "client", "ip", "rule"); !strings.Contains(out, "iif ztun0") {
				t.Errorf("rules of the client after kill -9 of %s: %s", process, out)
			}
			m.answers("client")
			m.refuses("stranger")
		})
	}
}

// A node whose proxy and attach side are both gone is closed, for pods of the
// same node too.
func TestPodIsClosedWithoutItsNode(t *testing.T) {
	m := startMesh(t)
	for _, process := range []string{"proxy/node-b", "attach/node-b"} {
		if err := m.Kill(t.Context(), process, unix.SIGKILL, true); err != nil {
			t.Fatal(err)
		}
	}
	address := m.pod("server").Addresses[0]
	for _, from := range []string{"client", "node/node-b", "fabric"} {
		out, code := run(t, m.Lab, from, "ztun", "lab", "call", fmt.Sprintf("http://%s:8080", address), "--timeout", "1s")
		if code == 0 {
			t.Errorf("call from %s = %q, want none", from, out)
		}
	}
	if err := m.Release(t.Context(), "node-b"); err != nil {
		t.Fatal(err)
	}
	m.answers("client")
}

func TestRemovedPodLeavesNoPortAndNoAddress(t *testing.T) {
	m := startMesh(t)
	start := strings.Index(m.yaml, "apiVersion: v1\nkind: Pod\nmetadata:\n  name: stranger")
	end := start + strings.Index(m.yaml[start:], "---\n")
	if start < 0 || end < start {
		t.Fatal("the example has no pod stranger")
	}
	whole, address := m.yaml, m.pod("stranger").Addresses[0]
	ports := func() string {
		out, _ := run(t, m.Lab, "node/node-a", "ip", "-br", "link", "show", "type", "veth")
		return out
	}
	before := strings.Count(ports(), "\n")
	m.write(whole[:start] + whole[end:])
	netnstest.Eventually(t, "pod and port are gone", func() bool { return strings.Count(ports(), "\n") == before-1 })
	netnstest.Eventually(t, "the node has forgotten the pod", func() bool {
		known, _ := run(t, m.Lab, "node/node-a", "ip", "neigh", "show", address.String())
		return known == ""
	})
	m.write(whole)
	netnstest.Eventually(t, "the pod is back", func() bool {
		status, err := m.Status(t.Context())
		return err == nil && len(status.Pods) == 3
	})
	if got := m.pod("stranger").Addresses[0]; got != address {
		t.Errorf("address of the new pod = %v, want the freed %v", got, address)
	}
	m.refuses("stranger")
}
