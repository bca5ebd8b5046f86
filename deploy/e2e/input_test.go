package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestConflist(t *testing.T) {
	ctx := claim(t, "a conflist that is not JSON is named by file, line and column; one that another plugin rewrote gets the plugin back, and pods come into the mesh")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	file := filepath.Join(world.Nodes[0].Root(), "etc/cni/net.d/10-bridge.conflist")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(whole), plugin) {
		t.Fatalf("%s does not name the plugin: %s", file, whole)
	}
	others := withoutPlugin(t, whole)
	write := func(text []byte) {
		t.Helper()
		// As plugins do it: a runtime never sees half a file.
		if err := errors.Join(os.WriteFile(file+".new", text, 0o644), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			write(whole)
		}
	})
	write([]byte("{\n  \"plugins\": what?\n}\n"))
	p.said(agents, "node1", "10-bridge.conflist", "not JSON at line 2, column 14")
	write(others)
	p.wait("the plugin to be back", func() error {
		text, err := os.ReadFile(file)
		if err == nil && !strings.Contains(string(text), plugin) {
			err = fmt.Errorf("not in %s", text)
		}
		return err
	})
	if err := world.Rolled(ctx, system, agentName); err != nil {
		t.Fatal(err)
	}
	p.run(pod{name: "later", node: "node1"})
	p.enrolled("later")
}

// plugin is the type of the chart's entry in a conflist.
const plugin = "ztun-cni"

// withoutPlugin is a conflist as its own plugin writes it.
func withoutPlugin(t *testing.T, text []byte) []byte {
	t.Helper()
	var list map[string]any
	if err := json.Unmarshal(text, &list); err != nil {
		t.Fatal(err)
	}
	var others []any
	for _, entry := range list["plugins"].([]any) {
		if entry.(map[string]any)["type"] != plugin {
			others = append(others, entry)
		}
	}
	list["plugins"] = others
	out, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestWrongAudience(t *testing.T) {
	ctx := claim(t, "a proxy whose token is for another audience names both and is not ready; a new pod of the mesh waits until the proxy is right")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "server", node: "node2"})
	p.enrolled("server")
	back := change(ctx, t, proxies, "node1", `{"volumes": [{"name": "istio-token", "projected": {"sources": [
		{"serviceAccountToken": {"path": "istio-token", "audience": "elsewhere"}}]}}]}`)
	t.Cleanup(back)
	p.said(proxies, "node1", "istiod.istio-system.svc:15012", "Unauthenticated", `the token is for audience \"elsewhere\"`)
	p.start(pod{name: "new", node: "node1"})
	p.refused("new", "no proxy connection")
	pods, err := world.PodsOf(ctx, system, proxies.selector)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range pods["node1"].Status.ContainerStatuses {
		if s.Ready {
			t.Errorf("%s is ready", pods["node1"].Name)
		}
	}
	back()
	if err := world.Ready(ctx, p.name, "new"); err != nil {
		t.Fatal(err)
	}
	p.enrolled("new")
	p.until("the new pod in the mesh", works, "new", "get", "-timeout=2s", "http://server/")
}

// said waits until a node's pod of a daemon has logged a line with all the words.
func (p *place) said(d daemon, node string, words ...string) {
	p.t.Helper()
	p.wait(fmt.Sprintf("%s of %s to say %q", d.name, node, words), func() error {
		pods, err := world.PodsOf(p.ctx, system, d.selector)
		if err != nil || pods[node] == nil {
			return errors.Join(errors.New("no such pod"), err)
		}
		text, err := world.Logs(p.ctx, system, pods[node].Name, d.container)
		for line := range strings.Lines(text) {
			if containsAll(line, words) {
				return nil
			}
		}
		return errors.Join(errors.New("no such line"), err)
	})
}

// refused waits until a pod's sandbox could not be made for a reason, and wants it to have no address.
func (p *place) refused(name, why string) {
	p.t.Helper()
	p.wait("the kubelet to be refused", func() error {
		events, err := world.CoreV1().Events(p.name).List(p.ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + name + ",reason=FailedCreatePodSandBox"})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if strings.Contains(e.Message, why) {
				return nil
			}
		}
		return fmt.Errorf("no event FailedCreatePodSandBox with %q", why)
	})
	if ip := p.get(name).Status.PodIP; ip != "" {
		p.t.Errorf("%s has address %s", name, ip)
	}
}
