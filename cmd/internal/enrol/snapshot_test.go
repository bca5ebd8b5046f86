package enrol

import (
	"errors"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	clienttesting "k8s.io/client-go/testing"

	"github.com/ztun/ztun/cmd/internal/agent"
)

// status is a pod as an agent has it that was started again.
func status(p *corev1.Pod, netns string) *agent.Status {
	return &agent.Status{Pod: agent.Pod{
		UID: string(p.UID), Name: p.Name, Namespace: p.Namespace, ServiceAccount: "sa", Netns: netns, Addresses: statusAddresses(p),
	}}
}

func enabled(p *corev1.Pod) *corev1.Pod { return annotated(p, redirection, "enabled") }

// TestSnapshotComesBeforeTheQueue: what the agent knows when Synced is closed.
func TestSnapshotComesBeforeTheQueue(t *testing.T) {
	inNode(t, func(n *node) {
		n.agent.connect(false) // It does not run yet.
		n.agent.pods["gone"] = status(pod("gone", "gone", "10.0.0.3"), "/host/var/run/netns/cni-gone")
		n.agent.pods["done"] = status(pod("done", "done", "10.0.0.4"), "/host/var/run/netns/cni-done")
		n.agent.pods["other"] = status(pod("renamed", "other", "10.0.0.5"), "/host/var/run/netns/cni-other")
		kept := n.procs.run(n.T, "kept", "cni-kept", "10.0.0.6")
		n.agent.pods["kept"] = status(pod("kept", "kept", "10.0.0.6"), kept)
		found := n.procs.run(n.T, "lost", "cni-lost", "10.0.0.7")
		n.agent.pods["early"] = status(pod("early", "early"), "/host/var/run/netns/cni-early")
		n.procs.run(n.T, "new", "cni-new", "10.0.0.8")
		n.procs.run(n.T, "done", "cni-done2", "10.0.0.4")

		var known []string
		n.onSynced = func() { known = n.agent.uids() }
		n.start()
		for _, uid := range []string{"early", "kept", "lost"} {
			if !slices.Contains(known, uid) {
				t.Errorf("the agent does not know pod %s when it may serve proxies", uid)
			}
		}
		if calls := n.agent.take(); !slices.Equal(calls[:4], []string{"forget done", "forget gone", "forget other", "set lost"}) {
			t.Errorf("calls of the agent: %q, want first those of before proxies are served", calls)
		}
		if got := n.agent.pod("lost").Netns; got != found {
			t.Errorf("a pod that only its annotation tells of is in %q, want %q", got, found)
		}
		if got := n.agent.pod("kept").Netns; got != kept {
			t.Errorf("the namespace of a known pod became %q", got)
		}
		n.agent.connect(true)
		n.pass(retried)
		n.wantKnown("early", "kept", "lost", "new")
		n.wantMark("new", "enabled")
		n.wantMark("done", "-")
	}, namespace("demo", ambient...),
		enabled(phase(pod("done", "done", "10.0.0.4"), corev1.PodSucceeded)),
		enabled(pod("renamed", "another", "10.0.0.5")),
		enabled(pod("kept", "kept", "10.0.0.6")),
		enabled(pod("lost", "lost", "10.0.0.7")),
		pod("early", "early"),
		pod("new", "new", "10.0.0.8"))
}

// TestDescriptorOfAnEarlierAgentIsNotTrusted: its number is another file's now.
func TestDescriptorOfAnEarlierAgentIsNotTrusted(t *testing.T) {
	for _, netns := range []string{"/proc/self/fd/7", "/host/proc/1234/ns/net", "/proc/1234/ns/net"} {
		inNode(t, func(n *node) {
			n.agent.pods["u"] = status(pod("a", "u", "10.0.0.2"), netns)
			n.start()
			if got := n.agent.pod("u").Netns; got != agent.NotFound {
				t.Errorf("namespace %q of an earlier agent became %q", netns, got)
			}
			path := n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
			n.pass(retried)
			if got := n.agent.pod("u").Netns; got != path {
				t.Errorf("namespace %q, want %q", got, path)
			}
			n.wantCalls("set u", "set u")
		}, namespace("demo", ambient...), enabled(pod("a", "u", "10.0.0.2")))
	}
}

// TestSandboxMadeAgainWhileAway: the mount that was the pod's is not what its
// processes are in.
func TestSandboxMadeAgainWhileAway(t *testing.T) {
	for _, seen := range []bool{true, false} {
		inNode(t, func(n *node) {
			n.agent.pods["u"] = status(pod("a", "u", "10.0.0.2"), "/host/var/run/netns/cni-1")
			if seen {
				n.procs.run(n.T, "u", "cni-gone", "10.0.0.9")
				n.procs.wrong = 1 << 20 // They end before their namespace is used.
			}
			n.onSynced = func() {
				if got := n.agent.pod("u").Netns; got != agent.NotFound {
					t.Errorf("seen %v: with other addresses the agent has namespace %q", seen, got)
				}
			}
			n.start()
			want := n.procs.run(n.T, "u", "cni-2", "10.0.0.9")
			n.procs.mu.Lock()
			n.procs.wrong = 0
			n.procs.mu.Unlock()
			n.apply(labelled(enabled(pod("a", "u", "10.0.0.9")), "x", "y"))
			n.pass(retried)
			if got := n.agent.pod("u"); got.Netns != want || got.Addresses[0].String() != "10.0.0.9" {
				t.Errorf("seen %v: the agent was told of %+v", seen, got)
			}
		}, namespace("demo", ambient...), enabled(pod("a", "u", "10.0.0.9")))
	}
}

// TestAnnotatedPodWithoutStateIsCleaned: its label went while no agent ran, and
// with it the agent's state.
func TestAnnotatedPodWithoutStateIsCleaned(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		n.wantCalls("detach u")
		n.wantMark("a", "-")
		n.wantMark("host", "-")
		n.wantKnown()
	}, namespace("demo"), enabled(pod("a", "u", "10.0.0.2")), func() *corev1.Pod {
		p := enabled(pod("host", "h", "192.168.0.1"))
		p.Spec.HostNetwork = true
		return p
	}())
}

// TestSnapshotSetsNoPodThatIsNotWanted: its label went while no agent ran.
func TestSnapshotSetsNoPodThatIsNotWanted(t *testing.T) {
	c := decider(t, Config{}, namespace("demo"), enabled(pod("a", "u", "10.0.0.2")))
	m := c.cfg.Finder.(*memProcs)
	m.dir = t.TempDir()
	m.run(t, "u", "cni-1", "10.0.0.2")
	if err := c.snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if calls := c.cfg.Agent.(*memAgent).take(); len(calls) != 0 {
		t.Errorf("calls of the agent: %q", calls)
	}
}

// TestForgetThatFailsAtStart: no event will ever tell of such a pod again.
func TestForgetThatFailsAtStart(t *testing.T) {
	inNode(t, func(n *node) {
		n.agent.pods["gone"] = status(pod("gone", "gone", "10.0.0.3"), "/host/var/run/netns/cni-gone")
		n.agent.failForget = 1
		n.start()
		n.pass(retried)
		n.wantCalls("forget gone", "forget gone")
		n.wantKnown()
	}, namespace("demo", ambient...))
}

func TestScanErrorIsOnlyAWarning(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.err = errors.New("no /proc")
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		select {
		case <-n.c.Synced():
		default:
			t.Fatal("not synced")
		}
		n.wantKnown()
		n.procs.mu.Lock()
		n.procs.err = nil
		n.procs.mu.Unlock()
		n.pass(retried)
		n.wantKnown("u")
		n.wantMark("a", "enabled")
	}, namespace("demo", ambient...), enabled(pod("a", "u", "10.0.0.2")))
}

// TestInformersAskForTheNodesPods: the API server does the filtering.
func TestInformersAskForTheNodesPods(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		for _, a := range n.client.Actions() {
			var fields string
			switch a := a.(type) {
			case clienttesting.ListAction:
				fields = a.GetListRestrictions().Fields.String()
			case clienttesting.WatchAction:
				fields = a.GetWatchRestrictions().Fields.String()
			}
			if want := map[string]string{"pods": "spec.nodeName=n1"}[a.GetResource().Resource]; fields != want {
				t.Errorf("%s %s with fields %q, want %q", a.GetVerb(), a.GetResource().Resource, fields, want)
			}
		}
	}, namespace("demo"))
}

// TestBrokenWatchLosesNothing: a pod that went while nothing was heard.
func TestBrokenWatchLosesNothing(t *testing.T) {
	inNode(t, func(n *node) {
		w := watchThatBreaks(n, "pods")
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.procs.run(n.T, "u2", "cni-2", "10.0.0.3")
		n.start()
		n.wantCalls("set u")
		n.deletePod("a") // The watch is deaf.
		n.apply(pod("b", "u2", "10.0.0.3"))
		n.wantCalls()
		w.breaks()
		n.pass(time.Minute)
		n.wantKnown("u2")
		n.wantMark("b", "enabled")
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}
