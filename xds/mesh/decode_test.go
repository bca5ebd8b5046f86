package mesh

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/workloadapi"
)

func TestMalformedResourceRejectsItselfAlone(t *testing.T) {
	with := func(change func(*pbWorkload)) *pbWorkload { return pod("ns", "bad", "10.0.0.2", change) }
	withSvc := func(change func(*pbService)) *pbService { return svc("ns", "bad", change) }
	tests := []struct {
		name string
		in   proto.Message
		want string
	}{
		{"IP of 5 bytes", with(func(w *pbWorkload) { w.Addresses = append(w.Addresses, make([]byte, 5)) }), "addresses: address is neither"},
		{"IP of no bytes", with(func(w *pbWorkload) { w.Addresses = [][]byte{{}} }), "addresses: address is neither"},
		{"too many IPs", with(func(w *pbWorkload) { w.Addresses = make([][]byte, maxAddrs+1) }), "addresses: too many"},
		{"legacy mTLS", with(func(w *pbWorkload) { w.TunnelProtocol = workloadapi.TunnelProtocol_LEGACY_ISTIO_MTLS }), "LEGACY_ISTIO_MTLS"},
		{"tunnel protocol", with(func(w *pbWorkload) { w.TunnelProtocol = 9 }), "tunnel_protocol: unknown enum"},
		{"network mode", with(func(w *pbWorkload) { w.NetworkMode = 9 }), "network_mode: unknown enum"},
		{"status", with(func(w *pbWorkload) { w.Status = 9 }), "status: unknown enum"},
		{"waypoint", with(func(w *pbWorkload) { w.Waypoint = &workloadapi.GatewayAddress{} }), "waypoint: gateway without"},
		{"waypoint address", with(func(w *pbWorkload) {
			w.Waypoint = &workloadapi.GatewayAddress{Destination: &workloadapi.GatewayAddress_Address{Address: &workloadapi.NetworkAddress{}}}
		}), "waypoint: address"},
		{"gateway port", with(func(w *pbWorkload) { w.NetworkGateway = byHost("a", "b"); w.NetworkGateway.HboneMtlsPort = 1 << 16 }), "network_gateway: port above"},
		{"service key", with(in("nokey")), "services: service key"},
		{"service port", with(in("ns/s", 1<<16, 1)), "services: ns/s: port above"},
		{"target port", with(in("ns/s", 1, 1<<16)), "services: ns/s: port above"},
		{"application tunnel", with(func(w *pbWorkload) { w.ApplicationTunnel = &workloadapi.ApplicationTunnel{Protocol: 9} }), "application_tunnel: unknown enum"},
		{"application tunnel port", with(func(w *pbWorkload) { w.ApplicationTunnel = &workloadapi.ApplicationTunnel{Port: 1 << 16} }), "application_tunnel: port above"},
		{"no uid", with(uid("")), "resource name"},

		{"namespace that no removal could name", withSvc(func(s *pbService) { s.Namespace = "a/b" }), "namespace contains"},
		{"VIP", withSvc(func(s *pbService) { s.Addresses = []*workloadapi.NetworkAddress{{Address: make([]byte, 3)}} }), "addresses: address is neither"},
		{"prefix length", withSvc(func(s *pbService) {
			s.Addresses = []*workloadapi.NetworkAddress{{Address: make([]byte, 4), Length: proto.Uint32(33)}}
		}), "addresses: prefix length"},
		{"too many VIPs", withSvc(func(s *pbService) { s.Addresses = make([]*workloadapi.NetworkAddress, maxAddrs+1) }), "addresses: too many"},
		{"ports", withSvc(servicePorts(1<<16, 1)), "ports: port above"},
		{"service waypoint", withSvc(func(s *pbService) { s.Waypoint = &workloadapi.GatewayAddress{} }), "waypoint: gateway without"},
		{"weighted waypoint", withSvc(func(s *pbService) { s.WeightedWaypoints = []*workloadapi.WeightedWaypoint{{Weight: 1}} }), "weighted_waypoints: gateway without"},
		{"scope", withSvc(balanced(failover, workloadapi.LoadBalancing_UNSPECIFIED_SCOPE)), "load_balancing: routing_preference: unknown enum"},
		{"mode", withSvc(balanced(9)), "load_balancing: mode: unknown enum"},
		{"health policy", withSvc(func(s *pbService) { s.LoadBalancing = &workloadapi.LoadBalancing{HealthPolicy: 9} }), "load_balancing: health_policy: unknown enum"},
		{"ip families", withSvc(func(s *pbService) { s.IpFamilies = 9 }), "ip_families: unknown enum"},
		{"neither", &workloadapi.Address{}, "neither workload nor service"},
	}
	for _, tt := range tests {
		w := newWorld(t, Config{})
		rejected := w.try(pod("ns", "before", "10.0.0.1"), tt.in, svc("ns", "after"))
		if len(rejected) != 1 || !strings.Contains(rejected[0].Err.Error(), tt.want) {
			t.Errorf("%s: rejected = %v, want one with %q", tt.name, rejected, tt.want)
		}
		s := w.Snapshot()
		if s.Workload("cluster1//Pod/ns/before") == nil || s.Service("ns", "after.ns") == nil || s.workloads.len()+s.services.len() != 2 {
			t.Errorf("%s: the rest was not applied, or the bad one was", tt.name)
		}
	}
	w := newWorld(t, Config{})
	w.put(pod("ns", "a", "10.0.0.1"))
	misnamed := encode(t, pod("ns", "a", "10.0.0.2"))
	misnamed.Name = "other"
	junk := xds.Resource{Name: "junk", Body: []byte{0xff, 0xff}}
	if rejected := w.Addresses().Apply([]xds.Resource{misnamed, junk}, nil); len(rejected) != 2 {
		t.Errorf("rejected = %v, want both", rejected)
	}
	if !w.Snapshot().Workload("cluster1//Pod/ns/a").Has(addrOf("10.0.0.1")) {
		t.Error("the old workload was not kept")
	}
}

func TestOneNameIsOneResource(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(pod("ns", "a", "10.0.0.1", uid("ns/s.ns")))
	w.put(svc("ns", "s", at80("10.1.0.1")))
	if s := w.Snapshot(); s.workloads.len() != 0 || s.services.len() != 1 {
		t.Errorf("%d workloads and %d services, want the service", s.workloads.len(), s.services.len())
	}
	w.put(pod("ns", "a", "10.0.0.1", uid("ns/s.ns")))
	if s := w.Snapshot(); s.workloads.len() != 1 || s.services.len() != 0 {
		t.Errorf("%d workloads and %d services, want the workload", s.workloads.len(), s.services.len())
	}
}

func TestElisionsAreUndone(t *testing.T) {
	w := newWorld(t, Config{TrustDomain: "td"})
	w.put(&pbWorkload{Uid: "u", Namespace: "ns", WorkloadType: 77, Addresses: [][]byte{addrOf("::ffff:10.0.0.1").AsSlice(), addrOf("10.0.0.1").AsSlice()}})
	got := w.Snapshot().Workload("u")
	if got.Identity.String() != "spiffe://td/ns/ns/sa/default" || got.Cluster != "Kubernetes" || got.Capacity != 1 || got.WorkloadType != "deployment" || len(got.Addrs) != 1 || !got.Healthy {
		t.Errorf("elisions: %+v", got)
	}
}

// exercise asks everything of a world that hostile bytes have made.
func exercise(t *testing.T, w world) {
	w.put(source())
	s := w.Snapshot()
	src := s.Local("src", "ns", "src")
	if _, err := json.Marshal(s.Dump()); err != nil {
		t.Fatal(err)
	}
	for _, found := range s.workloads.all() {
		for _, ip := range found.Addrs {
			s.WorkloadByIP(found.Network, ip)
			s.ServiceByVIP(found.Network, ip, "")
			_, _ = s.Resolve(src, netip.AddrPortFrom(ip, 80))
			_, _ = s.Resolve(found, netip.AddrPortFrom(ip, 80))
		}
		apply, missing := s.Policies(found)
		authz.Check(authz.Input{Peer: found.Identity}, apply, missing)
		s.ServicesOf(found)
	}
	for _, found := range s.services.all() {
		for _, v := range found.VIPs {
			for _, p := range found.Ports {
				_, _ = s.Resolve(src, netip.AddrPortFrom(v.Addr, p.Service))
			}
		}
		for _, c := range found.CIDRs {
			if s.ServiceByVIP(c.Network, c.Prefix.Addr(), "") == nil {
				t.Errorf("prefix %v finds nothing", c)
			}
		}
		s.Endpoints(found)
	}
	var names []string
	for name := range s.workloads.all() {
		names = append(names, name)
	}
	for key := range s.services.all() {
		names = append(names, key.String())
	}
	w.remove(names...)
	if s := w.Snapshot(); s.byIP.len()+s.local.len()+s.ids.len()+s.members.len()+s.byHost.len()+s.byVIP.len()+s.byCIDR.len() != 0 {
		t.Errorf("entries are left in the indexes")
	}
}

func fuzzAddress(f *testing.F, seeds ...proto.Message) {
	for _, m := range seeds {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
}

func FuzzWorkload(f *testing.F) {
	full := pod("ns", "p", "10.0.0.1,fd00::1", network("n"), hostname("h"), capacity(7), in("ns/s.ns", 80, 8080), viaWaypoint(byHost("ns", "wp")), viaGateway(byAddr("far", "fd00::9")), named("a/b"), locality("r", "z", "s"))
	fuzzAddress(f, &pbWorkload{}, full, pod("ns", "h", "10.0.0.1", hostNetwork, plain, unhealthy))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p pbWorkload
		if proto.Unmarshal(b, &p) != nil {
			return
		}
		w := newWorld(t, Config{})
		w.put(svc("ns", "s", at80("10.1.0.1")))
		w.try(&p)
		w.try(&p)
		exercise(t, w)
	})
}

func FuzzService(f *testing.F) {
	full := svc("ns", "s", at80("10.1.0.1", "10.2.0.0/16", "fd00::/64", "::ffff:10.0.0.0/112"), balanced(failover, scopeNet, scopeZone), allowAll, namespaceOnly, servicePorts(80, 0, 81, 1))
	full.SubjectAltNames = []string{"spiffe://a/ns/b/sa/c"}
	full.WeightedWaypoints = []*workloadapi.WeightedWaypoint{{Destination: byHost("ns", "wp"), Weight: 3}}
	fuzzAddress(f, &pbService{}, full, svc("ns", "s", at80("10.1.0.1")))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p pbService
		if proto.Unmarshal(b, &p) != nil {
			return
		}
		w := newWorld(t, Config{})
		w.put(pod("ns", "a", "10.0.0.2", in("ns/s.ns", 80, 8080)), pod("ns", "b", "10.0.0.3", in(p.GetNamespace()+"/"+p.GetHostname(), 80, 8080)))
		w.try(&p)
		w.try(&p)
		exercise(t, w)
	})
}
