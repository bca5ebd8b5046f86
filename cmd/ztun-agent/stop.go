package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

const (
	// daemonSet is the agent's own. The plugin knows its pods by the name too.
	daemonSet = "istio-cni-node"
	// What a stop takes at most, within a pod's usual 30 s.
	askTimeout    = 5 * time.Second
	removeTimeout = 3 * time.Second
	proxyTimeout  = 10 * time.Second
	detachTimeout = 9 * time.Second
)

// A verdict is what a stop is.
type verdict int

const (
	// replaced: another agent follows. Everything stays, and new pods wait.
	replaced verdict = iota
	// leaving: the agent does not come back to this node, or is told to clean
	// up whenever it stops. New pods start without it.
	leaving
	// uninstalled: the agent does not come back to any node.
	uninstalled
)

// judge says which stop this is, as Istio's agent does. granted says that the
// DaemonSet could be read when the agent started: being forbidden to now means
// that the rights are gone, and so is all else.
func judge(ctx context.Context, client kubernetes.Interface, namespace, nodeName string, granted bool) (verdict, error) {
	ds, err := client.AppsV1().DaemonSets(namespace).Get(ctx, daemonSet, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err), noRights(err, granted):
		return uninstalled, nil
	case err != nil:
		return replaced, fmt.Errorf("DaemonSet %s/%s: %w", namespace, daemonSet, err)
	case ds.DeletionTimestamp != nil:
		return uninstalled, nil
	}
	node, err := client.CoreV1().Nodes().Get(ctx, nodeName, metav1.GetOptions{})
	switch {
	case noRights(err, granted):
		return uninstalled, nil
	case err != nil:
		return replaced, fmt.Errorf("node %s: %w", nodeName, err)
	}
	fits, err := belongs(ds, node)
	if err == nil && !fits {
		return leaving, nil
	}
	return replaced, err
}

// noRights says whether the agent's account or its rights are gone.
func noRights(err error, granted bool) bool {
	return apierrors.IsUnauthorized(err) || apierrors.IsForbidden(err) && granted
}

// belongs says whether the DaemonSet has a pod on the node, as far as node
// selector and affinity go.
func belongs(ds *appsv1.DaemonSet, node *corev1.Node) (bool, error) {
	fits, err := nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: ds.Spec.Template.Spec}).Match(node)
	if err != nil {
		return false, fmt.Errorf("node affinity of DaemonSet %s: %w", ds.Name, err)
	}
	return fits, nil
}

// mayAsk says whether the agent may read its DaemonSet, as long as it is there.
func (n *node) mayAsk(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := n.client.AppsV1().DaemonSets(n.cfg.PodNamespace).Get(ctx, daemonSet, metav1.GetOptions{})
	if err == nil {
		_, err = n.client.CoreV1().Nodes().Get(ctx, n.cfg.NodeName, metav1.GetOptions{})
	}
	if apierrors.IsForbidden(err) {
		n.log.Warn("the agent may not read its DaemonSet or its node: a stop will not be taken for an uninstallation", "error", err)
	}
	return err == nil
}

// leave does what this stop asks for. stopKube ends what wants pods in the mesh.
func (n *node) leave(granted bool, stopKube func()) {
	v := n.decide(granted)
	if v == replaced {
		n.log.Info("another agent follows: plugin and pods stay as they are, new pods wait")
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	if err := n.installer.Remove(ctx); err != nil {
		n.log.Error("removing the plugin", "error", err)
	} else {
		n.log.Info("the plugin is removed")
		n.sweep(os.Remove(filepath.Join(n.cfg.RunDir, wire.SocketName)))
	}
	if v == uninstalled {
		stopKube()
		if n.detachAll(granted) {
			n.sweep(n.agent.Clean())
			n.sweep(os.Remove(n.questions()))
		}
	}
}

// sweep tells of a file of the agent's that stays.
func (n *node) sweep(err error) {
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.Warn("a file of the agent's stays on the node", "error", err)
	}
}

func (n *node) decide(granted bool) verdict {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	tries := 1
	if n.cfg.Install.Owned {
		tries = 3 // What is removed by mistake lets pods start without the mesh after a reboot.
	}
	var v verdict
	var err error
	for i := range tries {
		if i > 0 {
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
		}
		if v, err = judge(ctx, n.client, n.cfg.PodNamespace, n.cfg.NodeName, granted); err == nil {
			break
		}
	}
	if err != nil {
		n.log.Warn("whether the agent is replaced cannot be found out: as if it were", "error", err)
	}
	if v == replaced && n.cfg.NoSafeUpgrade {
		return leaving
	}
	return v
}

// detachAll takes every pod out of the mesh, if the proxies go as well: then
// everything is being uninstalled, and pods must not be left without a network.
// While a proxy stays, so do its pods. done: no proxy and no pod needs an agent.
func (n *node) detachAll(granted bool) (done bool) {
	gone := func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return n.agent.Proxies() == 0 || proxiesGo(ctx, n.client, n.cfg.SystemNamespace, n.cfg.NodeName, granted)
	}
	if !wait(proxyTimeout, gone) {
		n.log.Warn("a proxy still serves this node: its pods stay captured, and new ones start without the mesh")
		return false
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), detachTimeout, errors.New("the agent has to end"))
	defer cancel()
	if left := n.enrol.RemoveAll(ctx); left > 0 {
		n.log.Error("pods stay captured: what was done to them has to be undone by another agent, or ends with them", "pods", left)
		return false
	}
	n.log.Info("pods are out of the mesh")
	return true
}

// proxiesGo says whether the node's proxies are told to stop, and no other follows.
func proxiesGo(ctx context.Context, client kubernetes.Interface, namespace, nodeName string, granted bool) bool {
	pods, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{
		LabelSelector: "app=ztunnel", FieldSelector: fields.OneTermEqualSelector("spec.nodeName", nodeName).String(),
	})
	if err != nil {
		return noRights(err, granted)
	}
	return !slices.ContainsFunc(pods.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp == nil })
}

// wait polls ok for at most d.
func wait(d time.Duration, ok func() bool) bool {
	for end := time.Now().Add(d); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}
