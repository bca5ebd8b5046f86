package control

import (
	"net/netip"
	"slices"
	"strings"

	"istio.io/api/annotation"
	"istio.io/api/label"
	corev1 "k8s.io/api/core/v1"
)

const (
	// podIPsAnnotation addresses a pod whose status does not: a comma list.
	podIPsAnnotation = "ztun.io/pod-ips"
	// networkLabel of the root namespace names the network of every pod.
	networkLabel = "topology.istio.io/network"
)

// enrolled says whether a pod speaks HBONE. There is no agent here that would
// write the redirection annotation, so the decision it records is made here;
// an annotation that is there is the word of a real agent, and final.
func (b *builder) enrolled(p *pod) bool {
	if p.Spec.HostNetwork {
		return false
	}
	redirection := annotation.AmbientRedirection.Name
	switch v, ok := p.Annotations[redirection]; {
	case ok && v == "enabled":
		return true
	case ok:
		if v != "pending" {
			p.warnf(path{"metadata", "annotations", redirection}, "%q is neither enabled nor pending; the pod counts as not enrolled", v)
		}
		return false
	}
	if _, sidecar := p.Annotations[annotation.SidecarStatus.Name]; sidecar {
		return false
	}
	if slices.Contains(b.mesh.ExcludeNamespaces, p.ns) {
		return false
	}
	mode := label.IoIstioDataplaneMode.Name
	switch p.Labels[mode] {
	case "ambient":
		return true
	case "none":
		return false
	}
	return b.namespaceLabels(p.ns)[mode] == "ambient"
}

// nativeTunnel says whether a pod speaks HBONE by itself: a label with a comma
// list of protocols that has http in it.
func nativeTunnel(labels map[string]string) bool {
	return slices.Contains(strings.Split(labels["networking.istio.io/tunnel"], ","), "http")
}

func (b *builder) namespaceLabels(ns string) map[string]string {
	if n := b.set.namespaces[ns]; n != nil {
		return n.Labels
	}
	return nil
}

func (b *builder) namespaceAnnotations(ns string) map[string]string {
	if n := b.set.namespaces[ns]; n != nil {
		return n.Annotations
	}
	return nil
}

// isOver says whether a pod has run to its end. Its addresses are free again.
func isOver(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// isHealthy takes a pod for ready unless its status says otherwise: there is
// no kubelet behind a directory.
func isHealthy(p *corev1.Pod) bool {
	if p.DeletionTimestamp != nil {
		return false
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return true
}

// podAddrs finds a pod's addresses: its status, its annotation, or what the
// embedder knows.
func (b *builder) podAddrs(p *pod) []netip.Addr {
	var addrs []netip.Addr
	status := path{"status"}
	switch {
	case len(p.Status.PodIPs) > 0:
		for i, ip := range p.Status.PodIPs {
			addrs = p.parseAddr(addrs, status.of("podIPs", i, "ip"), ip.IP)
		}
		if p.Status.PodIP != "" && p.Status.PodIP != p.Status.PodIPs[0].IP {
			p.errorf(status.of("podIP"), "must be the first of podIPs, %s", p.Status.PodIPs[0].IP)
		}
	case p.Status.PodIP != "":
		addrs = p.parseAddr(addrs, status.of("podIP"), p.Status.PodIP)
	case p.Annotations[podIPsAnnotation] != "":
		for ip := range strings.SplitSeq(p.Annotations[podIPsAnnotation], ",") {
			addrs = p.parseAddr(addrs, path{"metadata", "annotations", podIPsAnnotation}, strings.TrimSpace(ip))
		}
	case b.embedderAddrs != nil:
		for _, a := range b.embedderAddrs(p.ns, p.Name) {
			addrs = p.parseAddr(addrs, nil, a.String())
		}
	}
	return addrs
}

// parseAddr appends an address that a pod or service can have, once a family.
func (o *object) parseAddr(to []netip.Addr, p path, s string) []netip.Addr {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		o.errorf(p, "%q is no IP address", s)
	case addr.Zone() != "" || addr.Is4In6() || addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast():
		o.errorf(p, "%s cannot be the address of a %s", s, strings.ToLower(o.kind))
	case slices.ContainsFunc(to, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }):
		o.errorf(p, "%s is a second address of its family", s)
	default:
		return append(to, addr)
	}
	return to
}
