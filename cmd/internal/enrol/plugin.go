package enrol

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ztun/ztun/cmd/internal/cni"
)

// Enrol takes a new pod into the mesh, if it belongs there, and returns once a
// proxy serves it. After an error the pod must not start.
func (c *Controller) Enrol(ctx context.Context, r cni.Request) error {
	if r.PodName == "" || r.PodNamespace == "" || r.Netns == "" {
		return fmt.Errorf("enrol: request for pod %q in namespace %q with network namespace %q: all three are needed", r.PodName, r.PodNamespace, r.Netns)
	}
	if c.excluded(r.PodNamespace) {
		return nil // Such pods start without the API server.
	}
	name := types.NamespacedName{Namespace: r.PodNamespace, Name: r.PodName}
	limited, cancel := context.WithTimeoutCause(ctx, c.cfg.PluginTimeout, errBudget)
	defer cancel()
	pod, wanted, err := c.await(limited, name, r.PodUID)
	if err != nil {
		return fmt.Errorf("enrol: pod %s: %w", name, err)
	}
	// Whatever became of it: the queue sees what changed meanwhile.
	defer c.queue.Add(name)
	if !wanted {
		return nil
	}
	status := statusAddresses(pod)
	k := known{pod: c.describe(pod, known{}), status: status}
	if k.pod.Netns, err = c.hostPath(r.Netns); err != nil {
		return fmt.Errorf("enrol: pod %s: %w", name, err)
	}
	if addrs := requestAddresses(r); len(addrs) > 0 {
		k.pod.Addresses = addrs
	}
	if err := c.known.set(k, anySerial); err != nil {
		return fmt.Errorf("enrol: pod %s: %w", name, err)
	}
	if err := c.cfg.Agent.Wait(limited, k.pod.UID); err != nil {
		return fmt.Errorf("enrol: pod %s: %w", name, err)
	}
	if err := c.mark(limited, pod, markEnabled); err != nil {
		// It is captured and served; the queue tells the others.
		c.log.Warn("pod is not annotated yet", "pod", name.String(), "error", err)
	}
	return nil
}

var errBudget = errors.New("the plugin's time is over")

func requestAddresses(r cni.Request) []netip.Addr {
	addrs := make([]netip.Addr, 0, len(r.IPs))
	for _, p := range r.IPs {
		addrs = append(addrs, p.Addr())
	}
	return ordered(addrs)
}

// await returns the pod, once it is seen, and whether it is wanted in the mesh.
// The runtime may be faster than the informer: Istio looks ten times, 10 ms
// apart; here the informer tells.
func (c *Controller) await(ctx context.Context, name types.NamespacedName, uid string) (*corev1.Pod, bool, error) {
	select {
	case <-c.synced:
	case <-ctx.Done():
		return nil, false, fmt.Errorf("the API server has not answered since the agent started: %w", context.Cause(ctx))
	}
	for {
		next := c.next()
		pod, wanted, err := c.look(name, uid)
		if err == nil || !apierrors.IsNotFound(err) {
			return pod, wanted, err
		}
		select {
		case <-next:
		case <-ctx.Done():
			return nil, false, fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
}

// look returns the pod as the informer has it. The error is NotFound if it has
// none, or one that had the name before.
func (c *Controller) look(name types.NamespacedName, uid string) (*corev1.Pod, bool, error) {
	pod, err := c.pods.Pods(name.Namespace).Get(name.Name)
	if err != nil {
		return nil, false, err
	}
	if uid != "" && uid != string(pod.UID) && uid != processUID(pod) {
		return nil, false, apierrors.NewNotFound(corev1.Resource("pods"), name.Name+" with UID "+uid)
	}
	wanted, err := c.wants(pod)
	return pod, wanted, err
}
