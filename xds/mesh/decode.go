package mesh

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"unique"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/workloadapi"
)

// Limits of one resource, so that what is kept of it stays in proportion to
// its size on the wire.
const (
	maxAddrs   = 1024 // Of a workload, and VIPs and prefixes of a service.
	maxMembers = 4096 // Services of a workload.
)

var (
	errEmpty       = errors.New("neither workload nor service")
	errName        = errors.New("resource name is not the workload's uid or the service's namespace/hostname")
	errAddr        = errors.New("address is neither 4 nor 16 bytes")
	errLength      = errors.New("prefix length exceeds the address")
	errPort        = errors.New("port above 65535")
	errKey         = errors.New("service key without '/'")
	errNamespace   = errors.New("namespace contains '/'")
	errDestination = errors.New("gateway without a destination")
	errLegacy      = errors.New("tunnel protocol LEGACY_ISTIO_MTLS")
	errEnum        = errors.New("unknown enum value")
	errMany        = errors.New("too many entries")
)

// address decodes one resource of xds.AddressType into a *Workload or a *Service.
func (c *Config) address(r *xds.Resource) (any, error) {
	var a workloadapi.Address
	if err := proto.Unmarshal(r.Body, &a); err != nil {
		return nil, fmt.Errorf("mesh: decode address: %w", err)
	}
	switch v := a.GetType().(type) {
	case *workloadapi.Address_Workload:
		w, err := c.workload(v.Workload)
		if err == nil && (w.UID == "" || w.UID != r.Name) {
			err = errName
		}
		if err != nil {
			return nil, fmt.Errorf("mesh: workload %s: %w", r.Name, err)
		}
		return w, nil
	case *workloadapi.Address_Service:
		s, err := service(v.Service)
		if err == nil && s.String() != r.Name {
			err = errName
		}
		if err != nil {
			return nil, fmt.Errorf("mesh: service %s: %w", r.Name, err)
		}
		return s, nil
	}
	return nil, fmt.Errorf("mesh: address %s: %w", r.Name, errEmpty)
}

func field(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}

// shared makes equal strings share their bytes: most workloads repeat those of
// their neighbours.
func shared(s string) string { return unique.Make(s).Value() }

func (c *Config) workload(p *workloadapi.Workload) (*Workload, error) {
	w := &Workload{
		UID:            p.GetUid(),
		Name:           p.GetName(),
		Namespace:      shared(p.GetNamespace()),
		Hostname:       p.GetHostname(),
		TrustDomain:    shared(cmp.Or(p.GetTrustDomain(), c.TrustDomain)),
		ServiceAccount: shared(cmp.Or(p.GetServiceAccount(), "default")),
		Place: Place{
			Region:  shared(p.GetLocality().GetRegion()),
			Zone:    shared(p.GetLocality().GetZone()),
			Subzone: shared(p.GetLocality().GetSubzone()),
			Node:    shared(p.GetNode()),
			Cluster: shared(cmp.Or(p.GetClusterId(), "Kubernetes")),
			Network: shared(p.GetNetwork()),
		},
		App: App{
			CanonicalName:     shared(p.GetCanonicalName()),
			CanonicalRevision: shared(p.GetCanonicalRevision()),
			WorkloadName:      shared(p.GetWorkloadName()),
			WorkloadType:      workloadType(p.GetWorkloadType()),
		},
		Reach:    Reach{NativeTunnel: p.GetNativeTunnel()},
		Capacity: 1,
	}
	if p.GetCapacity() != nil {
		w.Capacity = p.GetCapacity().GetValue()
	}
	// An identity that cannot be makes the workload unreachable through HBONE,
	// not unknown: unknown addresses are passed through in plain.
	w.Identity, _ = identity.New(w.TrustDomain, w.Namespace, w.ServiceAccount)
	w.identities = []identity.ID{w.Identity}
	for _, key := range p.GetAuthorizationPolicies() {
		w.Policies = append(w.Policies, shared(key))
	}
	var err error
	if w.Addrs, err = addrs(p.GetAddresses()); err != nil {
		return nil, field("addresses", err)
	}
	if w.Services, err = memberships(p.GetServices()); err != nil {
		return nil, field("services", err)
	}
	return w, w.Reach.decode(p)
}

func (r *Reach) decode(p *workloadapi.Workload) (err error) {
	switch p.GetTunnelProtocol() {
	case workloadapi.TunnelProtocol_NONE:
	case workloadapi.TunnelProtocol_HBONE:
		r.Protocol = ProtocolHBONE
	case workloadapi.TunnelProtocol_LEGACY_ISTIO_MTLS:
		return errLegacy
	default:
		return field("tunnel_protocol", errEnum)
	}
	switch p.GetStatus() {
	case workloadapi.WorkloadStatus_HEALTHY:
		r.Healthy = true
	case workloadapi.WorkloadStatus_UNHEALTHY:
	default:
		return field("status", errEnum)
	}
	switch p.GetNetworkMode() {
	case workloadapi.NetworkMode_STANDARD:
	case workloadapi.NetworkMode_HOST_NETWORK:
		r.HostNetwork = true
	default:
		return field("network_mode", errEnum)
	}
	if r.Waypoint, err = gateway(p.GetWaypoint()); err != nil {
		return field("waypoint", err)
	}
	if r.NetworkGateway, err = gateway(p.GetNetworkGateway()); err != nil {
		return field("network_gateway", err)
	}
	r.AppTunnel, err = appTunnel(p.GetApplicationTunnel())
	return field("application_tunnel", err)
}

func workloadType(t workloadapi.WorkloadType) string {
	switch t {
	case workloadapi.WorkloadType_CRONJOB:
		return "cronjob"
	case workloadapi.WorkloadType_POD:
		return "pod"
	case workloadapi.WorkloadType_JOB:
		return "job"
	}
	return "deployment"
}

func appTunnel(p *workloadapi.ApplicationTunnel) (*AppTunnel, error) {
	if p == nil {
		return nil, nil
	}
	t := new(AppTunnel)
	switch p.GetProtocol() {
	case workloadapi.ApplicationTunnel_NONE:
	case workloadapi.ApplicationTunnel_PROXY:
		t.Proxy = true
	default:
		return nil, errEnum
	}
	var err error
	t.Port, err = port(p.GetPort())
	return t, err
}

// gateway returns nil for a reference that is not set.
func gateway(p *workloadapi.GatewayAddress) (*Gateway, error) {
	if p == nil {
		return nil, nil
	}
	g := new(Gateway)
	var err error
	switch d := p.GetDestination().(type) {
	case *workloadapi.GatewayAddress_Hostname:
		g.Service = ServiceKey{shared(d.Hostname.GetNamespace()), shared(d.Hostname.GetHostname())}
	case *workloadapi.GatewayAddress_Address:
		g.Network = shared(d.Address.GetNetwork())
		if g.Addr, err = addr(d.Address.GetAddress()); err != nil {
			return nil, err
		}
	default:
		return nil, errDestination
	}
	g.Port, err = port(p.GetHboneMtlsPort())
	return g, err
}

func addr(b []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, errAddr
	}
	return a.Unmap(), nil
}

func addrs(in [][]byte) ([]netip.Addr, error) {
	if len(in) > maxAddrs {
		return nil, errMany
	}
	var out []netip.Addr
	for _, b := range in {
		a, err := addr(b)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
}

func port(p uint32) (uint16, error) {
	if p > math.MaxUint16 {
		return 0, errPort
	}
	return uint16(p), nil
}

func portMap(in []*workloadapi.Port) (PortMap, error) {
	if len(in) > math.MaxUint16 {
		return nil, errMany
	}
	byPort := make(map[uint16]uint16, len(in))
	for _, p := range in {
		from, err := port(p.GetServicePort())
		if err != nil {
			return nil, err
		}
		to, err := port(p.GetTargetPort())
		if err != nil {
			return nil, err
		}
		byPort[from] = to
	}
	out := make(PortMap, 0, len(byPort))
	for from, to := range byPort {
		out = append(out, PortPair{from, to})
	}
	slices.SortFunc(out, func(a, b PortPair) int { return cmp.Compare(a.Service, b.Service) })
	return out, nil
}

func memberships(in map[string]*workloadapi.PortList) ([]Membership, error) {
	if len(in) > maxMembers {
		return nil, errMany
	}
	var out []Membership
	for key, list := range in {
		namespace, hostname, ok := strings.Cut(key, "/")
		if !ok {
			return nil, errKey
		}
		ports, err := portMap(list.GetPorts())
		if err != nil {
			return nil, field(key, err)
		}
		out = append(out, Membership{ServiceKey{shared(namespace), shared(hostname)}, ports})
	}
	slices.SortFunc(out, func(a, b Membership) int {
		return cmp.Or(strings.Compare(a.Service.Namespace, b.Service.Namespace), strings.Compare(a.Service.Hostname, b.Service.Hostname))
	})
	return out, nil
}

func service(p *workloadapi.Service) (*Service, error) {
	if strings.Contains(p.GetNamespace(), "/") {
		return nil, errNamespace
	}
	s := &Service{
		ServiceKey:      ServiceKey{shared(p.GetNamespace()), shared(p.GetHostname())},
		Name:            p.GetName(),
		SubjectAltNames: p.GetSubjectAltNames(),
		Canonical:       p.GetCanonical(),
		NamespaceOnly:   p.GetVisibility() == workloadapi.Service_NAMESPACE,
	}
	for _, name := range s.SubjectAltNames {
		if id, err := identity.Parse(name); err == nil {
			s.Identities = append(s.Identities, id)
		}
	}
	var err error
	if s.VIPs, s.CIDRs, err = vips(p.GetAddresses()); err != nil {
		return nil, field("addresses", err)
	}
	if s.Ports, err = portMap(p.GetPorts()); err != nil {
		return nil, field("ports", err)
	}
	if s.Waypoint, err = gateway(p.GetWaypoint()); err != nil {
		return nil, field("waypoint", err)
	}
	for _, ww := range p.GetWeightedWaypoints() {
		g, err := gateway(ww.GetDestination())
		if err == nil && g == nil {
			err = errDestination
		}
		if err != nil {
			return nil, field("weighted_waypoints", err)
		}
		s.WeightedWaypoints = append(s.WeightedWaypoints, WeightedWaypoint{*g, ww.GetWeight()})
	}
	if s.Families, err = families(p.GetIpFamilies()); err != nil {
		return nil, field("ip_families", err)
	}
	s.LoadBalancer, err = loadBalancer(p.GetLoadBalancing())
	return s, field("load_balancing", err)
}

func vips(in []*workloadapi.NetworkAddress) (exact []VIP, prefixes []CIDR, err error) {
	if len(in) > maxAddrs {
		return nil, nil, errMany
	}
	for _, n := range in {
		a, ok := netip.AddrFromSlice(n.GetAddress())
		if !ok {
			return nil, nil, errAddr
		}
		bits := a.BitLen()
		if n.Length != nil {
			if n.GetLength() > uint32(bits) {
				return nil, nil, errLength
			}
			bits = int(n.GetLength())
		}
		if a.Is4In6() && bits >= 96 {
			a, bits = a.Unmap(), bits-96
		}
		network := shared(n.GetNetwork())
		if bits == a.BitLen() {
			if v := (VIP{network, a}); !slices.Contains(exact, v) {
				exact = append(exact, v)
			}
		} else if c := (CIDR{network, netip.PrefixFrom(a, bits).Masked()}); !slices.Contains(prefixes, c) {
			prefixes = append(prefixes, c)
		}
	}
	return exact, prefixes, nil
}

func families(f workloadapi.IPFamilies) (Families, error) {
	switch f {
	case workloadapi.IPFamilies_AUTOMATIC:
		return AnyFamily, nil
	case workloadapi.IPFamilies_IPV4_ONLY:
		return IPv4Only, nil
	case workloadapi.IPFamilies_IPV6_ONLY:
		return IPv6Only, nil
	case workloadapi.IPFamilies_DUAL:
		return DualStack, nil
	}
	return 0, errEnum
}

func loadBalancer(p *workloadapi.LoadBalancing) (*LoadBalancer, error) {
	if p == nil {
		return nil, nil
	}
	if len(p.GetRoutingPreference()) > maxAddrs {
		return nil, errMany
	}
	lb := new(LoadBalancer)
	for _, scope := range p.GetRoutingPreference() {
		if scope < workloadapi.LoadBalancing_REGION || scope > workloadapi.LoadBalancing_NETWORK {
			return nil, field("routing_preference", errEnum)
		}
		lb.Preferences = append(lb.Preferences, Scope(scope-workloadapi.LoadBalancing_REGION))
	}
	switch p.GetMode() {
	case workloadapi.LoadBalancing_UNSPECIFIED_MODE:
		lb.Mode = ModeStandard
	case workloadapi.LoadBalancing_STRICT:
		lb.Mode = ModeStrict
	case workloadapi.LoadBalancing_FAILOVER:
		lb.Mode = ModeFailover
	case workloadapi.LoadBalancing_PASSTHROUGH:
		lb.Mode = ModePassthrough
	default:
		return nil, field("mode", errEnum)
	}
	switch p.GetHealthPolicy() {
	case workloadapi.LoadBalancing_ONLY_HEALTHY:
	case workloadapi.LoadBalancing_ALLOW_ALL:
		lb.AllowUnhealthy = true
	default:
		return nil, field("health_policy", errEnum)
	}
	return lb, nil
}
