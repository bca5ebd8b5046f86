package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// roll asks a DaemonSet for new pods and waits until they are ready.
func roll(ctx context.Context, t *testing.T, name string) {
	t.Helper()
	patch := fmt.Sprintf(`{"spec": {"template": {"metadata": {"annotations": {"e2e": %q}}}}}`, t.Name())
	if _, err := world.AppsV1().DaemonSets(system).Patch(ctx, name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := world.Rolled(ctx, system, name); err != nil {
		t.Fatal(err)
	}
}

// A daemon is one of the chart's DaemonSets.
type daemon struct{ name, selector, container string }

var (
	proxies = daemon{proxyName, "app=ztunnel", "istio-proxy"}
	agents  = daemon{agentName, "k8s-app=istio-cni-node", "install-cni"}
)

// banish ends a daemon on one node, while it is still wanted there: its new pod
// has an image that no node has. It returns how to bring it back.
func banish(ctx context.Context, t *testing.T, d daemon, node string) (back func()) {
	t.Helper()
	return change(ctx, t, d, node, fmt.Sprintf(`{"containers": [{"name": %q, "image": "e2e.test/none:1"}]}`, d.container))
}

// change starts a daemon's pod of one node again with a changed spec, waits until
// the old one is gone, and returns how to undo it. The other node's stays.
func change(ctx context.Context, t *testing.T, d daemon, node, spec string) (back func()) {
	t.Helper()
	was, err := world.AppsV1().DaemonSets(system).Get(ctx, d.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	undo, err := json.Marshal([]map[string]any{
		{"op": "replace", "path": "/spec/template", "value": was.Spec.Template},
		{"op": "replace", "path": "/spec/updateStrategy", "value": was.Spec.UpdateStrategy},
	})
	if err != nil {
		t.Fatal(err)
	}
	pods, err := world.PodsOf(ctx, system, d.selector)
	if err != nil || pods[node] == nil {
		t.Fatalf("%s on %s: %v, %v", d.name, node, pods[node], err)
	}
	patch := `{"spec": {"updateStrategy": {"type": "OnDelete", "rollingUpdate": null}, "template": {"spec": ` + spec + `}}}`
	if _, err := world.AppsV1().DaemonSets(system).Patch(ctx, d.name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	p := &place{t: t, ctx: ctx, name: system}
	p.remove(pods[node].Name)
	return sync.OnceFunc(func() {
		t.Helper()
		// The case may have ended meanwhile, the cluster goes on.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := world.AppsV1().DaemonSets(system).Patch(ctx, d.name, types.JSONPatchType, undo, metav1.PatchOptions{}); err != nil {
			t.Error(err)
		}
		if err := world.Rolled(ctx, system, d.name); err != nil {
			t.Error(err)
		}
	})
}

// load is the constant traffic of a case: new connections, kept ones, and one that lives all the time.
type traffic struct {
	fresh, kept *session
	long        *session
}

func (p *place) traffic(client, server string, lasts time.Duration) traffic {
	p.t.Helper()
	p.meshed(client, server, "http://"+server+"/")
	d := "-for=" + lasts.String()
	return traffic{
		fresh: p.begin(client, "load", d, "-rate=20", "http://"+server+"/"),
		kept:  p.begin(client, "load", d, "-rate=20", "-keep", "http://"+server+"/"),
		long:  p.begin(client, "echo", d, server+":9000"),
	}
}

// whole wants that nothing failed, and prints the numbers.
func (r traffic) whole(t *testing.T) {
	t.Helper()
	for name, s := range map[string]*session{"new connections": r.fresh, "kept connections": r.kept} {
		var l loaded
		s.end(&l)
		t.Logf("%s: %d of %d requests, the slowest %d ms", name, l.OK, l.Sent, l.Longest)
		if l.OK != l.Sent {
			t.Errorf("%s: %d of %d requests failed: %v", name, l.Sent-l.OK, l.Sent, l.Errors)
		}
	}
	var e echoed
	r.long.end(&e)
	t.Logf("one long connection: %d rounds, %d bytes each way, the slowest %d ms", e.Rounds, e.Bytes, e.Longest)
	if e.Error != "" {
		t.Errorf("the long connection after %d rounds: %s", e.Rounds, e.Error)
	}
}

func TestAgentRestarts(t *testing.T) {
	ctx := claim(t, "a restart of the agent fails no request and no connection")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	running := p.traffic("client", "server", 30*time.Second)
	roll(ctx, t, agentName)
	running.whole(t)
	p.run(pod{name: "later", node: "node1"})
	p.enrolled("later")
}

func TestProxyRolls(t *testing.T) {
	ctx := claim(t, "a rolling update of the proxy under load fails no request, new or on an old connection")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	// The old proxy keeps its connections for the 30 s of its grace period: the load ends before.
	running := p.traffic("client", "server", 25*time.Second)
	roll(ctx, t, proxyName)
	running.whole(t)
}

func TestAgentMissing(t *testing.T) {
	ctx := claim(t, "while the agent is away a new pod of the mesh waits, and starts when it is back")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "old", node: "node2"})
	p.enrolled("old")
	back := banish(ctx, t, agents, "node1")
	t.Cleanup(back)
	p.start(pod{name: "new", node: "node1"})
	p.refused("new", "ztun-cni")
	back()
	if err := world.Ready(ctx, p.name, "new"); err != nil {
		t.Fatal(err)
	}
	p.enrolled("new")
	p.until("the new pod in the mesh", works, "new", "get", "http://old/")
}

func TestIstiodDown(t *testing.T) {
	ctx := claim(t, "without istiod, connections between known pods go on, new ones too; pods that start meanwhile come into the mesh when it is back")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.until("a way to the server", works, "client", "get", "http://server/")
	running := p.traffic("client", "server", 10*time.Second)
	world.StopIstiod()
	p.start(pod{name: "later", node: "node2"})
	p.until("a new client", works, "client", "get", "http://server/")
	running.whole(t)
	if err := world.StartIstiod(ctx); err != nil {
		t.Fatal(err)
	}
	if err := world.Ready(ctx, p.name, "later"); err != nil {
		t.Fatal(err)
	}
	p.enrolled("later")
	p.until("the later pod", works, "client", "get", "-timeout=2s", "http://later/")
	p.meshed("later", "server", "http://server/")
}

func TestSyncz(t *testing.T) {
	ctx := claim(t, "proxy-status of istiod (debug/syncz) lists each node's proxy")
	if err := applied(); err != nil {
		t.Fatal(err)
	}
	p := &place{t: t, ctx: ctx}
	p.wait("both proxies", func() error {
		text, err := world.Istiod(ctx, "/debug/syncz")
		if err != nil {
			return err
		}
		var status []struct {
			Proxy string `json:"proxy"`
		}
		if err := json.Unmarshal([]byte(text), &status); err != nil {
			return fmt.Errorf("%w: %s", err, text)
		}
		listed := map[string]bool{}
		for _, s := range status {
			listed[strings.TrimSuffix(s.Proxy, "."+system)] = true
		}
		proxies, err := world.PodsOf(ctx, system, "app=ztunnel")
		if err != nil {
			return err
		}
		for _, node := range []string{"node1", "node2"} {
			if proxy := proxies[node]; proxy == nil || !listed[proxy.Name] {
				return fmt.Errorf("the proxy of %s is not among %v", node, slices.Sorted(maps.Keys(listed)))
			}
		}
		return nil
	})
}
