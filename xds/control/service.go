package control

import (
	"net/netip"
	"slices"
	"strings"

	"istio.io/api/annotation"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/ztun/ztun/xds/workloadapi"
)

// builtService is a Service that is served.
type builtService struct {
	*service
	hostname string
	vips     []netip.Addr
	families workloadapi.IPFamilies
	pods     []*builtPod // selected, with an address
	headless bool
}

// key is the Service's resource name, namespace/hostname.
func (s *builtService) key() string { return s.ns + "/" + s.hostname }

// collectServices decides which Services are served, under which addresses, and
// by which pods.
func (b *builder) collectServices(book *addressBook) {
	var unaddressed []*builtService
	for _, s := range b.set.services {
		b.refuseWaypoint(&s.object)
		checkServicePorts(s)
		b.checkPolicyFields(s)
		if s.Spec.Type == corev1.ServiceTypeExternalName {
			s.warnf(path{"spec", "type"}, "an ExternalName is not served: its name is for DNS alone")
			continue
		}
		built := &builtService{service: s, hostname: b.mesh.hostname(s.ns, s.Name)}
		built.vips, built.headless = b.clusterIPs(s)
		for _, vip := range built.vips {
			b.own(vip, &s.object, path{"spec", "clusterIP"})
		}
		if len(built.vips) == 0 && !built.headless {
			unaddressed = append(unaddressed, built)
		}
		b.services = append(b.services, built)
		b.selectPods(built)
	}
	for _, s := range unaddressed {
		b.assign(book, s)
	}
	for _, s := range b.services {
		s.families = families(s)
		b.checkReachable(s)
	}
}

// clusterIPs reads the addresses a Service is given.
func (b *builder) clusterIPs(s *service) (vips []netip.Addr, headless bool) {
	spec := path{"spec"}
	if s.Spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(s.Spec.ClusterIPs, corev1.ClusterIPNone) {
		if len(s.Spec.ClusterIPs) > 1 || (s.Spec.ClusterIP != "" && s.Spec.ClusterIP != corev1.ClusterIPNone) {
			s.errorf(spec.of("clusterIPs"), "None stands alone")
		}
		return nil, true
	}
	if len(s.Spec.ClusterIPs) == 0 {
		if s.Spec.ClusterIP != "" {
			vips = s.parseAddr(vips, spec.of("clusterIP"), s.Spec.ClusterIP)
		}
		return vips, false
	}
	if s.Spec.ClusterIP != "" && s.Spec.ClusterIP != s.Spec.ClusterIPs[0] {
		s.errorf(spec.of("clusterIP"), "must be the first of clusterIPs, %s", s.Spec.ClusterIPs[0])
	}
	for i, ip := range s.Spec.ClusterIPs {
		vips = s.parseAddr(vips, spec.of("clusterIPs", i), ip)
	}
	return vips, false
}

// assign gives a Service without addresses some, of the families that the API
// server would choose: one, unless it asks for two.
func (b *builder) assign(book *addressBook, s *builtService) {
	for _, r := range b.rangesFor(s.service) {
		vip, ok := book.take(r, s.ns+"/"+s.Name, func(a netip.Addr) bool { return b.owners[a] != nil })
		if !ok {
			s.errorf(path{"spec"}, "no address is left in %v", r)
			return
		}
		b.owners[vip] = &s.object
		s.vips = append(s.vips, vip)
	}
}

func (b *builder) rangesFor(s *service) []netip.Prefix {
	policy := corev1.IPFamilyPolicySingleStack
	if s.Spec.IPFamilyPolicy != nil {
		policy = *s.Spec.IPFamilyPolicy
	}
	ranges := slices.Clone(b.mesh.ServiceRanges)
	if len(s.Spec.IPFamilies) > 0 {
		ranges = nil
		for i, f := range s.Spec.IPFamilies {
			j := slices.IndexFunc(b.mesh.ServiceRanges, func(r netip.Prefix) bool { return r.Addr().Is4() == (f == corev1.IPv4Protocol) })
			if j < 0 {
				s.errorf(path{"spec", "ipFamilies", i}, "there is no service range of this family")
				return nil
			}
			ranges = append(ranges, b.mesh.ServiceRanges[j])
		}
		for _, r := range b.mesh.ServiceRanges {
			if policy != corev1.IPFamilyPolicySingleStack && !slices.Contains(ranges, r) {
				ranges = append(ranges, r)
			}
		}
	}
	switch {
	case policy == corev1.IPFamilyPolicySingleStack && len(ranges) > 1 && len(s.Spec.IPFamilies) < 2:
		ranges = ranges[:1]
	case policy == corev1.IPFamilyPolicyRequireDualStack && len(ranges) < 2:
		s.errorf(path{"spec", "ipFamilyPolicy"}, "there is no second service range")
	}
	return ranges
}

// families are spec.ipFamilies as the API server would have filled them in.
func families(s *builtService) workloadapi.IPFamilies {
	v4, v6 := false, false
	for _, f := range s.Spec.IPFamilies {
		v4, v6 = v4 || f == corev1.IPv4Protocol, v6 || f == corev1.IPv6Protocol
	}
	for _, a := range s.vips {
		v4, v6 = v4 || a.Is4(), v6 || a.Is6()
	}
	switch {
	case v4 && v6:
		return workloadapi.IPFamilies_DUAL
	case v4:
		return workloadapi.IPFamilies_IPV4_ONLY
	case v6:
		return workloadapi.IPFamilies_IPV6_ONLY
	}
	return workloadapi.IPFamilies_AUTOMATIC
}

// checkPolicyFields finds values that Kubernetes would not take.
func (b *builder) checkPolicyFields(s *service) {
	spec := path{"spec"}
	switch s.Spec.Type {
	case "", corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName:
	default:
		s.errorf(spec.of("type"), "%q is no type of Service", s.Spec.Type)
	}
	if p := s.Spec.InternalTrafficPolicy; p != nil && *p != corev1.ServiceInternalTrafficPolicyCluster && *p != corev1.ServiceInternalTrafficPolicyLocal {
		s.errorf(spec.of("internalTrafficPolicy"), "%q is neither Cluster nor Local", *p)
	}
	if d := s.Spec.TrafficDistribution; d != nil && preference(*d) == nil {
		s.errorf(spec.of("trafficDistribution"), "%q is none of PreferClose, PreferSameZone, PreferSameNode", *d)
	}
	if p := s.Spec.IPFamilyPolicy; p != nil {
		switch *p {
		case corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack:
		default:
			s.errorf(spec.of("ipFamilyPolicy"), "%q is none of SingleStack, PreferDualStack, RequireDualStack", *p)
		}
	}
	seen := make(map[corev1.IPFamily]bool)
	for i, f := range s.Spec.IPFamilies {
		if (f != corev1.IPv4Protocol && f != corev1.IPv6Protocol) || seen[f] {
			s.errorf(spec.of("ipFamilies", i), "%q is no family, or is there twice", f)
		}
		seen[f] = true
	}
	s.checkLabels(spec.of("selector"), s.Spec.Selector)
}

// selectPods finds the pods behind a Service. An empty selector selects none.
func (b *builder) selectPods(s *builtService) {
	if len(s.Spec.Selector) == 0 {
		s.warnf(path{"spec"}, "has no selector, and endpoints from elsewhere are not served: nothing stands behind it")
		return
	}
	for _, p := range b.candidates(s) {
		if matches(s.Spec.Selector, p.Labels) {
			s.pods = append(s.pods, p)
			b.servedBy[p] = append(b.servedBy[p], s)
		}
	}
	if len(s.pods) == 0 {
		s.warnf(path{"spec", "selector"}, "selects no pod that is served")
	}
}

// candidates are the pods with the label of the selector that the fewest have:
// to look at every pod for every Service takes a minute with 20,000 of each.
func (b *builder) candidates(s *builtService) []*builtPod {
	var fewest []*builtPod
	first := true
	for name, value := range s.Spec.Selector {
		with := b.podsWith[podLabel{s.ns, name, value}]
		if first || len(with) < len(fewest) {
			fewest, first = with, false
		}
	}
	return fewest
}

// checkReachable finds what keeps selected pods from being reached.
func (b *builder) checkReachable(s *builtService) {
	for i, port := range s.Spec.Ports {
		if port.TargetPort.Type != intstr.String || len(s.pods) == 0 {
			continue
		}
		has := func(p *builtPod) bool { _, ok := namedPort(p.Pod, port.TargetPort.StrVal); return ok }
		if protocolOf(port.Protocol) == corev1.ProtocolTCP && !slices.ContainsFunc(s.pods, has) {
			s.warnf(path{"spec", "ports", i, "targetPort"}, "no selected pod has a TCP port named %s", port.TargetPort.StrVal)
		}
	}
	for _, p := range s.pods {
		fits := func(a netip.Addr) bool {
			return (a.Is4() && s.families != workloadapi.IPFamilies_IPV6_ONLY) || (a.Is6() && s.families != workloadapi.IPFamilies_IPV4_ONLY)
		}
		if !slices.ContainsFunc(p.addrs, fits) {
			s.warnf(path{"spec"}, "pod %s has no address of this Service's family", p.Name)
		}
	}
}

// tcpPorts are the ports a proxy can serve.
func (s *service) tcpPorts(yield func(corev1.ServicePort) bool) {
	for _, p := range s.Spec.Ports {
		if protocolOf(p.Protocol) == corev1.ProtocolTCP && !yield(p) {
			return
		}
	}
}

// targetPort is 0 for a named port.
func targetPort(p corev1.ServicePort) uint32 {
	switch {
	case p.TargetPort.Type == intstr.String:
		return 0
	case p.TargetPort.IntVal == 0:
		return uint32(p.Port)
	}
	return uint32(p.TargetPort.IntVal)
}

// wire is the Service as proxies know it.
func (s *builtService) wire(b *builder) *workloadapi.Service {
	w := &workloadapi.Service{
		Name:          s.Name,
		Namespace:     s.ns,
		Hostname:      s.hostname,
		LoadBalancing: b.loadBalancing(s.service),
		IpFamilies:    s.families,
		Canonical:     true,
	}
	for _, vip := range s.vips {
		w.Addresses = append(w.Addresses, &workloadapi.NetworkAddress{Network: b.network, Address: vip.AsSlice()})
	}
	for p := range s.tcpPorts {
		w.Ports = append(w.Ports, &workloadapi.Port{ServicePort: uint32(p.Port), TargetPort: targetPort(p), AppProtocol: appProtocol(p)})
	}
	return w
}

// loadBalancing prefers internalTrafficPolicy over spec.trafficDistribution over
// its annotation on the Service over the one on the Namespace.
func (b *builder) loadBalancing(s *service) *workloadapi.LoadBalancing {
	var lb *workloadapi.LoadBalancing
	if p := s.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		lb = &workloadapi.LoadBalancing{
			RoutingPreference: []workloadapi.LoadBalancing_Scope{workloadapi.LoadBalancing_NODE},
			Mode:              workloadapi.LoadBalancing_STRICT,
		}
	} else if scopes := b.distribution(s); scopes != nil {
		lb = &workloadapi.LoadBalancing{RoutingPreference: scopes, Mode: workloadapi.LoadBalancing_FAILOVER}
	}
	if s.Spec.PublishNotReadyAddresses {
		if lb == nil {
			lb = &workloadapi.LoadBalancing{}
		}
		lb.HealthPolicy = workloadapi.LoadBalancing_ALLOW_ALL
	}
	return lb
}

func (b *builder) distribution(s *service) []workloadapi.LoadBalancing_Scope {
	if d := s.Spec.TrafficDistribution; d != nil {
		return preference(*d)
	}
	name := annotation.NetworkingTrafficDistribution.Name
	if d, ok := s.Annotations[name]; ok {
		scopes := preference(d)
		if scopes == nil {
			s.warnf(path{"metadata", "annotations", name}, "%q is not known, and has no effect", d)
		}
		return scopes
	}
	return preference(b.namespaceAnnotations(s.ns)[name])
}

// preference is the routing preference behind a traffic distribution's name.
func preference(name string) []workloadapi.LoadBalancing_Scope {
	near := []workloadapi.LoadBalancing_Scope{workloadapi.LoadBalancing_NETWORK, workloadapi.LoadBalancing_REGION, workloadapi.LoadBalancing_ZONE}
	switch strings.ToLower(name) {
	case "preferclose", "prefersamezone":
		return near
	case "prefersamenode":
		return append(near, workloadapi.LoadBalancing_SUBZONE, workloadapi.LoadBalancing_NODE)
	}
	return nil
}
