package fuzz

import (
	"net/netip"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

// The world is small, so that things meet. One name is a workload's and
// a service's.
var (
	uids         = []string{"c1//Pod/ns1/a", "c1//Pod/ns2/b", "c1/networking.istio.io/WorkloadEntry/ns1/c", "ns1/svc.ns1", "c1//Pod/ns1/d"}
	hosts        = []string{"svc.ns1", "other.ns1"}
	serviceNames = []string{"ns1/svc.ns1", "ns2/svc.ns1", "ns1/other.ns1"}
	policyNames  = []string{"ns1/p", "ns1/q", "ns2/p", "root/g"}
	namespaces   = []string{"ns1", "ns2", ""}
	networks     = []string{"", "net2"}
	ips          = []netip.Addr{
		netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.1.1"),
		netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("203.0.113.1"),
	}
	connections = []connection{
		{src: netip.MustParseAddrPort("10.0.0.1:4711"), dst: netip.MustParseAddrPort("10.0.0.2:80")},
		{src: netip.MustParseAddrPort("10.0.0.1:4711"), dst: netip.MustParseAddrPort("10.0.0.2:81"), peer: "spiffe://cluster.local/ns/ns1/sa/a"},
		{src: netip.MustParseAddrPort("[fd00::1]:4711"), dst: netip.MustParseAddrPort("[fd00::2]:80"), peer: "spiffe://td/ns/ns2/sa/b"},
	}
)

// name draws the name of a resource.
func (s *script) name(kind int) string {
	switch {
	case kind == policies:
		return choose(s, policyNames...)
	case s.one(2):
		return choose(s, serviceNames...)
	}
	return choose(s, uids...)
}

// resource draws a resource, now and then one that is no good: of another name,
// cut short, or nothing at all.
func (s *script) resource(kind int) (name string, body []byte) {
	name = s.name(kind)
	var m proto.Message
	switch {
	case kind == policies:
		m = s.policy(name)
	case name == uids[3] && s.one(2) || name != uids[3] && contains(serviceNames, name):
		m = &workloadapi.Address{Type: &workloadapi.Address_Service{Service: s.service(name)}}
	default:
		m = &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: s.workload(name)}}
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	switch s.pick(24) {
	case 23:
		name = s.name(kind)
	case 22:
		body = body[:s.pick(256)*len(body)/256]
	case 21:
		body = s.bytes(20)
	case 20:
		body = append(body, s.bytes(10)...)
	}
	return name, body
}

func contains(list []string, x string) bool {
	for _, y := range list {
		if x == y {
			return true
		}
	}
	return false
}

// bad is true once in a while: for a value that nobody can use.
func (s *script) bad() bool { return s.pick(64) == 63 }

func (s *script) workload(uid string) *workloadapi.Workload {
	w := &workloadapi.Workload{
		Uid: uid, Name: choose(s, "a", "b"), Namespace: choose(s, namespaces...), ServiceAccount: choose(s, "", "a", "b"),
		TrustDomain: choose(s, "", "td", "a/b"), Network: choose(s, "", "", "", "net2"), Node: choose(s, localNode, localNode, "n2"),
		ClusterId:      choose(s, "", "c2"),
		Locality:       &workloadapi.Locality{Region: choose(s, "", "r"), Zone: choose(s, "", "z")},
		TunnelProtocol: choose(s, workloadapi.TunnelProtocol_HBONE, workloadapi.TunnelProtocol_HBONE, workloadapi.TunnelProtocol_NONE),
		Status:         choose(s, workloadapi.WorkloadStatus_HEALTHY, workloadapi.WorkloadStatus_HEALTHY, workloadapi.WorkloadStatus_UNHEALTHY),
		NetworkMode:    choose(s, workloadapi.NetworkMode_STANDARD, workloadapi.NetworkMode_STANDARD, workloadapi.NetworkMode_STANDARD, workloadapi.NetworkMode_HOST_NETWORK),
		NativeTunnel:   s.one(4),
	}
	for range s.pick(3) {
		w.Addresses = append(w.Addresses, s.ip())
	}
	for range s.pick(3) {
		key := choose(s, serviceNames...)
		if s.bad() {
			key = "no-slash"
		}
		if w.Services == nil {
			w.Services = make(map[string]*workloadapi.PortList)
		}
		w.Services[key] = &workloadapi.PortList{Ports: s.ports()}
	}
	for range s.pick(3) {
		w.AuthorizationPolicies = append(w.AuthorizationPolicies, choose(s, policyNames...))
	}
	switch s.pick(12) {
	case 11:
		w.Waypoint = s.gateway()
	case 10:
		w.NetworkGateway = s.gateway()
	case 9:
		w.Hostname = choose(s, hosts...)
	case 8:
		w.Capacity = wrapperspb.UInt32(uint32(s.pick(4)))
	case 7:
		w.TunnelProtocol = workloadapi.TunnelProtocol(s.pick(4))
	case 6:
		w.Status, w.NetworkMode = workloadapi.WorkloadStatus(s.pick(3)), workloadapi.NetworkMode(s.pick(3))
	}
	return w
}

func (s *script) service(name string) *workloadapi.Service {
	svc := &workloadapi.Service{
		Namespace: name[:3], Hostname: name[4:], Ports: s.ports(), Canonical: s.one(3),
		Visibility: choose(s, workloadapi.Service_PUBLIC, workloadapi.Service_PUBLIC, workloadapi.Service_NAMESPACE),
	}
	for range s.pick(4) {
		svc.Addresses = append(svc.Addresses, s.vip())
	}
	switch s.pick(12) {
	case 11:
		svc.Waypoint = s.gateway()
	case 10:
		svc.WeightedWaypoints = []*workloadapi.WeightedWaypoint{{Destination: s.gateway(), Weight: uint32(s.pick(2))}}
	case 9, 8, 7, 6:
		lb := &workloadapi.LoadBalancing{Mode: workloadapi.LoadBalancing_Mode(s.pick(4)), HealthPolicy: workloadapi.LoadBalancing_HealthPolicy(s.pick(2))}
		for range s.pick(4) {
			lb.RoutingPreference = append(lb.RoutingPreference, workloadapi.LoadBalancing_Scope(1+s.pick(6)))
		}
		if s.bad() {
			lb.Mode = 9
		}
		svc.LoadBalancing = lb
	case 5:
		svc.IpFamilies = workloadapi.IPFamilies(s.pick(5))
	case 4:
		svc.SubjectAltNames = []string{choose(s, "spiffe://td/ns/ns1/sa/x", "dns.name"), "spiffe://td/ns/ns1/sa/y"}
	}
	return svc
}

// ip draws an address, IPv4 now and then in its mapped form.
func (s *script) ip() []byte {
	a := choose(s, ips...)
	switch {
	case s.bad():
		return []byte{1, 2, 3}
	case a.Is4() && s.one(8):
		b := a.As16()
		return b[:]
	}
	return a.AsSlice()
}

func (s *script) vip() *workloadapi.NetworkAddress {
	a := &workloadapi.NetworkAddress{Network: choose(s, "", "", "net2"), Address: s.ip()}
	if s.one(3) {
		a.Length = proto.Uint32(choose[uint32](s, 8, 16, 24, 32, 64, 100, 128))
		if n := uint32(len(a.Address)) * 8; *a.Length > n && !s.bad() {
			a.Length = proto.Uint32(n - 8)
		}
	}
	return a
}

func (s *script) ports() (out []*workloadapi.Port) {
	for range 1 + s.pick(2) {
		p := &workloadapi.Port{ServicePort: choose[uint32](s, 80, 80, 81), TargetPort: choose[uint32](s, 8080, 8080, 0, 9090)}
		if s.bad() {
			p.TargetPort = 70000
		}
		out = append(out, p)
	}
	return out
}

func (s *script) gateway() *workloadapi.GatewayAddress {
	g := &workloadapi.GatewayAddress{HboneMtlsPort: 15008}
	switch s.pick(4) {
	case 0, 1:
		name := choose(s, serviceNames...)
		g.Destination = &workloadapi.GatewayAddress_Hostname{Hostname: &workloadapi.NamespacedHostname{Namespace: name[:3], Hostname: name[4:]}}
	case 2:
		g.Destination = &workloadapi.GatewayAddress_Address{Address: &workloadapi.NetworkAddress{Address: s.ip()}}
	}
	return g
}

func (s *script) policy(name string) *securityapi.Authorization {
	a := &securityapi.Authorization{
		Name: "p", Namespace: choose(s, namespaces...), DryRun: s.one(4),
		Scope: securityapi.Scope(s.pick(3)), Action: securityapi.Action(s.pick(2)),
	}
	if s.bad() {
		a.Scope = 7
	}
	for range s.pick(3) {
		r := &securityapi.Rule{}
		for range s.pick(3) {
			c := &securityapi.Clause{}
			for range s.pick(3) {
				c.Matches = append(c.Matches, s.match())
			}
			r.Clauses = append(r.Clauses, c)
		}
		a.Rules = append(a.Rules, r)
	}
	return a
}

func (s *script) match() *securityapi.Match {
	m := &securityapi.Match{}
	for range s.pick(3) {
		switch s.pick(10) {
		case 0:
			m.Namespaces = append(m.Namespaces, s.text("ns1", "ns2"))
		case 1:
			m.NotNamespaces = append(m.NotNamespaces, s.text("ns1", "ns2"))
		case 2:
			m.Principals = append(m.Principals, s.text("cluster.local/ns/ns1/sa/a", "td/"))
		case 3:
			m.NotPrincipals = append(m.NotPrincipals, s.text("cluster.local/ns/ns1/sa/a", "/b"))
		case 4:
			m.SourceIps = append(m.SourceIps, s.block())
		case 5:
			m.NotSourceIps = append(m.NotSourceIps, s.block())
		case 6:
			m.DestinationPorts = append(m.DestinationPorts, choose[uint32](s, 80, 81, 70000))
		case 7:
			m.NotDestinationPorts = append(m.NotDestinationPorts, choose[uint32](s, 80, 81))
		case 8:
			m.ServiceAccounts = append(m.ServiceAccounts, &securityapi.ServiceAccountMatch{Namespace: "ns1", ServiceAccount: "a"})
		case 9:
			m.NotDestinationIps = append(m.NotDestinationIps, s.block())
		}
	}
	return m
}

func (s *script) text(list ...string) *securityapi.StringMatch {
	text := choose(s, list...)
	switch s.pick(16) {
	case 0, 1:
		return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Prefix{Prefix: text}}
	case 2, 3:
		return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Suffix{Suffix: text}}
	case 4:
		return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Presence{}}
	case 5:
		return &securityapi.StringMatch{}
	}
	return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Exact{Exact: text}}
}

func (s *script) block() *securityapi.Address {
	a := &securityapi.Address{Address: s.ip()}
	a.Length = choose(s, uint32(len(a.Address))*8, 8, 0, 24, 129)
	return a
}
