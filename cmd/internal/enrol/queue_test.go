package enrol

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/ztun/ztun/cmd/internal/enrol/marks"
	"github.com/ztun/ztun/cmd/internal/procs"
)

func TestNamespaceLabelEnrolsRunningPods(t *testing.T) {
	inNode(t, func(n *node) {
		path := n.procs.run(n.T, "u", "cni-1", "10.0.0.2", "fd00::2")
		n.start()
		n.wantCalls()
		n.namespace("demo", ambient...)
		n.wantCalls("set u")
		n.wantMark("a", "enabled")
		got := n.agent.pod("u")
		if got.Netns != path || got.Name != "a" || got.Namespace != "demo" || got.ServiceAccount != "sa" || len(got.Addresses) != 2 {
			t.Errorf("the agent was told of %+v", got)
		}
		if patches := slices.Compact(n.patches()); len(patches) != 1 || patches[0] != `{"metadata":{"annotations":{"ambient.istio.io/redirection":"enabled"},"uid":"u"}}` {
			t.Errorf("patches: %q", patches)
		}
		if n.procs.checks != 1 {
			t.Errorf("the namespace was verified %d times before it was used, want once", n.procs.checks)
		}
		// Nothing more to change.
		n.namespace("demo", append([]string{"team", "x"}, ambient...)...)
		n.pass(retried)
		n.wantCalls()
	}, namespace("demo"), pod("a", "u", "10.0.0.2", "fd00::2"))
}

func TestLabelsGoneRemovePods(t *testing.T) {
	for _, tt := range []struct {
		name   string
		remove func(n *node)
	}{
		{"namespace label", func(n *node) { n.namespace("demo") }},
		{"pod label none", func(n *node) { n.apply(labelled(pod("a", "u", "10.0.0.2"), marks.ModeLabel, "none")) }},
		{"pod skips", func(n *node) { n.apply(annotated(pod("a", "u", "10.0.0.2"), skipMark, "true")) }},
		{"namespace skips", func(n *node) { n.namespace("demo", append([]string{skipMark, "true"}, ambient...)...) }},
		{"service skips", func(n *node) {
			n.service(&corev1.Service{
				ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "demo", Annotations: map[string]string{skipMark: "true"}},
				Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "a"}},
			})
		}},
		{"sidecar", func(n *node) { n.apply(annotated(pod("a", "u", "10.0.0.2"), sidecarStatus, "{}")) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inNode(t, func(n *node) {
				n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
				n.start()
				n.wantCalls("set u")
				n.wantMark("a", "enabled")
				n.agent.failDelete = 2
				tt.remove(n)
				n.wantMark("a", "enabled") // It still is.
				n.pass(retried)
				n.wantCalls("delete u", "delete u", "delete u")
				n.wantKnown()
				n.wantMark("a", "-")
				if patches := n.patches(); !strings.Contains(patches[len(patches)-1], `"ambient.istio.io/redirection":null`) {
					t.Errorf("patches: %q", patches)
				}
			}, namespace("demo", ambient...), labelled(pod("a", "u", "10.0.0.2"), "app", "a"))
		})
	}
}

func TestServiceThatNoLongerSkips(t *testing.T) {
	skipping := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "demo", Labels: map[string]string{skipMark: "true"}},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "a"}},
	}
	for _, tt := range []struct {
		name   string
		change func(n *node)
	}{
		{"label gone", func(n *node) {
			s := skipping.DeepCopy()
			s.Labels = nil
			n.service(s)
		}},
		{"selector changed", func(n *node) {
			s := skipping.DeepCopy()
			s.Spec.Selector["app"] = "b"
			n.service(s)
		}},
		{"deleted", func(n *node) {
			if err := n.client.CoreV1().Services("demo").Delete(n.Context(), "s", metav1.DeleteOptions{}); err != nil {
				n.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inNode(t, func(n *node) {
				n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
				n.start()
				n.wantCalls()
				tt.change(n)
				n.pass(time.Second)
				n.wantCalls("set u")
				n.wantMark("a", "enabled")
			}, namespace("demo", ambient...), skipping.DeepCopy(), labelled(pod("a", "u", "10.0.0.2"), "app", "a"))
		})
	}
}

func TestPendingUntilServed(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.agent.connect(false)
		n.start()
		n.pass(retried)
		n.wantMark("a", "pending")
		n.agent.connect(true)
		n.pass(retried)
		n.wantMark("a", "enabled")
		n.wantCalls("set u")
		// A proxy that goes away changes nothing.
		n.agent.connect(false)
		n.apply(labelled(pod("a", "u", "10.0.0.2"), "x", "y"))
		n.pass(retried)
		n.wantMark("a", "enabled")
		// One may come twice: the informer may be behind what was written.
		if got := slices.Compact(n.patches()); len(got) != 2 {
			t.Errorf("patches: %q", got)
		}
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestNoMarkWhereThePodCannotBeAttached(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.agent.stuck = true
		n.start()
		n.pass(retried)
		n.wantMark("a", "-")
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestRefusedPodIsNotTriedAgain(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.agent.refuse = 1
		n.start()
		n.pass(retried)
		n.wantCalls("set u")
		n.wantMark("a", "-")
		n.apply(labelled(pod("a", "u", "10.0.0.2"), "x", "y")) // Another event.
		n.pass(time.Second)
		n.wantCalls("set u")
		n.wantMark("a", "enabled")
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestAnnotationIsTriedAgain(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.fail("patch", "pods", 3)
		n.start()
		n.pass(retried)
		n.wantMark("a", "enabled")
		n.wantCalls("set u") // Once.
		n.fail("patch", "pods", 3)
		n.namespace("demo")
		n.pass(retried)
		n.wantMark("a", "-")
		n.wantKnown()
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

// TestAnnotationOfPodThatIsGone: the informer does not know yet.
func TestAnnotationOfPodThatIsGone(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		before := len(n.patches())
		n.client.PrependReactor("patch", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewNotFound(corev1.Resource("pods"), "a")
		})
		n.namespace("demo")
		n.pass(retried)
		if got := n.patches()[before:]; len(got) != 1 {
			t.Errorf("patches: %q, want one try", got)
		}
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestAddressesDecideWhenAndWhere(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2", "fd00::2")
		n.start()
		n.pass(retried)
		n.wantCalls() // No address, no pod.
		n.apply(pod("a", "u", "10.0.0.2"))
		n.wantCalls("set u")
		n.apply(pod("a", "u", "10.0.0.2", "fd00::2"))
		n.wantCalls("set u")
		if got := n.agent.pod("u"); len(got.Addresses) != 2 {
			t.Errorf("the second family came late: %v", got.Addresses)
		}
		scans := n.procs.scans
		n.apply(pod("a", "u")) // The status loses them for a while.
		n.apply(pod("a", "u", "fd00::2", "10.0.0.2"))
		n.pass(time.Second)
		n.wantCalls()
		if n.procs.scans != scans {
			t.Errorf("%d scans for addresses that are known", n.procs.scans-scans)
		}
		// Another sandbox, which no plugin told of.
		path := n.procs.run(n.T, "u", "cni-2", "10.0.0.9")
		n.apply(pod("a", "u", "10.0.0.9"))
		n.wantCalls("set u")
		if got := n.agent.pod("u"); got.Netns != path {
			t.Errorf("namespace %s, want that of the new sandbox", got.Netns)
		}
	}, namespace("demo", ambient...), pod("a", "u"))
}

func TestNamespaceOfAnotherPodIsNotUsed(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.99") // Its addresses do not agree.
		n.start()
		n.pass(retried)
		n.wantCalls()
		n.wantMark("a", "-")
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.procs.wrong = 1 // It ends between scan and use.
		n.apply(labelled(pod("a", "u", "10.0.0.2"), "x", "y"))
		n.wantCalls()
		n.pass(retried)
		n.wantCalls("set u")
		n.wantMark("a", "enabled")
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestUnmountedNamespaceIsKnownByDescriptor(t *testing.T) {
	inNode(t, func(n *node) {
		path := n.procs.run(n.T, "u", "elsewhere/1", "10.0.0.2")
		n.start()
		n.wantCalls("set u")
		got := n.agent.pod("u").Netns
		if !strings.HasPrefix(got, "/proc/self/fd/") || n.c.isLasting(got) {
			t.Errorf("namespace %s of %s", got, path)
		}
		if k, ok := n.c.known.get("u"); !ok || k.ns == nil || n.procs.given[0] != k.ns {
			t.Error("the descriptor behind the path is not kept")
		}
		if err := n.enrol(request("u", "/var/run/netns/cni-2", "10.0.0.3")); err != nil {
			t.Fatal(err)
		}
		n.procs.wantClosed(n.T) // The first sandbox's.
		n.procs.run(n.T, "u", "elsewhere/3", "10.0.0.4")
		n.apply(pod("a", "u", "10.0.0.4"))
		n.deletePod("a")
		n.wantCalls("set u", "set u", "forget u")
		n.procs.wantClosed(n.T)
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestManyPodsAtOnce(t *testing.T) {
	inNode(t, func(n *node) {
		for i, name := range []string{"a", "b", "c", "d", "e"} {
			ip := fmt.Sprintf("10.0.0.%d", i)
			n.procs.run(n.T, "u-"+name, "cni-"+name, ip)
			n.apply(pod(name, "u-"+name, ip))
		}
		n.start()
		n.namespace("demo", ambient...)
		n.wantKnown("u-a", "u-b", "u-c", "u-d", "u-e")
		n.procs.wantClosed(n.T) // With nothing to do.
	}, namespace("demo"))
}

func TestOneScanServesManyPods(t *testing.T) {
	m := &memProcs{dir: t.TempDir(), pods: map[string]memPod{}}
	var targets []procs.Target
	for _, uid := range []string{"a", "b", "c"} {
		m.run(t, uid, uid, "10.0.0.2")
		targets = append(targets, procs.Target{UID: uid, Addresses: addrs("10.0.0.2")})
	}
	l := locator{finder: m}
	for _, target := range targets[:2] {
		f, err := l.find(t.Context(), target, func() []procs.Target { return targets })
		if err != nil || filepath.Base(f.Name()) != target.UID {
			t.Fatalf("find(%s) = %v, %v", target.UID, f, err)
		}
		_ = f.Close()
	}
	if m.scans != 1 {
		t.Errorf("%d scans", m.scans)
	}
	l.clear()
	m.wantClosed(t)
	if _, err := l.find(t.Context(), procs.Target{UID: "d"}, func() []procs.Target { return nil }); err == nil || !strings.Contains(err.Error(), "pod d") {
		t.Errorf("find of a pod without processes = %v", err)
	}
}

// TestFoundForNobodyIsLetGo: an open namespace is one that cannot go.
func TestFoundForNobodyIsLetGo(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		n.procs.run(n.T, "x", "cni-x", "10.0.0.9")
		found, err := n.procs.Find(n.Context(), []procs.Target{{UID: "x", Addresses: addrs("10.0.0.9")}})
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		n.c.locator.mu.Lock()
		n.c.locator.found = found
		n.c.locator.mu.Unlock()
		n.apply(pod("b", "u"))
		n.procs.wantClosed(n.T)
	}, namespace("demo"))
}

func TestWantedAgainWhileLeaving(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		n.agent.take()
		n.agent.failDelete = 1 // It goes on leaving.
		n.namespace("demo")
		n.namespace("demo", ambient...)
		n.pass(retried)
		n.wantCalls("delete u", "set u")
		n.wantKnown("u")
		n.wantMark("a", "enabled")
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestFinishedPodIsForgotten(t *testing.T) {
	for _, end := range []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed} {
		t.Run(string(end), func(t *testing.T) {
			inNode(t, func(n *node) {
				n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
				n.start()
				n.wantCalls("set u")
				n.agent.failForget = 1
				n.apply(phase(pod("a", "u"), end)) // Kubernetes clears the address.
				n.pass(retried)
				n.wantCalls("forget u", "forget u")
				n.wantMark("a", "-")
				n.wantKnown()
				// Its address is another's.
				n.procs.run(n.T, "u2", "cni-2", "10.0.0.2")
				n.apply(pod("b", "u2", "10.0.0.2"))
				n.wantCalls("set u2")
				n.wantMark("b", "enabled")
			}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
		})
	}
}

func TestDeletedPodIsForgotten(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		n.agent.take()
		before := len(n.patches())
		n.agent.failForget = 1
		n.deletePod("a")
		n.pass(retried)
		n.wantCalls("forget u", "forget u")
		if got := n.patches()[before:]; len(got) != 0 {
			t.Errorf("patches of a deleted pod: %q", got)
		}
		// An update of before that comes late finds nothing.
		n.c.podUpdated(nil, pod("a", "u", "10.0.0.2"))
		n.pass(time.Second)
		n.wantCalls()
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

// TestNameOfAnotherPod: a StatefulSet makes a pod with the name of the last one,
// and the informer may never say that the first was gone.
func TestNameOfAnotherPod(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		n.agent.take()
		n.procs.run(n.T, "u2", "cni-2", "10.0.0.3")
		n.apply(pod("a", "u2", "10.0.0.3"))
		n.wantCalls("forget u", "set u2")
		n.wantMark("a", "enabled")
	}, namespace("demo", ambient...), pod("a", "u", "10.0.0.2"))
}

func TestExcludedNamespace(t *testing.T) {
	inNode(t, func(n *node) {
		n.cfg.ExcludeNamespaces = []string{"demo"}
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.procs.run(n.T, "u2", "cni-2", "10.0.0.3")
		n.procs.run(n.T, "u3", "cni-3", "10.0.0.4")
		n.agent.pods["u2"] = status(pod("was", "u2", "10.0.0.3"), n.procs.pods["u2"].netns)
		n.agent.pods["u3"] = status(pod("gone", "u3", "10.0.0.4"), n.procs.pods["u3"].netns)
		n.start()
		n.wantKnown()
		n.wantMark("a", "-")
		n.wantMark("was", "-")
		n.wantCalls("forget u3", "delete u2")
	}, namespace("demo", ambient...), labelled(pod("a", "u", "10.0.0.2"), ambient...),
		annotated(pod("was", "u2", "10.0.0.3"), redirection, "enabled"))
}

func TestMissingNamespaceIsWaitedFor(t *testing.T) {
	inNode(t, func(n *node) {
		n.procs.run(n.T, "u", "cni-1", "10.0.0.2")
		n.start()
		n.pass(retried)
		n.wantCalls()
		n.namespace("demo", ambient...)
		n.wantCalls("set u")
	}, pod("a", "u", "10.0.0.2"))
}

func TestEventsAreCounted(t *testing.T) {
	inNode(t, func(n *node) {
		n.start()
		n.apply(labelled(pod("a", "u"), "x", "y"))
		n.apply(labelled(pod("a", "u"), "x", "z"))
		n.deletePod("a")
		if got := n.c.Events(); got["add"] != 1 || got["update"] != 2 || got["delete"] != 1 {
			t.Errorf("Events() = %v", got)
		}
	}, namespace("demo"), pod("a", "u"))
}
