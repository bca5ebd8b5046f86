package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A world is a Store that is fed through its handlers.
type world struct {
	*Store
	t testing.TB
}

func newWorld(t testing.TB, c Config) world { return world{NewStore(c), t} }

func encode(t testing.TB, m proto.Message) xds.Resource {
	t.Helper()
	var name string
	switch v := m.(type) {
	case *workloadapi.Workload:
		name, m = v.GetUid(), &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: v}}
	case *workloadapi.Service:
		name, m = v.GetNamespace()+"/"+v.GetHostname(), &workloadapi.Address{Type: &workloadapi.Address_Service{Service: v}}
	case *securityapi.Authorization:
		name = v.GetNamespace() + "/" + v.GetName()
	}
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return xds.Resource{Name: name, Version: "v", Body: b}
}

// put applies one batch of workloads and services; all must be accepted.
func (w world) put(items ...proto.Message) {
	w.t.Helper()
	if rejected := w.try(items...); len(rejected) > 0 {
		w.t.Fatalf("rejected: %v", rejected)
	}
}

func (w world) try(items ...proto.Message) []xds.Rejection {
	w.t.Helper()
	var added []xds.Resource
	for _, m := range items {
		added = append(added, encode(w.t, m))
	}
	return w.Addresses().Apply(added, nil)
}

func (w world) remove(names ...string) { w.Addresses().Apply(nil, names) }

func (w world) policies(items ...*securityapi.Authorization) []xds.Rejection {
	w.t.Helper()
	var added []xds.Resource
	for _, m := range items {
		added = append(added, encode(w.t, m))
	}
	return w.Authorizations().Apply(added, nil)
}

func addrOf(s string) netip.Addr { return netip.MustParseAddr(s) }

type (
	pbWorkload = workloadapi.Workload
	pbService  = workloadapi.Service
)

type workloadOption func(*pbWorkload)

// pod is a healthy HBONE pod of cluster1, whose service account has its name.
func pod(namespace, name, ips string, options ...workloadOption) *pbWorkload {
	w := &pbWorkload{
		Uid: "cluster1//Pod/" + namespace + "/" + name, Name: name, Namespace: namespace, ServiceAccount: name,
		TunnelProtocol: workloadapi.TunnelProtocol_HBONE,
	}
	if ips != "" {
		for ip := range strings.SplitSeq(ips, ",") {
			w.Addresses = append(w.Addresses, addrOf(ip).AsSlice())
		}
	}
	for _, o := range options {
		o(w)
	}
	return w
}

func uid(s string) workloadOption     { return func(w *pbWorkload) { w.Uid = s } }
func on(node string) workloadOption   { return func(w *pbWorkload) { w.Node = node } }
func network(n string) workloadOption { return func(w *pbWorkload) { w.Network = n } }
func plain(w *pbWorkload)             { w.TunnelProtocol = workloadapi.TunnelProtocol_NONE }
func unhealthy(w *pbWorkload)         { w.Status = workloadapi.WorkloadStatus_UNHEALTHY }
func hostNetwork(w *pbWorkload)       { w.NetworkMode = workloadapi.NetworkMode_HOST_NETWORK }
func hostname(h string) workloadOption {
	return func(w *pbWorkload) { w.Hostname = h }
}

func capacity(n uint32) workloadOption {
	return func(w *pbWorkload) { w.Capacity = wrapperspb.UInt32(n) }
}

func locality(region, zone, subzone string) workloadOption {
	return func(w *pbWorkload) {
		w.Locality = &workloadapi.Locality{Region: region, Zone: zone, Subzone: subzone}
	}
}

func viaWaypoint(g *workloadapi.GatewayAddress) workloadOption {
	return func(w *pbWorkload) { w.Waypoint = g }
}

func viaGateway(g *workloadapi.GatewayAddress) workloadOption {
	return func(w *pbWorkload) { w.NetworkGateway = g }
}

// in makes a workload an endpoint of namespace/hostname, with pairs of service
// and target ports.
func in(key string, pairs ...uint32) workloadOption {
	return func(w *pbWorkload) {
		if w.Services == nil {
			w.Services = make(map[string]*workloadapi.PortList)
		}
		w.Services[key] = &workloadapi.PortList{Ports: portsOf(pairs)}
	}
}

func portsOf(pairs []uint32) (out []*workloadapi.Port) {
	for p := range slices.Chunk(pairs, 2) {
		out = append(out, &workloadapi.Port{ServicePort: p[0], TargetPort: p[1]})
	}
	return out
}

func byHost(namespace, hostname string) *workloadapi.GatewayAddress {
	return &workloadapi.GatewayAddress{
		Destination:   &workloadapi.GatewayAddress_Hostname{Hostname: &workloadapi.NamespacedHostname{Namespace: namespace, Hostname: hostname}},
		HboneMtlsPort: 15008,
	}
}

func byAddr(network, ip string) *workloadapi.GatewayAddress {
	return &workloadapi.GatewayAddress{
		Destination:   &workloadapi.GatewayAddress_Address{Address: vip(network, ip)},
		HboneMtlsPort: 15008,
	}
}

type serviceOption func(*pbService)

// svc is a service with the host name name.namespace, whose port 80 leads to 8080.
func svc(namespace, name string, options ...serviceOption) *pbService {
	s := &pbService{Name: name, Namespace: namespace, Hostname: name + "." + namespace, Ports: portsOf([]uint32{80, 8080})}
	for _, o := range options {
		o(s)
	}
	return s
}

// vip is network-less or network/ip, with an optional prefix length.
func vip(network, text string) *workloadapi.NetworkAddress {
	if p, err := netip.ParsePrefix(text); err == nil {
		return &workloadapi.NetworkAddress{Network: network, Address: p.Addr().AsSlice(), Length: proto.Uint32(uint32(p.Bits()))}
	}
	return &workloadapi.NetworkAddress{Network: network, Address: addrOf(text).AsSlice()}
}

func at80(vips ...string) serviceOption {
	return func(s *pbService) {
		for _, v := range vips {
			s.Addresses = append(s.Addresses, vip("", v))
		}
	}
}

func host(h string) serviceOption   { return func(s *pbService) { s.Hostname = h } }
func canonicalService(s *pbService) { s.Canonical = true }
func namespaceOnly(s *pbService)    { s.Visibility = workloadapi.Service_NAMESPACE }
func servicePorts(pairs ...uint32) serviceOption {
	return func(s *pbService) { s.Ports = portsOf(pairs) }
}

func balanced(mode workloadapi.LoadBalancing_Mode, scopes ...workloadapi.LoadBalancing_Scope) serviceOption {
	return func(s *pbService) {
		s.LoadBalancing = &workloadapi.LoadBalancing{Mode: mode, RoutingPreference: scopes}
	}
}

func allowAll(s *pbService) {
	if s.LoadBalancing == nil {
		s.LoadBalancing = &workloadapi.LoadBalancing{}
	}
	s.LoadBalancing.HealthPolicy = workloadapi.LoadBalancing_ALLOW_ALL
}

// inTurn is a Rand that yields 0, 1, 2, ... modulo n.
func inTurn() func(uint64) uint64 {
	var next uint64
	return func(n uint64) uint64 {
		next++
		return (next - 1) % n
	}
}

func names(list []*Workload) string {
	var out []string
	for _, w := range list {
		out = append(out, w.Name)
	}
	slices.Sort(out)
	return fmt.Sprint(out)
}
