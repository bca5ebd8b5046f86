package enrol

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/procs"
)

// reconcile brings the pods of one name to where they belong.
func (c *Controller) reconcile(ctx context.Context, name types.NamespacedName) error {
	pod, err := c.pods.Pods(name.Namespace).Get(name.Name)
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("enrol: pod %s: %w", name, err)
	}
	var errs []error
	for _, uid := range c.known.named(name) {
		if pod == nil || uid != string(pod.UID) {
			// The pod is deleted, and another may have its name.
			errs = append(errs, c.forget(ctx, uid))
		}
	}
	if pod != nil {
		errs = append(errs, c.reconcilePod(ctx, pod))
	}
	return errors.Join(errs...)
}

func (c *Controller) reconcilePod(ctx context.Context, pod *corev1.Pod) error {
	_, isKnown := c.known.get(string(pod.UID))
	enrolled := isKnown || markOf(pod) != markNone
	if isOver(pod) {
		// Its addresses may be another pod's by now.
		if !enrolled {
			return nil
		}
		return errors.Join(c.forget(ctx, string(pod.UID)), c.mark(ctx, pod, markNone))
	}
	wanted, err := c.wants(pod)
	switch {
	case err != nil:
		return err
	case wanted:
		return c.add(ctx, pod)
	case enrolled:
		return c.remove(ctx, pod)
	}
	return nil
}

// add brings a pod into the mesh: the agent attaches it, a proxy takes it, and
// last of all the annotation says so.
func (c *Controller) add(ctx context.Context, pod *corev1.Pod) error {
	before, _ := c.known.get(string(pod.UID))
	want := known{pod: c.describe(pod, before), ns: before.ns, status: before.status}
	if len(want.pod.Addresses) == 0 {
		return nil // The plugin brings it, or its next update.
	}
	want.pod.Netns = before.pod.Netns
	if want.pod.Netns == "" || want.pod.Netns == agent.NotFound || !slices.Equal(want.pod.Addresses, before.pod.Addresses) {
		if err := c.locate(ctx, pod, &want); err != nil {
			return err
		}
	}
	if err := c.known.set(want, before.serial); err != nil {
		return err
	}
	if markOf(pod) == markEnabled {
		return nil
	}
	return c.finish(ctx, pod)
}

// locate fills in the namespace of a running pod. It is looked at again just
// before it is used.
func (c *Controller) locate(ctx context.Context, pod *corev1.Pod, k *known) error {
	t := target(pod, k.pod.Addresses)
	ns, err := c.locator.find(ctx, t, c.missing)
	if err != nil {
		return err
	}
	return c.use(ctx, ns, t, k)
}

// use makes an open namespace the pod's, if it still is. It owns ns.
func (c *Controller) use(ctx context.Context, ns *os.File, t procs.Target, k *known) error {
	path, mounted := c.locator.path(ns)
	if mounted && path == k.pod.Netns {
		_ = ns.Close() // As before: nothing is attached anew.
		return nil
	}
	if err := c.cfg.Finder.Verify(ctx, ns, t); err != nil {
		_ = ns.Close()
		return fmt.Errorf("enrol: namespace of pod %s/%s: %w", k.pod.Namespace, k.pod.Name, err)
	}
	k.pod.Netns, k.ns, k.status = path, ns, nil
	if mounted {
		_ = ns.Close()
		k.ns = nil
	}
	return nil
}

// missing are the pods whose namespaces are still to be found.
func (c *Controller) missing() []procs.Target {
	pods, err := c.pods.List(labels.Everything())
	if err != nil {
		return nil
	}
	var out []procs.Target
	for _, p := range pods {
		if k, ok := c.known.get(string(p.UID)); ok && k.pod.Netns != agent.NotFound || isOver(p) {
			continue
		}
		addrs := statusAddresses(p)
		if wanted, err := c.wants(p); err != nil || !wanted || len(addrs) == 0 {
			continue
		}
		out = append(out, target(p, addrs))
	}
	return out
}

// remove takes a running pod out of the mesh. The annotation stays until it is.
func (c *Controller) remove(ctx context.Context, pod *corev1.Pod) error {
	if err := c.detach(ctx, pod); err != nil {
		return err
	}
	return c.mark(ctx, pod, markNone)
}

// detach undoes what an agent did to a running pod, where it was done: in the
// namespace that the agent knows, else in the one that the pod's processes have.
func (c *Controller) detach(ctx context.Context, pod *corev1.Pod) error {
	uid := string(pod.UID)
	before, isKnown := c.known.get(uid)
	if !isKnown && pod.Spec.HostNetwork {
		return nil // The host's namespace is nobody's to attach.
	}
	serial := c.known.spoil(uid)
	limited, cancel := context.WithTimeout(ctx, c.cfg.RemoveTimeout)
	defer cancel()
	err := agent.ErrNotFound // Only the annotation tells of it: the agent's state is lost.
	if isKnown {
		err = c.cfg.Agent.Delete(limited, uid)
	}
	if errors.Is(err, agent.ErrNotFound) {
		err = c.detachFound(limited, pod, before)
	}
	if err == nil {
		c.known.drop(uid, serial)
	}
	return err
}

// detachFound is detach in the namespace that the pod's processes have. before is
// what the agent was told, or zero.
func (c *Controller) detachFound(ctx context.Context, pod *corev1.Pod, before known) error {
	p := c.describe(pod, before)
	if len(p.Addresses) == 0 && before.serial == 0 {
		return nil // A pod that has never had a namespace.
	}
	t := target(pod, p.Addresses)
	ns, err := c.locator.find(ctx, t, c.missing)
	if errors.Is(err, errNoProcess) && before.serial != 0 && before.pod.Netns != agent.NotFound {
		// Neither mounted any more nor any process': it is gone.
		return c.cfg.Agent.Forget(ctx, p.UID)
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := c.cfg.Finder.Verify(ctx, ns, t); err != nil {
		return fmt.Errorf("enrol: namespace of pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	p.Netns = fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	return c.cfg.Agent.Detach(ctx, p)
}

// forget lets go of a pod that has ended. Its namespace is not touched.
func (c *Controller) forget(ctx context.Context, uid string) error {
	serial := c.known.spoil(uid)
	limited, cancel := context.WithTimeout(ctx, c.cfg.RemoveTimeout)
	defer cancel()
	if err := c.cfg.Agent.Forget(limited, uid); err != nil {
		return err
	}
	c.known.drop(uid, serial)
	return nil
}
