package enrol

import (
	"context"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// redirection is the annotation that tells others how far a pod has come.
const redirection = "ambient.istio.io/redirection"

const (
	markEnabled = "enabled" // Captured and served.
	markPending = "pending" // Captured; no proxy has taken it.
	markNone    = ""        // Not in the mesh: no annotation.
)

// markOf is the pod's annotation as last seen. Words of others are none.
func markOf(pod *corev1.Pod) string {
	switch m := pod.Annotations[redirection]; m {
	case markEnabled, markPending:
		return m
	}
	return markNone
}

// mark writes the annotation, if it is not there already.
func (c *Controller) mark(ctx context.Context, pod *corev1.Pod, value string) error {
	if markOf(pod) == value || c.known.marked(pod, value) {
		return nil
	}
	var v *string // nil is null: the annotation goes.
	if value != markNone {
		v = &value
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		// Another pod of that name is not meant.
		"uid":         pod.UID,
		"annotations": map[string]*string{redirection: v},
	}})
	if err != nil {
		return fmt.Errorf("enrol: annotate pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	_, err = c.cfg.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) && value == markNone {
		return nil
	}
	if err != nil {
		return fmt.Errorf("enrol: annotate pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	c.known.setMarked(pod, value)
	return nil
}
