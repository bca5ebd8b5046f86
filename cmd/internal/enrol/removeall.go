package enrol

import (
	"context"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// RemoveAll takes out of the mesh every pod that the agent knows or that an
// annotation tells of, as far as it gets until ctx ends. It is for an agent that
// is uninstalled, after Run and before Close. It returns how many pods stay as
// they are, and logs why.
func (c *Controller) RemoveAll(ctx context.Context) (left int) {
	var wg sync.WaitGroup
	var failed atomic.Int32
	undo := func(pod string, f func() error) {
		wg.Go(func() {
			if err := f(); err != nil {
				c.log.Error("pod stays captured", "pod", pod, "error", err)
				failed.Add(1)
			}
		})
	}
	live := map[string]bool{}
	for _, p := range c.running() {
		uid := string(p.UID)
		if _, isKnown := c.known.get(uid); !isKnown && markOf(p) == markNone {
			continue
		}
		live[uid] = true
		undo(nameOf(p).String(), func() error { return c.undo(ctx, p) })
	}
	for _, s := range c.cfg.Agent.Status() {
		if !live[s.Pod.UID] {
			undo(s.Pod.String(), func() error { return c.undoUnseen(ctx, s.Pod.UID) })
		}
	}
	wg.Wait()
	c.locator.clear()
	return int(failed.Load())
}

// running are the node's pods, as far as they are known.
func (c *Controller) running() []*corev1.Pod {
	pods, err := c.pods.List(labels.Everything())
	if err != nil {
		c.log.Error("listing pods", "error", err)
	}
	return pods
}

// undo detaches a pod. Its annotation goes as well, if the right to write it has
// not gone first.
func (c *Controller) undo(ctx context.Context, pod *corev1.Pod) error {
	var err error
	if isOver(pod) {
		err = c.forget(ctx, string(pod.UID))
	} else {
		err = c.detach(ctx, pod)
	}
	if err != nil {
		return err
	}
	if err := c.mark(ctx, pod, markNone); err != nil {
		c.log.Warn("the pod's annotation stays", "pod", nameOf(pod).String(), "error", err)
	}
	return nil
}

// undoUnseen is undo for a pod that the API server does not have, or that it has
// never been asked for.
func (c *Controller) undoUnseen(ctx context.Context, uid string) error {
	select {
	case <-c.synced:
		return c.forget(ctx, uid)
	default:
		return c.cfg.Agent.Delete(ctx, uid)
	}
}
