package enrol

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/procs"
)

// snapshot makes the agent know its pods, before it serves any proxy: those of
// an earlier agent that are no more are forgotten, the others get a namespace
// that is theirs for certain, and those that only their annotation tells of are
// set again.
func (c *Controller) snapshot(ctx context.Context) error {
	pods, err := c.pods.List(labels.Everything())
	if err != nil {
		return fmt.Errorf("enrol: snapshot: %w", err)
	}
	live := map[string]*corev1.Pod{}
	for _, p := range pods {
		if !isOver(p) {
			live[string(p.UID)] = p
		}
	}
	errs := []error{c.adopt(ctx, live)}
	var targets []procs.Target
	for uid, p := range live {
		if addrs := c.enrolledAddresses(p); len(addrs) > 0 {
			targets = append(targets, target(p, addrs))
		} else if _, isKnown := c.known.get(uid); !isKnown {
			delete(live, uid)
		}
	}
	var found map[string]*os.File
	if len(targets) > 0 {
		found, err = c.cfg.Finder.Find(ctx, targets)
		errs = append(errs, err)
	}
	for _, p := range live {
		ns := found[processUID(p)]
		delete(found, processUID(p))
		errs = append(errs, c.restore(ctx, p, ns))
	}
	for _, f := range found {
		_ = f.Close()
	}
	return errors.Join(errs...)
}

// adopt takes over what the agent knows, and lets go of pods that are not live.
func (c *Controller) adopt(ctx context.Context, live map[string]*corev1.Pod) error {
	var errs []error
	for _, s := range c.cfg.Agent.Status() {
		c.known.adopt(s.Pod)
		if live[s.Pod.UID] == nil {
			errs = append(errs, c.forget(ctx, s.Pod.UID))
		}
	}
	return errors.Join(errs...)
}

// enrolledAddresses are those of a pod that an earlier agent enrolled; none for
// others.
func (c *Controller) enrolledAddresses(pod *corev1.Pod) []netip.Addr {
	k, isKnown := c.known.get(string(pod.UID))
	if !isKnown {
		wanted, err := c.wants(pod)
		if err != nil || !wanted || markOf(pod) == markNone {
			return nil
		}
	}
	return k.addresses(statusAddresses(pod))
}

// restore gives the agent a pod of an earlier one's. ns is its namespace, or nil
// if it was not found; restore owns it.
func (c *Controller) restore(ctx context.Context, pod *corev1.Pod, ns *os.File) error {
	before, isKnown := c.known.get(string(pod.UID))
	k := known{pod: before.pod}
	wanted, err := c.wants(pod)
	if err == nil && wanted {
		k.pod = c.describe(pod, before)
		k.pod.Netns = before.pod.Netns
	}
	if ns == nil && !isKnown {
		return err // The queue looks again.
	}
	switch {
	case ns != nil:
		if e := c.use(ctx, ns, target(pod, k.pod.Addresses), &k); e != nil {
			err, k.pod.Netns = errors.Join(err, e), agent.NotFound
		}
	case !c.isLasting(k.pod.Netns), !slices.Equal(k.pod.Addresses, before.pod.Addresses):
		k.pod.Netns = agent.NotFound // Lost, or that of another sandbox.
	}
	if !isKnown && k.pod.Netns == agent.NotFound {
		return err
	}
	return errors.Join(err, c.known.set(k, before.serial))
}
