package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/ztun/ztun/deploy/e2e/cluster"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

func TestTwoHundredPods(t *testing.T) {
	ctx := claim(t, "200 pods on one node, 10 of them starting at any time, come into the mesh; p50 and p99 of the time that each takes from its address on")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "server", node: "node1"})
	p.enrolled("server")
	const many = 200
	events, err := world.CoreV1().Pods(p.name).Watch(ctx, metav1.ListOptions{LabelSelector: "app=many"})
	if err != nil {
		t.Fatal(err)
	}
	defer events.Stop()
	begin := time.Now()
	at := p.enrolMany(events, many, 10)
	all := time.Since(begin)
	took := p.sinceAddress(world.Nodes[1], at)
	slices.Sort(took)
	percentile := func(n int) int64 { return took[(len(took)*n+99)/100-1].Milliseconds() }
	t.Logf("%d pods are in the mesh after %.1f s; each from its address on: p50 %d ms, p99 %d ms, slowest %d ms",
		many, all.Seconds(), percentile(50), percentile(99), percentile(100))
	p.run(pod{name: "later", node: "node2"})
	p.enrolled("later")
	p.meshed("later", "server", "http://server/")
	p.clear()
}

// A pod is in the mesh once its sandbox is, before its containers: these have no image, which spares half of the work.
const manyYAML = `{apiVersion: v1, kind: Pod, metadata: {name: many-%[2]d, namespace: %[1]s, labels: {app: many}}, spec: {
  nodeName: node2, automountServiceAccountToken: false, enableServiceLinks: false, terminationGracePeriodSeconds: 1,
  containers: [{name: app, image: "e2e.test/none:1", imagePullPolicy: Never}]}}`

// enrolMany makes pods, so many at a time, until all are in the mesh, and returns when each was, by name.
// All at once would show how long a pod waits for its kubelet's other pods.
func (p *place) enrolMany(events watch.Interface, many, atOnce int) map[string]time.Time {
	p.t.Helper()
	at := map[string]time.Time{}
	for made := 0; len(at) < many; {
		for ; made < min(many, len(at)+atOnce); made++ {
			p.apply(manyYAML, p.name, made)
		}
		select {
		case e, ok := <-events.ResultChan():
			now := time.Now()
			o, is := e.Object.(*corev1.Pod)
			if !ok || !is {
				p.t.Fatalf("the watch of pods ended: %v", e)
			}
			if _, known := at[o.Name]; !known && o.Annotations[redirection] == "enabled" {
				at[o.Name] = now
			}
		case <-p.ctx.Done():
			p.t.Fatalf("%d of %d pods are in the mesh: %v", len(at), many, context.Cause(p.ctx))
		}
	}
	return at
}

// clear ends all pods of a place and waits until they are gone: what comes next has the machine to itself.
func (p *place) clear() {
	p.t.Helper()
	begin, now := time.Now(), int64(0)
	pods := world.CoreV1().Pods(p.name)
	if err := pods.DeleteCollection(p.ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{}); err != nil {
		p.t.Fatal(err)
	}
	p.wait("no pod to be left", func() error {
		list, err := pods.List(p.ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d are", len(list.Items))
		}
		return err
	})
	p.t.Logf("all gone after %.1f s", time.Since(begin).Seconds())
}

// sinceAddress is how long each pod took since the node's IPAM wrote down its
// address, which is among the first things that happen in a pod's network.
func (p *place) sinceAddress(n *cluster.Node, at map[string]time.Time) (took []time.Duration) {
	p.t.Helper()
	p.wait("the pods' addresses", func() error {
		took = nil
		list, err := world.CoreV1().Pods(p.name).List(p.ctx, metav1.ListOptions{LabelSelector: "app=many"})
		if err != nil {
			return err
		}
		for _, o := range list.Items {
			if o.Status.PodIP == "" {
				return errors.New(o.Name + " has none")
			}
			given, err := os.Stat(filepath.Join(n.Root(), "var/lib/cni/networks/pods", o.Status.PodIP))
			if err != nil {
				return err
			}
			took = append(took, at[o.Name].Sub(given.ModTime()))
		}
		return nil
	})
	return took
}
