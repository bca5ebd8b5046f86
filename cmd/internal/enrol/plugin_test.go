package enrol

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/ztun/ztun/cmd/internal/cni"
	"github.com/ztun/ztun/cmd/internal/enrol/marks"
)

// request is what the plugin says of pod a.
func request(uid, netns string, ips ...string) cni.Request {
	r := cni.Request{Netns: netns, PodName: "a", PodNamespace: "demo", PodUID: uid}
	for _, ip := range ips {
		a := netip.MustParseAddr(ip)
		r.IPs = append(r.IPs, netip.PrefixFrom(a, a.BitLen()))
	}
	return r
}

// enrol calls Enrol, which must not take longer than the plugin waits.
func (n *node) enrol(r cni.Request) error {
	n.Helper()
	before := time.Now()
	err := n.c.Enrol(n.Context(), r)
	if took := time.Since(before); took >= 5*time.Second {
		n.Errorf("Enrol took %v", took)
	}
	synctest.Wait()
	return err
}

func TestEnrolReturnsWhenServed(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		if err := n.enrol(request("u", "/var/run/netns/cni-1", "10.0.0.2", "fd00::2")); err != nil {
			t.Fatal(err)
		}
		n.wantCalls("set u")
		n.wantMark("a", "enabled")
		if got := n.agent.pod("u"); got.Netns != filepath.Join(n.cfg.NetnsDir, "cni-1") || !slices.Equal(got.Addresses, addrs("10.0.0.2", "fd00::2")) || got.ServiceAccount != "sa" {
			t.Errorf("the agent was told of %+v", got)
		}
		// The status comes, in another order, and changes nothing.
		n.apply(pod("a", "u", "fd00::2", "10.0.0.2"))
		n.pass(retried)
		n.wantCalls()
		if n.procs.scans != 0 {
			t.Errorf("%d scans for a pod that the plugin brought", n.procs.scans)
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}

func TestEnrolLeavesOthersAlone(t *testing.T) {
	for name, p := range map[string]*corev1.Pod{
		"no label":    pod("a", "u"),
		"opted out":   labelled(pod("a", "u"), marks.ModeLabel, "ambient", skipMark, "true"),
		"hostNetwork": labelled(pod("a", "u"), ambient...),
	} {
		t.Run(name, func(t *testing.T) {
			p.Spec.HostNetwork = name == "hostNetwork"
			inNode(t, func(n *node) {
				n.agent.connect(false)
				n.start()
				if err := n.enrol(request("u", "/var/run/netns/cni-1", "10.0.0.2")); err != nil {
					t.Fatal(err)
				}
				n.wantCalls()
				n.wantMark("a", "-")
			}, namespace("demo"), p)
		})
	}
}

func TestEnrolFailsWithoutProxy(t *testing.T) {
	inNode(t, func(n *node) {
		n.agent.connect(false)
		n.start()
		err := n.enrol(request("u", "/var/run/netns/cni-1", "10.0.0.2"))
		if err == nil || !strings.Contains(err.Error(), "demo/a") {
			t.Fatalf("Enrol = %v, want an error that names the pod", err)
		}
		n.wantMark("a", "-")
		n.pass(retried)
		n.wantMark("a", "pending")
		n.agent.take()
		// The kubelet tries again, in another sandbox.
		n.agent.connect(true)
		if err := n.enrol(request("u", "/var/run/netns/cni-2", "10.0.0.3")); err != nil {
			t.Fatal(err)
		}
		n.wantMark("a", "enabled")
		n.wantCalls("set u")
		if got := n.agent.pod("u").Netns; got != filepath.Join(n.cfg.NetnsDir, "cni-2") {
			t.Errorf("namespace %s", got)
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}

func TestEnrolWaitsForThePodToBeSeen(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		result := make(chan error, 1)
		go func() { result <- n.c.Enrol(n.Context(), request("u2", "/var/run/netns/cni-1", "10.0.0.2")) }()
		synctest.Wait()
		n.namespace("demo", ambient...)
		n.apply(pod("a", "u1")) // The one that had the name before.
		n.apply(labelled(pod("a", "u1"), "x", "y"))
		select {
		case err := <-result:
			t.Fatalf("Enrol of a pod that was not seen = %v", err)
		default:
		}
		n.apply(pod("a", "u2"))
		if err := <-result; err != nil {
			t.Fatal(err)
		}
		n.wantKnown("u2")
	})
}

func TestEnrolGivesUpInTime(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		if err := n.enrol(request("u", "/var/run/netns/cni-1")); err == nil || !strings.Contains(err.Error(), "not found") {
			t.Errorf("Enrol of an unknown pod = %v", err)
		}
		n.apply(pod("a", "u")) // Its namespace is not seen.
		if err := n.enrol(request("u", "/var/run/netns/cni-1")); err == nil || !strings.Contains(err.Error(), "namespace") {
			t.Errorf("Enrol in an unknown namespace = %v", err)
		}
		n.wantKnown()
	})
}

func TestEnrolBeforeTheCachesAreFull(t *testing.T) {
	inNode(t, func(n *node) {
		n.cfg.ExcludeNamespaces = []string{"kube-system"}
		c, err := New(n.cfg)
		if err != nil {
			t.Fatal(err)
		}
		n.c = c
		n.stop = func() { c.queue.ShutDown() }
		if err := n.enrol(request("u", "/var/run/netns/cni-1")); err == nil || !strings.Contains(err.Error(), "API server") {
			t.Errorf("Enrol = %v", err)
		}
		r := request("u", "/var/run/netns/cni-1")
		r.PodNamespace = "kube-system"
		if err := n.enrol(r); err != nil {
			t.Errorf("Enrol in an excluded namespace = %v: what the API server needs must start without it", err)
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}

func TestEnrolRefusesHalfARequest(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		for _, r := range []cni.Request{{}, {PodName: "a", PodNamespace: "demo"}, {PodName: "a", Netns: "/n"}, {PodNamespace: "demo", Netns: "/n"}} {
			if err := n.enrol(r); err == nil {
				t.Errorf("Enrol(%+v) = nil", r)
			}
		}
		n.agent.refuse = 1
		if err := n.enrol(request("u", "/var/run/netns/cni-1")); err == nil || !strings.Contains(err.Error(), "no such pod") {
			t.Errorf("Enrol of a pod that the agent refuses = %v", err)
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}

// TestPluginIsRightUntilTheStatusCatchesUp: after its sandbox was made again a
// pod's status still names the addresses of the first.
func TestPluginIsRightUntilTheStatusCatchesUp(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		for i, step := range []struct {
			plugin string // Empty: only the status changes.
			status []string
			want   string
		}{
			{plugin: "10.0.0.2", want: "10.0.0.2"},
			{status: []string{"10.0.0.2"}, want: "10.0.0.2"},
			{plugin: "10.0.0.3", status: []string{"10.0.0.2"}, want: "10.0.0.3"},
			{status: []string{"10.0.0.2"}, want: "10.0.0.3"},
			{status: nil, want: "10.0.0.3"},
			{status: []string{"10.0.0.3"}, want: "10.0.0.3"},
		} {
			if step.plugin != "" {
				if err := n.enrol(request("u", fmt.Sprintf("/var/run/netns/cni-%d", i), step.plugin)); err != nil {
					t.Fatal(err)
				}
			}
			n.apply(labelled(pod("a", "u", step.status...), "step", fmt.Sprint(i)))
			n.pass(time.Second)
			if got := n.agent.pod("u"); !slices.Equal(got.Addresses, addrs(step.want)) {
				t.Errorf("step %d: addresses %v, want %s", i, got.Addresses, step.want)
			}
		}
		if n.procs.scans != 0 {
			t.Errorf("%d scans for a pod that the plugin brought", n.procs.scans)
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}

// TestEnrolOvertakesTheQueue: a decision of the queue that is older than the
// plugin's word does not undo it.
func TestEnrolOvertakesTheQueue(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		if err := n.enrol(request("u", "/var/run/netns/cni-1", "10.0.0.2")); err != nil {
			t.Fatal(err)
		}
		before, _ := n.c.known.get("u")
		if err := n.enrol(request("u", "/var/run/netns/cni-2", "10.0.0.3")); err != nil {
			t.Fatal(err)
		}
		if err := n.c.known.set(before, before.serial); err != errOvertaken {
			t.Errorf("set = %v, want %v", err, errOvertaken)
		}
		if got := n.agent.pod("u").Netns; got != filepath.Join(n.cfg.NetnsDir, "cni-2") {
			t.Errorf("namespace %s", got)
		}
		n.c.known.drop("u", before.serial)
		if _, ok := n.c.known.get("u"); !ok {
			t.Error("a pod that was enrolled again is dropped")
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}

func TestEnrolOfStaticPod(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		if err := n.enrol(request("0123hash", "/var/run/netns/cni-1", "10.0.0.2")); err != nil {
			t.Fatal(err)
		}
		n.wantKnown("u")
	}, namespace("demo", ambient...), annotated(pod("a", "u"), corev1.MirrorPodAnnotationKey, "0123hash"))
}

func TestEnrolOfPodThatLeavesMeanwhile(t *testing.T) {
	inNode(t, func(n *node) {
		n.agent.connect(false)
		n.start()
		result := make(chan error, 1)
		go func() { result <- n.c.Enrol(n.Context(), request("u", "/var/run/netns/cni-1", "10.0.0.2")) }()
		synctest.Wait()
		n.wantKnown("u")
		n.deletePod("a")
		n.pass(time.Second)
		n.wantKnown()
		if err := <-result; err == nil {
			t.Error("Enrol of a deleted pod = nil")
		}
		n.pass(retried)
		n.wantKnown()
	}, namespace("demo", ambient...), pod("a", "u"))
}

func TestEnrolSurvivesAnAnnotationThatFails(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		n.fail("patch", "pods", 2)
		if err := n.enrol(request("u", "/var/run/netns/cni-1", "10.0.0.2")); err != nil {
			t.Errorf("Enrol = %v for a pod that is captured and served", err)
		}
		n.pass(retried)
		n.wantMark("a", "enabled")
	}, namespace("demo", ambient...), pod("a", "u"))
}

func TestEnrolEndsWithItsCaller(t *testing.T) {
	inNode(t, func(n *node) {
		n.agent.connect(false)
		n.start()
		ctx, cancel := context.WithTimeout(n.Context(), time.Second)
		defer cancel()
		before := time.Now()
		if err := n.c.Enrol(ctx, request("u", "/var/run/netns/cni-1", "10.0.0.2")); err == nil || time.Since(before) != time.Second {
			t.Errorf("Enrol = %v after %v", err, time.Since(before))
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}
