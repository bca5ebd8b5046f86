package mesh

import (
	"cmp"
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/ztun/ztun/xds/authz"
)

// A Dump is a Snapshot in the form of ztunnel's config dump, which istioctl
// reads. Everything is sorted.
type Dump struct {
	Policies       []*authz.Policy                    `json:"policies"`
	Services       []ServiceDump                      `json:"services"`
	StagedServices map[string]map[string]EndpointDump `json:"stagedServices"`
	Workloads      []*Workload                        `json:"workloads"`
}

// ServiceDump is a service with its endpoints, by UID.
type ServiceDump struct {
	Canonical        bool                    `json:"canonical"`
	CIDRVIPs         []cidrDump              `json:"cidrVips,omitempty"`
	Endpoints        map[string]EndpointDump `json:"endpoints"`
	Hostname         string                  `json:"hostname"`
	IPFamilies       string                  `json:"ipFamilies,omitempty"`
	LoadBalancer     *loadBalancerDump       `json:"loadBalancer,omitempty"`
	Name             string                  `json:"name"`
	Namespace        string                  `json:"namespace"`
	Ports            PortMap                 `json:"ports"`
	SubjectAltNames  []string                `json:"subjectAltNames"`
	VIPs             []string                `json:"vips"`
	Visibility       string                  `json:"visibility"`
	Waypoint         *gatewayDump            `json:"waypoint,omitempty"`
	WeightedWaypoint []weightedDump          `json:"weightedWaypoints,omitempty"`
}

// EndpointDump is a workload as an endpoint of one service.
type EndpointDump struct {
	Port        PortMap `json:"port"`
	Status      string  `json:"status"`
	WorkloadUID string  `json:"workloadUid"`
}

type gatewayDump struct {
	Destination   string `json:"destination"`
	HBONEMTLSPort uint16 `json:"hboneMtlsPort"`
}

type weightedDump struct {
	Destination gatewayDump `json:"destination"`
	Weight      uint32      `json:"weight"`
}

type cidrDump struct {
	CIDR    netip.Prefix `json:"cidr"`
	Network string       `json:"network"`
}

type loadBalancerDump struct {
	HealthPolicy       string   `json:"healthPolicy"`
	Mode               string   `json:"mode"`
	RoutingPreferences []string `json:"routingPreferences"`
}

type localityDump struct {
	Region  string `json:"region"`
	Subzone string `json:"subzone"`
	Zone    string `json:"zone"`
}

type appTunnelDump struct {
	Port     *uint16 `json:"port"`
	Protocol string  `json:"protocol"`
}

type workloadDump struct {
	AppTunnel             *appTunnelDump `json:"applicationTunnel,omitempty"`
	AuthorizationPolicies []string       `json:"authorizationPolicies,omitempty"`
	CanonicalName         string         `json:"canonicalName,omitempty"`
	CanonicalRevision     string         `json:"canonicalRevision,omitempty"`
	Capacity              uint32         `json:"capacity"`
	ClusterID             string         `json:"clusterId"`
	Hostname              string         `json:"hostname,omitempty"`
	Locality              *localityDump  `json:"locality,omitempty"`
	Name                  string         `json:"name"`
	Namespace             string         `json:"namespace"`
	NativeTunnel          bool           `json:"nativeTunnel,omitempty"`
	Network               string         `json:"network,omitempty"`
	NetworkGateway        *gatewayDump   `json:"networkGateway,omitempty"`
	NetworkMode           string         `json:"networkMode"`
	Node                  string         `json:"node,omitempty"`
	Protocol              string         `json:"protocol"`
	ServiceAccount        string         `json:"serviceAccount,omitempty"`
	Services              []string       `json:"services,omitempty"`
	Status                string         `json:"status"`
	TrustDomain           string         `json:"trustDomain,omitempty"`
	UID                   string         `json:"uid,omitempty"`
	Waypoint              *gatewayDump   `json:"waypoint,omitempty"`
	WorkloadIPs           []netip.Addr   `json:"workloadIps"`
	WorkloadName          string         `json:"workloadName,omitempty"`
	WorkloadType          string         `json:"workloadType,omitempty"`
}

// Dump returns the snapshot's config dump.
func (s *Snapshot) Dump() *Dump {
	d := &Dump{
		Policies:       []*authz.Policy{},
		Services:       []ServiceDump{},
		StagedServices: make(map[string]map[string]EndpointDump),
		Workloads:      []*Workload{},
	}
	for _, e := range s.policies.all() {
		if e.policy != nil {
			d.Policies = append(d.Policies, e.policy)
		}
	}
	for _, svc := range s.services.all() {
		d.Services = append(d.Services, s.dumpService(svc))
	}
	for key, m := range s.members.all() {
		if _, known := s.services.get(key); !known {
			staged := make(map[string]EndpointDump)
			for uid, w := range m.byUID.all() {
				staged[uid] = dumpEndpoint(key, w)
			}
			d.StagedServices[key.String()] = staged
		}
	}
	for _, w := range s.workloads.all() {
		d.Workloads = append(d.Workloads, w)
	}
	slices.SortFunc(d.Policies, func(a, b *authz.Policy) int { return strings.Compare(a.Key, b.Key) })
	slices.SortFunc(d.Services, func(a, b ServiceDump) int {
		return cmp.Or(strings.Compare(a.Hostname, b.Hostname), strings.Compare(a.Namespace, b.Namespace))
	})
	slices.SortFunc(d.Workloads, func(a, b *Workload) int { return strings.Compare(a.UID, b.UID) })
	return d
}

func (s *Snapshot) dumpService(svc *Service) ServiceDump {
	d := ServiceDump{
		Canonical:       svc.Canonical,
		Endpoints:       make(map[string]EndpointDump),
		Hostname:        svc.Hostname,
		IPFamilies:      svc.Families.String(),
		Name:            svc.Name,
		Namespace:       svc.Namespace,
		Ports:           svc.Ports,
		SubjectAltNames: append([]string{}, svc.SubjectAltNames...),
		VIPs:            []string{},
		Visibility:      "Public",
		Waypoint:        svc.Waypoint.dump(),
	}
	if svc.NamespaceOnly {
		d.Visibility = "Namespace"
	}
	for _, w := range s.Endpoints(svc) {
		d.Endpoints[w.UID] = dumpEndpoint(svc.ServiceKey, w)
	}
	for _, vip := range svc.VIPs {
		d.VIPs = append(d.VIPs, vip.Network+"/"+vip.Addr.String())
	}
	for _, c := range svc.CIDRs {
		d.CIDRVIPs = append(d.CIDRVIPs, cidrDump{c.Prefix, c.Network})
	}
	for _, w := range svc.WeightedWaypoints {
		d.WeightedWaypoint = append(d.WeightedWaypoint, weightedDump{*w.Gateway.dump(), w.Weight})
	}
	if lb := svc.LoadBalancer; lb != nil {
		d.LoadBalancer = &loadBalancerDump{
			HealthPolicy:       "OnlyHealthy",
			Mode:               lb.Mode.String(),
			RoutingPreferences: []string{},
		}
		if lb.AllowUnhealthy {
			d.LoadBalancer.HealthPolicy = "AllowAll"
		}
		for _, scope := range lb.Preferences {
			d.LoadBalancer.RoutingPreferences = append(d.LoadBalancer.RoutingPreferences, scope.String())
		}
	}
	return d
}

func dumpEndpoint(key ServiceKey, w *Workload) EndpointDump {
	ports, _ := w.Member(key)
	return EndpointDump{Port: ports, Status: w.status(), WorkloadUID: w.UID}
}

func (w *Workload) status() string {
	if w.Healthy {
		return "Healthy"
	}
	return "Unhealthy"
}

func (g *Gateway) dump() *gatewayDump {
	if g == nil {
		return nil
	}
	return &gatewayDump{g.String(), g.Port}
}

// MarshalJSON gives the form of the config dump.
func (w *Workload) MarshalJSON() ([]byte, error) {
	d := workloadDump{
		AuthorizationPolicies: w.Policies,
		CanonicalName:         w.CanonicalName,
		CanonicalRevision:     w.CanonicalRevision,
		Capacity:              w.Capacity,
		ClusterID:             w.Cluster,
		Hostname:              w.Hostname,
		Name:                  w.Name,
		Namespace:             w.Namespace,
		NativeTunnel:          w.NativeTunnel,
		Network:               w.Network,
		NetworkGateway:        w.NetworkGateway.dump(),
		NetworkMode:           "Standard",
		Node:                  w.Node,
		Protocol:              w.Protocol.String(),
		ServiceAccount:        w.ServiceAccount,
		Status:                w.status(),
		TrustDomain:           w.TrustDomain,
		UID:                   w.UID,
		Waypoint:              w.Waypoint.dump(),
		WorkloadIPs:           append([]netip.Addr{}, w.Addrs...),
		WorkloadName:          w.WorkloadName,
		WorkloadType:          w.WorkloadType,
	}
	if w.HostNetwork {
		d.NetworkMode = "HostNetwork"
	}
	if l := (localityDump{w.Region, w.Subzone, w.Zone}); l != (localityDump{}) {
		d.Locality = &l
	}
	if t := w.AppTunnel; t != nil {
		d.AppTunnel = &appTunnelDump{Protocol: "NONE"}
		if t.Proxy {
			d.AppTunnel.Protocol = "PROXY"
		}
		if t.Port != 0 {
			d.AppTunnel.Port = &t.Port
		}
	}
	for i := range w.Services {
		d.Services = append(d.Services, w.Services[i].Service.String())
	}
	return json.Marshal(d)
}

// MarshalJSON gives an object of service port to target port.
func (m PortMap) MarshalJSON() ([]byte, error) {
	return json.Marshal(maps.Collect(func(yield func(uint16, uint16) bool) {
		for _, p := range m {
			if !yield(p.Service, p.Target) {
				return
			}
		}
	}))
}
