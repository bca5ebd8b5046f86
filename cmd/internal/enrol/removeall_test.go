package enrol

import (
	"slices"
	"testing"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/enrol/marks"
)

// TestDetachedWhereItIs: a pod whose namespace the agent does not find is not out
// of the mesh before what was done to it is undone.
func TestDetachedWhereItIs(t *testing.T) {
	for _, tt := range []struct {
		name, netns string
		runs        bool // Processes of the pod are found.
		calls       []string
	}{
		{"not known after a restart", "/proc/1234/ns/net", true, []string{"delete u", "detach u"}},
		{"not known, nor found", "/proc/1234/ns/net", false, []string{"delete u"}},
		{"not mounted any more", "/host/var/run/netns/cni-0", true, []string{"delete u", "detach u"}},
		{"neither mounted nor any process'", "/host/var/run/netns/cni-0", false, []string{"delete u", "forget u"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inNode(t, func(n *node) {
				n.agent.pods["u"] = status(pod("a", "u", "10.0.0.2"), tt.netns)
				n.start()
				n.agent.take()
				n.agent.unmounted = true
				path := ""
				if tt.runs {
					path = n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
				}
				n.namespace("demo")
				if calls := slices.Compact(n.agent.take()); !slices.Equal(calls, tt.calls) {
					t.Errorf("calls of the agent: %q, want %q", calls, tt.calls)
				}
				if n.agent.detachedAt != path {
					t.Errorf("detached in %q, want %q", n.agent.detachedAt, path)
				}
				if len(tt.calls) > 1 {
					n.wantKnown()
					n.wantMark("a", "-")
					return
				}
				n.wantKnown("u")
				n.wantMark("a", "enabled") // It still is.
				n.agent.failDelete = 1
				n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
				n.pass(retried)
				n.wantKnown()
				n.wantMark("a", "-")
			}, namespace("demo", ambient...), enabled(pod("a", "u", "10.0.0.2")))
		})
	}
}

// TestRemoveAll: nothing that any agent did is left when all is uninstalled, but
// what cannot be undone, which is said.
func TestRemoveAll(t *testing.T) {
	inNode(t, func(n *node) {
		n.agent.pods["lost"] = status(pod("lost", "lost", "10.0.0.4"), "/proc/1234/ns/net")
		n.agent.pods["hidden"] = status(pod("hidden", "hidden", "10.0.0.5"), "/proc/1234/ns/net")
		n.procs.run(n.T, "kept", "cni-1", "10.0.0.2")
		n.start()
		n.wantKnown("hidden", "kept", "lost")
		n.procs.run(n.T, "lost", "cni-2", "10.0.0.4")
		n.procs.run(n.T, "told", "cni-3", "10.0.0.3")
		n.end()
		if left := n.c.RemoveAll(n.Context()); left != 1 {
			t.Errorf("%d pods are left, want the one that is not found", left)
		}
		n.wantKnown("hidden")
		n.wantMark("kept", "-")
		n.wantMark("lost", "-")
		n.wantMark("told", "-")
		n.wantMark("plain", "-")
		n.wantMark("hidden", "enabled")
		if calls := n.agent.take(); slices.Contains(calls, "delete plain") || slices.Contains(calls, "detach plain") {
			t.Errorf("calls of the agent: %q", calls)
		}
	}, namespace("demo", ambient...), pod("kept", "kept", "10.0.0.2"), enabled(pod("lost", "lost", "10.0.0.4")), enabled(pod("hidden", "hidden", "10.0.0.5")),
		enabled(pod("told", "told", "10.0.0.3")), labelled(pod("plain", "plain", "10.0.0.9"), marks.ModeLabel, "none"))
}

// TestRemoveAllWithoutRights: the service account is gone before its pod is.
func TestRemoveAllWithoutRights(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		n.end()
		n.fail("patch", "pods", 1<<20)
		if left := n.c.RemoveAll(n.Context()); left != 0 {
			t.Errorf("%d pods are left", left)
		}
		n.wantKnown()
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

// TestRemoveAllBeforeSync: what no API server told of is not taken for ended.
func TestRemoveAllBeforeSync(t *testing.T) {
	c := decider(t, Config{})
	a := c.cfg.Agent.(*memAgent)
	a.pods["u"] = &agent.Status{Pod: agent.Pod{UID: "u", Netns: "/host/var/run/netns/cni-1"}}
	if left := c.RemoveAll(t.Context()); left != 0 {
		t.Errorf("%d pods are left", left)
	}
	if calls := a.take(); !slices.Equal(calls, []string{"delete u"}) {
		t.Errorf("calls of the agent: %q", calls)
	}
}
