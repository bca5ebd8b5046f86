package netstack

import "github.com/ztun/ztun/tun"

// noteLacks says what a pod's device does without, each feature once: it is
// the kernel's lack or the agent's, not the pod's.
func (e *Engine) noteLacks(pod string, list []tun.Feature) {
	for _, f := range list {
		if bit := uint32(1) << f; e.lacks.Or(bit)&bit == 0 {
			e.log.Warn("works without a feature of the kernel", "feature", f.String(), "cost", f.Cost(), "pod", pod)
		}
	}
}
