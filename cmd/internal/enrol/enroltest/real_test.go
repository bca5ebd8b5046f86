// Package enroltest tests the controller with the agent itself, on the kernel.
// It lies apart so that the controller's own tests run under the race detector.
package enroltest

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/cni"
	"github.com/ztun/ztun/cmd/internal/enrol"
	"github.com/ztun/ztun/cmd/internal/procs"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

const patience = 20 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// holder is a proxy that does nothing with its pods but hold their devices.
type holder struct{}

func (holder) Start(_ zds.Workload, files zds.Files) (zds.Proxy, error) { return held{files}, nil }

type held struct{ files zds.Files }

func (h held) Stop() { h.files.Close() }

// namespaces knows where each pod's processes are; finding them in a /proc is
// tested where it is done.
type namespaces map[string]string

func (n namespaces) Find(_ context.Context, targets []procs.Target) (map[string]*os.File, error) {
	out := map[string]*os.File{}
	for _, t := range targets {
		if path, ok := n[t.UID]; ok {
			f, err := os.Open(path)
			if err != nil {
				return nil, err
			}
			out[t.UID] = f
		}
	}
	return out, nil
}

func (namespaces) Verify(context.Context, *os.File, procs.Target) error { return nil }

func podNS(t *testing.T, ip string) *netnstest.NS {
	ns, host := netnstest.New(t, "pod"), netnstest.New(t, "host")
	netnstest.Veth(t, ns, "eth0", host, "veth0")
	ns.Addr("eth0", ip+"/24")
	host.Addr("veth0", "10.0.0.1/24")
	ns.Route("0.0.0.0/0", "10.0.0.1", "eth0")
	return ns
}

// captured says whether the pod's TCP goes to its device.
func captured(ns *netnstest.NS) bool {
	var rules []netlink.Rule
	ns.Do(func() { rules, _ = netlink.RuleList(netlink.FAMILY_V4) })
	return slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Priority == 110 })
}

func pod(name, ip string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "demo", UID: types.UID("uid-" + name)},
		Spec:       corev1.PodSpec{NodeName: "n1"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
	}
}

// start runs a part until the test ends.
func start(t *testing.T, run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// TestPodsOfBothWays: one was running, one comes through the plugin; both leave
// as pods leave.
func TestPodsOfBothWays(t *testing.T) {
	netnstest.Require(t)
	dir := t.TempDir()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	running, coming := podNS(t, "10.0.0.2"), podNS(t, "10.0.0.3")
	client := fake.NewClientset(pod("running", "10.0.0.2"), pod("coming", ""),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "demo", Labels: map[string]string{"istio.io/dataplane-mode": "ambient"}}})
	socket := filepath.Join(dir, "agent.sock")
	newAgent := func() (*agent.Agent, *enrol.Controller) {
		a, err := agent.New(agent.Config{StateDir: filepath.Join(dir, "state"), Socket: socket, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		c, err := enrol.New(enrol.Config{
			Client: client, Agent: a, NodeName: "n1", Log: log,
			Finder: namespaces{"uid-running": running.Path(), "uid-coming": coming.Path()},
		})
		if err != nil {
			t.Fatal(err)
		}
		return a, c
	}
	mark := func(name string) string {
		p, err := client.CoreV1().Pods("demo").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return p.Annotations["ambient.istio.io/redirection"]
	}

	a, c := newAgent()
	stopController := start(t, c.Run)
	<-c.Synced()
	stopAgent := start(t, a.Run)
	eventually(t, "a pod without a proxy is captured and pending", func() bool { return captured(running) && mark("running") == "pending" })
	start(t, zds.NewClient(zds.ClientConfig{Socket: socket, Starter: holder{}}).Run)
	eventually(t, "it is enabled", func() bool { return mark("running") == "enabled" })
	if err := c.Enrol(t.Context(), cni.Request{Netns: coming.Path(), PodName: "coming", PodNamespace: "demo", PodUID: "uid-coming"}); err != nil {
		t.Fatal(err)
	}
	if !captured(coming) || mark("coming") != "enabled" {
		t.Errorf("when Enrol returns the pod is captured: %v, annotated %q", captured(coming), mark("coming"))
	}

	// Both programs' next life, without the second pod.
	stopController()
	stopAgent()
	if err := client.CoreV1().Pods("demo").Delete(t.Context(), "coming", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	a, c = newAgent()
	start(t, c.Run)
	<-c.Synced()
	if st := a.Status(); len(st) != 1 || st[0].Pod.UID != "uid-running" {
		t.Errorf("before it serves proxies the agent knows %+v", st)
	}
	start(t, a.Run)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := a.Wait(ctx, "uid-running"); err != nil {
		t.Fatal(err)
	}
	if !captured(coming) {
		t.Error("the namespace of a pod that ended was touched")
	}

	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "demo"}}
	if _, err := client.CoreV1().Namespaces().Update(t.Context(), ns, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a pod whose namespace lost its label is free", func() bool { return mark("running") == "" })
	if captured(running) {
		t.Error("the annotation went before capture did")
	}
}
