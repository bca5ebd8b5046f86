package enrol

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/ztun/ztun/cmd/internal/enrol/marks"
)

const (
	// sidecarStatus is on pods that a sidecar was injected into.
	sidecarStatus = "sidecar.istio.io/status"
	// skipMark, as a label or an annotation, opts out.
	skipMark = "istio.io/ambient-skip"
)

// wants says whether the pod is to be in the mesh.
func (c *Controller) wants(pod *corev1.Pod) (bool, error) {
	if _, sidecar := pod.Annotations[sidecarStatus]; sidecar || pod.Spec.HostNetwork {
		return false, nil
	}
	if c.excluded(pod.Namespace) || c.isProxy(pod) || skips(&pod.ObjectMeta) {
		return false, nil
	}
	ns, err := c.namespaces.Get(pod.Namespace)
	if err != nil {
		return false, fmt.Errorf("enrol: namespace of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if skips(&ns.ObjectMeta) || !c.selected(pod, ns) {
		return false, nil
	}
	skipped, err := c.skippedByService(pod)
	return !skipped, err
}

func (c *Controller) selected(pod *corev1.Pod, ns *corev1.Namespace) bool {
	for _, s := range c.cfg.Selectors {
		if s.Matches(pod.Labels, ns.Labels) {
			return true
		}
	}
	return false
}

// isProxy says whether the pod is a proxy of the mesh.
func (c *Controller) isProxy(pod *corev1.Pod) bool {
	return pod.Namespace == c.cfg.SystemNamespace && pod.Labels["app"] == "ztunnel"
}

// skips says whether an object opts out. A value that is no boolean does not.
func skips(o *metav1.ObjectMeta) bool {
	return marks.Bool(o.Labels[skipMark], false) || marks.Bool(o.Annotations[skipMark], false)
}

// skippedByService says whether a Service that opts out selects the pod.
func (c *Controller) skippedByService(pod *corev1.Pod) (bool, error) {
	services, err := c.services.ByIndex(skipIndex, pod.Namespace)
	if err != nil {
		return false, fmt.Errorf("enrol: services of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	for _, s := range services {
		if selects(s.(*corev1.Service), pod) {
			return true, nil
		}
	}
	return false, nil
}

// selects says whether the pod is behind the Service by its selector.
func selects(s *corev1.Service, pod *corev1.Pod) bool {
	return s.Namespace == pod.Namespace && s.Spec.Type != corev1.ServiceTypeExternalName && len(s.Spec.Selector) > 0 &&
		labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(pod.Labels))
}

// isOver says whether the pod has run to its end. Its addresses are free again.
func isOver(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}
