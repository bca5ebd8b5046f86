package control

import (
	"regexp"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ztun/ztun/xds/workloadapi"
)

// workload is a pod as proxies know it.
func (b *builder) workload(p *builtPod) *workloadapi.Workload {
	w := &workloadapi.Workload{
		Uid:                   b.mesh.ClusterID + "//Pod/" + p.ns + "/" + p.Name,
		Name:                  p.Name,
		Namespace:             p.ns,
		Network:               b.network,
		ServiceAccount:        serviceAccount(p.Pod),
		Node:                  p.Spec.NodeName,
		WorkloadName:          workloadName(p.Pod),
		WorkloadType:          workloadapi.WorkloadType_POD,
		ClusterId:             b.mesh.ClusterID,
		Locality:              b.locality(p.Spec.NodeName),
		AuthorizationPolicies: p.policies,
	}
	if b.mesh.TrustDomain != "cluster.local" {
		w.TrustDomain = b.mesh.TrustDomain
	}
	for _, a := range p.addrs {
		w.Addresses = append(w.Addresses, a.AsSlice())
	}
	if p.enrolled {
		w.TunnelProtocol = workloadapi.TunnelProtocol_HBONE
	}
	if nativeTunnel(p.Labels) {
		w.TunnelProtocol, w.NativeTunnel = workloadapi.TunnelProtocol_HBONE, true
	}
	if !isHealthy(p.Pod) {
		w.Status = workloadapi.WorkloadStatus_UNHEALTHY
	}
	if p.Spec.HostNetwork {
		w.NetworkMode = workloadapi.NetworkMode_HOST_NETWORK
	}
	w.CanonicalName, w.CanonicalRevision = canonical(p.Labels, w.WorkloadName)
	for _, s := range b.servedBy[p] {
		if w.Services == nil {
			w.Services = make(map[string]*workloadapi.PortList)
		}
		w.Services[s.key()] = endpointPorts(s.service, p.Pod)
	}
	return w
}

// endpointPorts maps a Service's ports to a pod's. A named port the pod does
// not have is left out.
func endpointPorts(s *service, p *corev1.Pod) *workloadapi.PortList {
	list := &workloadapi.PortList{}
	for port := range s.tcpPorts {
		target := targetPort(port)
		if target == 0 {
			var ok bool
			if target, ok = namedPort(p, port.TargetPort.StrVal); !ok {
				continue
			}
		}
		list.Ports = append(list.Ports, &workloadapi.Port{ServicePort: uint32(port.Port), TargetPort: target})
	}
	return list
}

func serviceAccount(p *corev1.Pod) string {
	if p.Spec.ServiceAccountName != "" {
		return p.Spec.ServiceAccountName
	}
	return "default"
}

// locality is where a pod's node says it stands; nil if it does not.
func (b *builder) locality(name string) *workloadapi.Locality {
	n := b.set.nodes[name]
	if n == nil {
		return nil
	}
	l := &workloadapi.Locality{
		Region:  n.Labels[corev1.LabelTopologyRegion],
		Zone:    n.Labels[corev1.LabelTopologyZone],
		Subzone: n.Labels["topology.istio.io/subzone"],
	}
	if l.Region == "" && l.Zone == "" && l.Subzone == "" {
		return nil
	}
	return l
}

// cronJobName matches the Jobs of a CronJob, named by its time.
var cronJobName = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// workloadName is what made the pod: a Deployment, not the ReplicaSet between;
// a CronJob, not the Job between. A bare pod made itself.
func workloadName(p *corev1.Pod) string {
	if name := p.Labels["service.istio.io/workload-name"]; name != "" {
		return name
	}
	owner := metav1.GetControllerOf(p)
	if owner == nil {
		return p.Name
	}
	switch owner.Kind {
	case "ReplicaSet":
		if hash := p.Labels["pod-template-hash"]; hash != "" {
			return strings.TrimSuffix(owner.Name, "-"+hash)
		}
	case "Job":
		if m := cronJobName.FindStringSubmatch(owner.Name); m != nil {
			return m[1]
		}
	}
	return owner.Name
}

// canonical is a pod's name and revision in telemetry.
func canonical(labels map[string]string, fallback string) (name, revision string) {
	first := func(fallback string, keys ...string) string {
		for _, k := range keys {
			if v := labels[k]; v != "" {
				return v
			}
		}
		return fallback
	}
	return first(fallback, "service.istio.io/canonical-name", "app.kubernetes.io/name", "app"),
		first("latest", "service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
}
