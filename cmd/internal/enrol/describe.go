package enrol

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/enrol/marks"
	"github.com/ztun/ztun/cmd/internal/procs"
)

// Annotations of a pod.
const (
	bypassAnnotation     = "ambient.istio.io/bypass-inbound-capture"
	dnsAnnotation        = "ambient.istio.io/dns-capture"
	interfacesAnnotation = "istio.io/reroute-virtual-interfaces"
)

// maxAddresses is what a proxy takes.
const maxAddresses = 64

// describe is the pod as the agent is to be told of it, but for its namespace.
// before is what the agent was told last, or zero.
func (c *Controller) describe(pod *corev1.Pod, before known) agent.Pod {
	return agent.Pod{
		UID: string(pod.UID), Name: pod.Name, Namespace: pod.Namespace, ServiceAccount: serviceAccount(pod),
		Addresses:         before.addresses(statusAddresses(pod)),
		BypassInbound:     marks.Bool(pod.Annotations[bypassAnnotation], false),
		DNSCapture:        marks.Bool(pod.Annotations[dnsAnnotation], c.cfg.DNSCapture),
		VirtualInterfaces: c.virtualInterfaces(pod, before.serial == 0),
		ProbePorts:        probePorts(pod),
	}
}

func serviceAccount(pod *corev1.Pod) string {
	if pod.Spec.ServiceAccountName == "" {
		return "default"
	}
	return pod.Spec.ServiceAccountName
}

// virtualInterfaces reads the comma list. Names that no interface of the pod's
// can have are left out: the pod belongs in the mesh all the same. first: it is
// said.
func (c *Controller) virtualInterfaces(pod *corev1.Pod, first bool) []string {
	names, wrong := marks.Interfaces(pod.Annotations[interfacesAnnotation])
	if wrong != "" && first {
		c.log.Warn("annotation names an interface that cannot be", "pod", pod.Namespace+"/"+pod.Name, "annotation", interfacesAnnotation, "interface", wrong)
	}
	return names
}

// statusAddresses are the pod's own as its status says, in a fixed order.
func statusAddresses(pod *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	texts := make([]string, 0, 1+len(pod.Status.PodIPs))
	for _, ip := range pod.Status.PodIPs {
		texts = append(texts, ip.IP)
	}
	if len(texts) == 0 {
		texts = append(texts, pod.Status.PodIP)
	}
	for _, text := range texts {
		if a, err := netip.ParseAddr(text); err == nil {
			out = append(out, a)
		}
	}
	return ordered(out)
}

// ordered returns what can be a pod's addresses, sorted, each once.
func ordered(addrs []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range addrs {
		a = a.Unmap()
		if a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	out = slices.Compact(out)
	return out[:min(len(out), maxAddresses)]
}

// target is the pod as its processes are looked for.
func target(pod *corev1.Pod, addrs []netip.Addr) procs.Target {
	t := procs.Target{UID: processUID(pod), Addresses: addrs}
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for _, s := range list {
			if _, id, ok := strings.Cut(s.ContainerID, "://"); ok && id != "" { // containerd://ID
				t.Containers = append(t.Containers, id)
			}
		}
	}
	return t
}

// processUID is the UID that the kubelet and the runtime know the pod by. The
// object of a static pod is a mirror with a UID of its own.
func processUID(pod *corev1.Pod) string {
	if hash := pod.Annotations[corev1.MirrorPodAnnotationKey]; hash != "" {
		return hash
	}
	return string(pod.UID)
}
