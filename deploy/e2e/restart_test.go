package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztun/ztun/deploy/e2e/cluster"
	"golang.org/x/sys/unix"
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

// banish ends a DaemonSet's pods, while it still wants one on each node: the
// new ones have an image that no node has. It returns how to bring them back.
func banish(ctx context.Context, t *testing.T, name, selector, container string) (back func()) {
	t.Helper()
	set := func(ctx context.Context, image string) {
		patch := fmt.Sprintf(`{"spec": {"template": {"spec": {"containers": [{"name": %q, "image": %q}]}}}}`, container, image)
		if _, err := world.AppsV1().DaemonSets(system).Patch(ctx, name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Error(err)
		}
	}
	pods := world.CoreV1().Pods(system)
	set(ctx, "e2e.test/none:1")
	if err := pods.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: selector}); err != nil {
		t.Fatal(err)
	}
	p := &place{t: t, ctx: ctx}
	p.wait("no pod of "+name+" to run", func() error {
		list, err := pods.List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return err
		}
		for _, pod := range list.Items {
			for _, s := range pod.Status.ContainerStatuses {
				if s.State.Running != nil {
					return fmt.Errorf("%s runs", pod.Name)
				}
			}
		}
		return nil
	})
	return sync.OnceFunc(func() {
		t.Helper()
		// The case may have ended meanwhile, the cluster goes on.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		set(ctx, cluster.ZtunImage)
		if err := world.Rolled(ctx, system, name); err != nil {
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
	for _, command := range [][]string{{"get", "http://" + server + "/"}, {"tcp", server + ":9001"}} {
		p.until("a way to "+server, works, client, command...)
	}
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
	back := banish(ctx, t, agentName, "k8s-app=istio-cni-node", "install-cni")
	t.Cleanup(back)
	p.start(pod{name: "new", node: "node1"})
	p.wait("the kubelet to be refused", func() error {
		events, err := world.CoreV1().Events(p.name).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=new,reason=FailedCreatePodSandBox"})
		if err == nil && len(events.Items) == 0 {
			err = errors.New("no event FailedCreatePodSandBox")
		}
		return err
	})
	if ip := p.get("new").Status.PodIP; ip != "" {
		t.Errorf("the pod has address %s without an agent", ip)
	}
	back()
	if err := world.Ready(ctx, p.name, "new"); err != nil {
		t.Fatal(err)
	}
	p.enrolled("new")
	p.until("the new pod in the mesh", works, "new", "get", "http://old/")
}

func TestKilled(t *testing.T) {
	ctx := claim(t, "after kill -9 of both proxies nothing leaves in plain text, and all comes back")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.until("a way to the server", works, "client", "get", "http://server/")
	w, err := world.Nodes[0].Wire()
	if err != nil {
		t.Fatal(err)
	}
	running := p.begin("client", "load", "-for=10s", "-rate=10", "-timeout=2s", "http://server/")
	if n := kill(t, "ztun-proxy"); n == 0 {
		t.Fatal("no proxy ran")
	}
	var l loaded
	running.end(&l)
	t.Logf("%d of %d requests while both proxies were killed: %v", l.OK, l.Sent, l.Errors)
	p.until("the server again", works, "client", "get", "-timeout=2s", "http://server/")
	wantOnlyHBONE(t, w.Close(), p.get("client").Status.PodIP, p.get("server").Status.PodIP)
	if err := world.Rolled(ctx, system, proxyName); err != nil {
		t.Error(err)
	}
}

// kill ends at once every process of the cluster with that program's name, and says how many.
func kill(t *testing.T, program string) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		comm, err := os.ReadFile("/proc/" + e.Name() + "/comm")
		if err == nil && strings.TrimSpace(string(comm)) == program && unix.Kill(pid, unix.SIGKILL) == nil {
			n++
		}
	}
	return n
}

func TestIstiodDown(t *testing.T) {
	ctx := claim(t, "without istiod, connections between known pods go on, new ones too")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.until("a way to the server", works, "client", "get", "http://server/")
	world.StopIstiod()
	running := p.traffic("client", "server", 10*time.Second)
	running.whole(t)
	if err := world.StartIstiod(ctx); err != nil {
		t.Fatal(err)
	}
	p.run(pod{name: "later", node: "node2"})
	p.enrolled("later")
	p.until("a pod that came after", works, "client", "get", "http://later/")
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
