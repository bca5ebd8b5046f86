package mesh

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/xds/workloadapi"
)

func source(options ...workloadOption) *pbWorkload { return pod("ns", "src", "127.0.0.1", options...) }

func TestResolve(t *testing.T) {
	const (
		passthrough = workloadapi.LoadBalancing_PASSTHROUGH
		failover    = workloadapi.LoadBalancing_FAILOVER
		byNetwork   = workloadapi.LoadBalancing_NETWORK
	)
	server := pod("ns", "server", "10.0.0.2", in("ns/s.ns", 80, 8080))
	families := func(f workloadapi.IPFamilies) serviceOption {
		return func(s *pbService) { s.IpFamilies = f }
	}
	dual := pod("ns", "dual", "10.0.0.2,fd00::2", in("ns/s.ns", 80, 8080))
	waypointOf := func(g *workloadapi.GatewayAddress) serviceOption {
		return func(s *pbService) { s.Waypoint = g }
	}
	weighted := func(weights ...uint32) serviceOption {
		return func(s *pbService) {
			for _, n := range weights {
				s.WeightedWaypoints = append(s.WeightedWaypoints, &workloadapi.WeightedWaypoint{Destination: byHost("ns", "weighted.ns"), Weight: n})
			}
		}
	}
	tests := []struct {
		name  string
		world []proto.Message
		dst   string
		want  string // Kind, dialled address, authority, peer, service.
		err   error
		text  string
	}{
		{"unknown destination", nil, "1.2.3.4:80", "PASSTHROUGH 1.2.3.4:80", nil, ""},
		{"unknown destination, mapped", nil, "[::ffff:1.2.3.4]:80", "PASSTHROUGH 1.2.3.4:80", nil, ""},
		{"workload in plain", list(pod("ns", "w", "10.0.0.2", plain, on("far"))), "10.0.0.2:80", "TCP 10.0.0.2:80 w", nil, ""},
		{"workload by HBONE, same node", list(pod("ns", "w", "10.0.0.2")), "10.0.0.2:80", "HBONE 10.0.0.2:15008 10.0.0.2:80 w", nil, ""},
		{"workload by HBONE, IPv6", list(pod("ns", "w", "fd00::2", on("far"))), "[fd00::2]:80", "HBONE [fd00::2]:15008 [fd00::2]:80 w", nil, ""},
		{"workload on another network is another", list(pod("ns", "w", "10.0.0.2", network("remote"))), "10.0.0.2:80", "PASSTHROUGH 10.0.0.2:80", nil, ""},
		{"workload that is unhealthy, addressed directly", list(pod("ns", "w", "10.0.0.2", unhealthy)), "10.0.0.2:80", "HBONE 10.0.0.2:15008 10.0.0.2:80 w", nil, ""},
		{"self", nil, "127.0.0.1:80", "HBONE 127.0.0.1:15008 127.0.0.1:80 src", nil, ""},
		{"impossible identity", list(pod("a/b", "w", "10.0.0.2")), "10.0.0.2:80", "", ErrNoIdentity, "no valid identity"},
		{"impossible identity in plain", list(pod("a/b", "w", "10.0.0.2", plain)), "10.0.0.2:80", "TCP 10.0.0.2:80 w", nil, ""},

		{"service", list(server, svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 server ns/s.ns", nil, ""},
		{"service in plain", list(pod("ns", "w", "10.0.0.2", plain, in("ns/s.ns", 80, 9090)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "TCP 10.0.0.2:9090 w ns/s.ns", nil, ""},
		{"service without this port", list(server, svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:81", "", ErrNoPort, "10.1.0.1:81"},
		{"service without endpoints", list(svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "", ErrNoHealthyUpstream, "10.1.0.1:80"},
		{"service with unhealthy endpoints", list(pod("ns", "w", "10.0.0.2", unhealthy, in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "", ErrNoHealthyUpstream, ""},
		{"service that allows unhealthy endpoints", list(pod("ns", "w", "10.0.0.2", unhealthy, in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"), allowAll)), "10.1.0.1:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 w ns/s.ns", nil, ""},
		{"capacity 0", list(pod("ns", "w", "10.0.0.2", capacity(0), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "", ErrNoHealthyUpstream, ""},
		{"named target port", list(pod("ns", "a", "10.0.0.2", in("ns/s.ns")), pod("ns", "b", "10.0.0.3", in("ns/s.ns", 80, 1234)), svc("ns", "s", at80("10.1.0.1"), servicePorts(80, 0))), "10.1.0.1:80", "HBONE 10.0.0.3:15008 10.0.0.3:1234 b ns/s.ns", nil, ""},
		{"named target port nobody has", list(pod("ns", "a", "10.0.0.2", in("ns/s.ns")), svc("ns", "s", at80("10.1.0.1"), servicePorts(80, 0))), "10.1.0.1:80", "", ErrNoHealthyUpstream, ""},
		{"service address before workload address", list(pod("ns", "w", "10.1.0.1"), server, svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 server ns/s.ns", nil, ""},
		{"host network, by service", list(pod("ns", "a", "10.0.0.9", hostNetwork), pod("ns", "b", "10.0.0.9", hostNetwork, in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "HBONE 10.0.0.9:15008 10.0.0.9:8080 b ns/s.ns", nil, ""},
		{"host network, by address", list(pod("ns", "a", "10.0.0.9", hostNetwork)), "10.0.0.9:80", "PASSTHROUGH 10.0.0.9:80", nil, ""},
		{"passthrough service", list(server, svc("ns", "s", at80("10.1.0.0/24"), balanced(passthrough))), "10.1.0.1:99", "PASSTHROUGH 10.1.0.1:99", nil, ""},
		{"prefix that holds the endpoint's address", list(server, svc("ns", "s", at80("10.0.0.0/24"))), "10.0.0.2:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 server ns/s.ns", nil, ""},

		{"family of the request, 4", list(dual, svc("ns", "s", at80("10.1.0.1", "fd01::1"))), "10.1.0.1:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 dual ns/s.ns", nil, ""},
		{"family of the request, 6", list(dual, svc("ns", "s", at80("10.1.0.1", "fd01::1"), families(workloadapi.IPFamilies_DUAL))), "[fd01::1]:80", "HBONE [fd00::2]:15008 [fd00::2]:8080 dual ns/s.ns", nil, ""},
		{"IPv6 only", list(dual, svc("ns", "s", at80("10.1.0.1"), families(workloadapi.IPFamilies_IPV6_ONLY))), "10.1.0.1:80", "HBONE [fd00::2]:15008 [fd00::2]:8080 dual ns/s.ns", nil, ""},
		{"IPv4 only", list(dual, svc("ns", "s", at80("fd01::1"), families(workloadapi.IPFamilies_IPV4_ONLY))), "[fd01::1]:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 dual ns/s.ns", nil, ""},
		{"no address of an allowed family", list(server, svc("ns", "s", at80("10.1.0.1"), families(workloadapi.IPFamilies_IPV6_ONLY))), "10.1.0.1:80", "", ErrNoDestination, ""},

		{"workload waypoint", list(pod("ns", "w", "10.0.0.2", viaWaypoint(byHost("ns", "wp.ns")))), "10.0.0.2:80", "", ErrUnsupported, "waypoint ns/wp.ns is not supported yet"},
		{"workload waypoint by address", list(pod("ns", "w", "10.0.0.2", viaWaypoint(byAddr("", "10.5.5.5")))), "10.0.0.2:80", "", ErrUnsupported, "waypoint /10.5.5.5 is not supported yet"},
		{"service traffic skips the workload's waypoint", list(pod("ns", "w", "10.0.0.2", viaWaypoint(byHost("ns", "wp.ns")), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 w ns/s.ns", nil, ""},
		{"own waypoint by host name", list(source(in("ns/wp.ns", 15008, 15008)), svc("ns", "wp"), pod("ns", "w", "10.0.0.2", viaWaypoint(byHost("ns", "wp.ns")))), "10.0.0.2:80", "HBONE 10.0.0.2:15008 10.0.0.2:80 w", nil, ""},
		{"own waypoint by service address", list(source(in("ns/wp.ns", 15008, 15008)), svc("ns", "wp", at80("10.5.5.5")), pod("ns", "w", "10.0.0.2", viaWaypoint(byAddr("", "10.5.5.5")))), "10.0.0.2:80", "HBONE 10.0.0.2:15008 10.0.0.2:80 w", nil, ""},
		{"own waypoint by workload address", list(pod("ns", "w", "10.0.0.2", viaWaypoint(byAddr("", "127.0.0.1")))), "10.0.0.2:80", "HBONE 10.0.0.2:15008 10.0.0.2:80 w", nil, ""},
		{"waypoint of the source does not matter", list(source(viaWaypoint(byHost("ns", "wp.ns"))), pod("ns", "w", "10.0.0.2")), "10.0.0.2:80", "HBONE 10.0.0.2:15008 10.0.0.2:80 w", nil, ""},
		{"service waypoint", list(server, svc("ns", "s", at80("10.1.0.1"), waypointOf(byHost("ns", "wp.ns")))), "10.1.0.1:80", "", ErrUnsupported, "waypoint ns/wp.ns is not supported yet"},
		{"service waypoint, passthrough", list(svc("ns", "s", at80("10.1.0.1"), balanced(passthrough), waypointOf(byHost("ns", "wp.ns")))), "10.1.0.1:80", "", ErrUnsupported, "waypoint ns/wp.ns"},
		{"service waypoint where a workload has the same address", list(pod("ns", "w", "10.1.0.1"), svc("ns", "s", at80("10.1.0.1"), waypointOf(byHost("ns", "wp.ns")))), "10.1.0.1:80", "", ErrUnsupported, "waypoint ns/wp.ns"},
		{"weighted waypoints", list(server, svc("ns", "s", at80("10.1.0.1"), weighted(0, 1))), "10.1.0.1:80", "", ErrUnsupported, "waypoint ns/weighted.ns"},
		{"weighted waypoints of no weight", list(server, svc("ns", "s", at80("10.1.0.1"), weighted(0, 0))), "10.1.0.1:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 server ns/s.ns", nil, ""},

		{"remote endpoint without gateway", list(pod("ns", "w", "10.0.0.2", network("remote"), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "", ErrNoDestination, ""},
		{"remote endpoint with gateway", list(pod("ns", "w", "", network("remote"), viaGateway(byAddr("remote", "10.22.1.1")), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "", ErrUnsupported, "network gateway remote/10.22.1.1 is not supported yet"},
		{"local before remote", list(server, pod("ns", "w", "", network("remote"), viaGateway(byAddr("remote", "10.22.1.1")), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"), balanced(failover, byNetwork))), "10.1.0.1:80", "HBONE 10.0.0.2:15008 10.0.0.2:8080 server ns/s.ns", nil, ""},
		{"local unhealthy, remote", list(pod("ns", "server", "10.0.0.2", unhealthy, in("ns/s.ns", 80, 8080)), pod("ns", "w", "", network("remote"), viaGateway(byHost("ns", "gw.ns")), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"), balanced(failover, byNetwork))), "10.1.0.1:80", "", ErrUnsupported, "network gateway ns/gw.ns"},
		{"no address in the same network", list(pod("ns", "w", "", viaGateway(byHost("ns", "gw.ns")), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "", ErrNoHealthyUpstream, ""},
		{"host name only", list(pod("ns", "w", "", hostname("example.com"), in("ns/s.ns", 80, 8080)), svc("ns", "s", at80("10.1.0.1"))), "10.1.0.1:80", "", ErrUnsupported, "workload host name example.com is not supported yet"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, Config{})
			w.put(source())
			w.put(tt.world...)
			s := w.Snapshot()
			route, err := s.Resolve(s.Local("src", "ns", "src"), netip.MustParseAddrPort(tt.dst))
			if !errors.Is(err, tt.err) || (err != nil) != (tt.err != nil) {
				t.Fatalf("Resolve(%s) = %v, want %v", tt.dst, err, tt.err)
			}
			if err != nil {
				if !strings.Contains(err.Error(), tt.text) || !strings.HasPrefix(err.Error(), "mesh: resolve "+tt.dst) {
					t.Errorf("error %q, want it to name %q", err, tt.text)
				}
				return
			}
			if got := describe(route); got != tt.want {
				t.Errorf("Resolve(%s) = %s, want %s", tt.dst, got, tt.want)
			}
		})
	}
}

func list(m ...proto.Message) []proto.Message { return m }

func describe(r Route) string {
	parts := []string{r.Kind.String(), r.Dial.String(), r.Authority}
	if r.Authority != "" && r.Authority != r.Target.String() || r.Authority == "" && r.Target != r.Dial {
		parts = append(parts, "and target "+r.Target.String())
	}
	if r.Peer != nil {
		parts = append(parts, r.Peer.Name)
	}
	if r.Service != nil {
		parts = append(parts, r.Service.String())
	}
	return strings.Join(strings.Fields(strings.Join(parts, " ")), " ")
}

func TestRouteIdentities(t *testing.T) {
	w := newWorld(t, Config{})
	s := svc("ns", "s", at80("10.1.0.1"))
	s.SubjectAltNames = []string{"spiffe://td/ns/a/sa/b", "example.com"}
	server := pod("ns", "server", "10.0.0.2", in("ns/s.ns", 80, 8080))
	server.TrustDomain = "other"
	w.put(source(), server, s)
	snap := w.Snapshot()
	src := snap.Local("src", "ns", "src")
	for dst, want := range map[string]string{
		"10.0.0.2:80": "spiffe://other/ns/ns/sa/server",
		"10.1.0.1:80": "spiffe://td/ns/a/sa/b spiffe://other/ns/ns/sa/server",
	} {
		route, err := snap.Resolve(src, netip.MustParseAddrPort(dst))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, id := range route.Identities {
			got = append(got, id.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("Resolve(%s): identities %v, want %s", dst, got, want)
		}
	}
}
