package enrol

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"github.com/ztun/ztun/cmd/internal/cni"
)

const many = 200

// manyPods are running pods, each with processes.
func manyPods(n *node) {
	for i := range many {
		uid := fmt.Sprintf("u%d", i)
		ip := fmt.Sprintf("10.0.%d.%d", i/200, i%200+1)
		n.procs.run(n.T, uid, "cni-"+uid, ip)
		p := pod("a"+uid, uid, ip)
		p.ResourceVersion = "1" // The fake never changes it.
		n.create(p)
	}
}

func (n *node) create(p *corev1.Pod) {
	n.Helper()
	if _, err := n.client.CoreV1().Pods(p.Namespace).Create(n.Context(), p, metav1.CreateOptions{}); err != nil {
		n.Fatal(err)
	}
}

// written counts patches by the annotation that they write.
func (n *node) written() (pending, enabled int) {
	for _, p := range n.patches() {
		switch {
		case strings.Contains(p, markPending):
			pending++
		case strings.Contains(p, markEnabled):
			enabled++
		}
	}
	return pending, enabled
}

// TestManyRunningPodsAtOnce: the bubble's time passes only in waits, and nobody
// waits for a backoff.
func TestManyRunningPodsAtOnce(t *testing.T) {
	inNode(t, func(n *node) {
		manyPods(n)
		n.start()
		begin := time.Now()
		n.namespace("demo", ambient...) // Returns when nothing moves any more.
		if took := time.Since(begin); took != 0 {
			t.Errorf("took %v", took)
		}
		if _, enabled := n.written(); enabled != many {
			t.Errorf("%d pods are annotated, want %d, once each", enabled, many)
		}
		if n.procs.scans != 1 {
			t.Errorf("%d looks at all processes", n.procs.scans)
		}
	}, namespace("demo"))
}

// TestManyPodsWhenTheProxyComes: no pod that waited for it waits for more.
func TestManyPodsWhenTheProxyComes(t *testing.T) {
	inNode(t, func(n *node) {
		manyPods(n)
		n.agent.connect(false)
		n.start()
		n.namespace("demo", ambient...)
		if got := len(n.agent.uids()); got != many {
			t.Errorf("the agent was told of %d pods at once, want %d: nobody waits for a proxy", got, many)
		}
		n.pass(time.Minute)
		if pending, enabled := n.written(); pending != many || enabled != 0 {
			t.Errorf("without a proxy %d pods are annotated pending and %d enabled", pending, enabled)
		}
		begin := time.Now()
		n.agent.connect(true)
		synctest.Wait()
		if took := time.Since(begin); took != 0 {
			t.Errorf("took %v", took)
		}
		if _, enabled := n.written(); enabled != many {
			t.Errorf("%d pods are annotated enabled, want %d", enabled, many)
		}
	}, namespace("demo"))
}

// TestManyNewPodsAtOnce: the API server is written to once for each, though the
// informer does not know of it yet when the queue comes to the pod.
func TestManyNewPodsAtOnce(t *testing.T) {
	inNode(t, func(n *node) {
		n.client.PrependReactor("patch", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, nil // The informer never hears of it.
		})
		n.start()
		for i := range many {
			p := pod(fmt.Sprintf("a%d", i), fmt.Sprintf("u%d", i)) // Without an address: not the queue's.
			p.ResourceVersion = "1"
			n.create(p)
		}
		synctest.Wait()
		var wg sync.WaitGroup
		for i := range many {
			wg.Go(func() {
				err := n.c.Enrol(n.Context(), cni.Request{
					PodName: fmt.Sprintf("a%d", i), PodNamespace: "demo", PodUID: fmt.Sprintf("u%d", i), Netns: fmt.Sprintf("/var/run/netns/cni-%d", i),
					IPs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.0.%d.%d/24", i/200, i%200+1))},
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		synctest.Wait()
		if _, enabled := n.written(); enabled != many {
			t.Errorf("%d patches, want %d", enabled, many)
		}
	}, namespace("demo", ambient...))
}
