package enrol

import (
	"context"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ztun/ztun/cmd/internal/agent"
)

// followers put a pod into the queue as soon as it has come further with the
// agent, so that no worker waits for it and no backoff delays its annotation.
type followers struct {
	wg sync.WaitGroup

	// mu guards the field below.
	mu   sync.Mutex
	late map[string]bool // By UID, those followed: whether ServedTimeout is over.
}

// finish marks the pod as what it has become, and follows it until it is served.
func (c *Controller) finish(ctx context.Context, pod *corev1.Pod) error {
	uid := string(pod.UID)
	phase := c.cfg.Agent.Phase(uid)
	if phase == agent.Served {
		return c.mark(ctx, pod, markEnabled)
	}
	late := c.follow(ctx, nameOf(pod), uid)
	if phase != agent.Attached || !late {
		return nil // Where the pod could not be attached there is no mark.
	}
	return c.mark(ctx, pod, markPending)
}

// follow sees to it that the pod is in the queue whenever it has come further,
// and once ServedTimeout is over, which it reports.
func (c *Controller) follow(ctx context.Context, name types.NamespacedName, uid string) (late bool) {
	f := &c.followed
	f.mu.Lock()
	defer f.mu.Unlock()
	if late, ok := f.late[uid]; ok {
		return late
	}
	f.late[uid] = false
	f.wg.Go(func() { c.followPod(ctx, name, uid) })
	return false
}

func (c *Controller) followPod(ctx context.Context, name types.NamespacedName, uid string) {
	f := &c.followed
	soon, cancel := context.WithTimeout(ctx, c.cfg.ServedTimeout)
	err := c.cfg.Agent.Wait(soon, uid)
	cancel()
	if err != nil && ctx.Err() == nil && c.cfg.Agent.Phase(uid) != "" { // Else it is not wanted any more.
		c.log.Warn("pod is not where it is wanted; it is annotated as soon as it is", "pod", name.String(), "error", err)
	}
	f.mu.Lock()
	f.late[uid] = true
	f.mu.Unlock()
	phase := c.cfg.Agent.Phase(uid)
	for phase != agent.Served && phase != "" && ctx.Err() == nil {
		c.queue.Add(name)
		phase = c.cfg.Agent.Await(ctx, uid, phase)
	}
	// Who comes from now on follows anew.
	f.mu.Lock()
	delete(f.late, uid)
	f.mu.Unlock()
	c.queue.Add(name)
}
