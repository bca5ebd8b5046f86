package enrol

import (
	"math"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// maxProbePorts is what a proxy takes.
const maxProbePorts = 1024

// probePorts are the TCP ports that the kubelet connects to, in rising order,
// each once: those of liveness, readiness and startup probes by HTTP, TCP and
// gRPC, and of HTTP lifecycle hooks. Of init containers only sidecars have any.
// A probe of another host does not come to the pod.
func probePorts(pod *corev1.Pod) []uint16 {
	var ports []uint16
	add := func(c *corev1.Container, host string, port intstr.IntOrString) {
		n := port.IntValue()
		if port.Type == intstr.String {
			n = namedPort(c, port.StrVal)
		}
		if host == "" && n > 0 && n <= math.MaxUint16 {
			ports = append(ports, uint16(n))
		}
	}
	for _, c := range probed(pod) {
		for _, p := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
			switch {
			case p == nil:
			case p.HTTPGet != nil:
				add(c, p.HTTPGet.Host, p.HTTPGet.Port)
			case p.TCPSocket != nil:
				add(c, p.TCPSocket.Host, p.TCPSocket.Port)
			case p.GRPC != nil:
				add(c, "", intstr.FromInt32(p.GRPC.Port))
			}
		}
		if c.Lifecycle == nil {
			continue
		}
		for _, h := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
			if h != nil && h.HTTPGet != nil {
				add(c, h.HTTPGet.Host, h.HTTPGet.Port)
			}
		}
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	return ports[:min(len(ports), maxProbePorts)]
}

// probed are the containers that the kubelet may probe.
func probed(pod *corev1.Pod) []*corev1.Container {
	var out []*corev1.Container
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			out = append(out, c)
		}
	}
	for i := range pod.Spec.Containers {
		out = append(out, &pod.Spec.Containers[i])
	}
	return out
}

// namedPort looks a name up in the container's own ports, as the kubelet does;
// 0: there is none.
func namedPort(c *corev1.Container, name string) int {
	for _, p := range c.Ports {
		if p.Name == name {
			return int(p.ContainerPort)
		}
	}
	return 0
}
