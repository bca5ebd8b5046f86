package mesh

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/xds/workloadapi"
)

const (
	strict      = workloadapi.LoadBalancing_STRICT
	failover    = workloadapi.LoadBalancing_FAILOVER
	standard    = workloadapi.LoadBalancing_UNSPECIFIED_MODE
	scopeRegion = workloadapi.LoadBalancing_REGION
	scopeZone   = workloadapi.LoadBalancing_ZONE
	scopeSub    = workloadapi.LoadBalancing_SUBZONE
	scopeNode   = workloadapi.LoadBalancing_NODE
	scopeClust  = workloadapi.LoadBalancing_CLUSTER
	scopeNet    = workloadapi.LoadBalancing_NETWORK
)

// chosen draws often and returns which endpoints of the service were chosen.
func chosen(t *testing.T, items ...proto.Message) string {
	t.Helper()
	w := newWorld(t, Config{Rand: inTurn()})
	w.put(items...)
	s := w.Snapshot()
	src, service := s.Local("src", "ns", "src"), s.ServiceByVIP("", addrOf("10.1.0.1"), "ns")
	if src == nil || service == nil {
		t.Fatal("the world lacks source or service")
	}
	got := make(map[string]bool)
	for range 100 {
		if peer := s.choose(src, service, 80); peer != nil {
			got[peer.Name] = true
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(got)), " ")
}

func TestChooseByPreference(t *testing.T) {
	src := source(locality("r", "z", "s"), on("n"))
	at := func(name, net, region, zone string, options ...workloadOption) *pbWorkload {
		options = append(options, network(net), locality(region, zone, ""), in("ns/s.ns", 80, 8080))
		return pod("ns", name, "10.0.0.2", options...)
	}
	tests := []struct {
		name string
		mode workloadapi.LoadBalancing_Mode
		pref []workloadapi.LoadBalancing_Scope
		pods []proto.Message
		want string
	}{
		{"strict, none", strict, scopes(scopeNode), list(at("a", "", "r", "z")), ""},
		{"strict, one", strict, scopes(scopeNode), list(at("a", "", "r", "z"), at("b", "", "x", "x", on("n"))), "b"},
		{"strict, all of them", strict, scopes(scopeRegion, scopeZone), list(at("a", "", "r", "y"), at("b", "", "r", "z")), "b"},
		{"strict, network first", strict, scopes(scopeNet, scopeRegion), list(at("a", "far", "r", "z"), at("b", "", "x", "z"), at("c", "", "r", "y")), "c"},
		{"failover, network+region+zone", failover, scopes(scopeNet, scopeRegion, scopeZone), list(at("a", "", "r", "y"), at("b", "", "r", "z"), at("c", "far", "r", "z")), "b"},
		{"failover, network+region", failover, scopes(scopeNet, scopeRegion, scopeZone), list(at("a", "", "r", "y"), at("b", "", "x", "z"), at("c", "far", "r", "z")), "a"},
		{"failover, network only", failover, scopes(scopeNet, scopeRegion, scopeZone), list(at("b", "", "x", "z"), at("c", "far", "r", "z")), "b"},
		{"failover, region+zone without network", failover, scopes(scopeNet, scopeRegion, scopeZone), list(at("c", "far", "r", "z"), at("d", "far", "r", "y"), at("e", "far", "x", "z")), "c"},
		{"failover, none", failover, scopes(scopeNet, scopeRegion, scopeZone), list(at("e", "far", "x", "z"), at("f", "far", "x", "x")), "e f"},
		{"failover, network not first stops the walk", failover, scopes(scopeRegion, scopeNet, scopeZone), list(at("a", "far", "r", "z"), at("b", "far", "r", "y")), "a b"},
		{"failover, a mismatch stops the walk", failover, scopes(scopeRegion, scopeZone), list(at("a", "", "x", "z"), at("b", "", "y", "y")), "a b"},
		{"failover, cluster", failover, scopes(scopeClust), list(at("a", "", "x", "x"), at("b", "", "x", "x", func(w *pbWorkload) { w.ClusterId = "other" })), "a"},
		{"failover, subzone alone", failover, scopes(scopeSub), list(at("a", "", "r", "z"), pod("ns", "b", "10.0.0.3", locality("", "", "s"), in("ns/s.ns", 80, 8080))), "b"},
		{"failover, the best is unhealthy", failover, scopes(scopeZone), list(at("a", "", "r", "z", unhealthy), at("b", "", "r", "y")), "b"},
		{"standard ignores preferences", standard, scopes(scopeZone), list(at("a", "", "r", "z"), at("b", "", "r", "y")), "a b"},
		{"no address in the same network", failover, nil, list(pod("ns", "a", "", viaGateway(byHost("ns", "gw")), in("ns/s.ns", 80, 1)), at("b", "", "r", "z")), "b"},
		{"no address in another network", failover, nil, list(pod("ns", "a", "", network("far"), viaGateway(byHost("ns", "gw")), in("ns/s.ns", 80, 1))), "a"},
		{"no address in another network, no gateway", failover, nil, list(pod("ns", "a", "", network("far"), in("ns/s.ns", 80, 1))), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			items := append(list(src, svc("ns", "s", at80("10.1.0.1"), balanced(tt.mode, tt.pref...))), tt.pods...)
			if got := chosen(t, items...); got != tt.want {
				t.Errorf("chosen %q, want %q", got, tt.want)
			}
		})
	}
}

func scopes(s ...workloadapi.LoadBalancing_Scope) []workloadapi.LoadBalancing_Scope { return s }

func TestChooseByCapacity(t *testing.T) {
	w := newWorld(t, Config{Rand: inTurn()})
	w.put(source(), svc("ns", "s", at80("10.1.0.1")),
		pod("ns", "a", "10.0.0.2", in("ns/s.ns", 80, 1), capacity(3)),
		pod("ns", "b", "10.0.0.3", in("ns/s.ns", 80, 1)),
		pod("ns", "c", "10.0.0.4", in("ns/s.ns", 80, 1), capacity(0)),
		pod("ns", "d", "10.0.0.5", in("ns/s.ns", 80, 1), capacity(0)),
		pod("ns", "e", "10.0.0.6", in("ns/s.ns", 80, 1), capacity(4)),
	)
	s := w.Snapshot()
	src := s.Local("src", "ns", "src")
	got := make(map[string]int)
	for range 80 {
		route, err := s.Resolve(src, netip.MustParseAddrPort("10.1.0.1:80"))
		if err != nil {
			t.Fatal(err)
		}
		got[route.Peer.Name]++
	}
	if want := map[string]int{"a": 30, "b": 10, "e": 40}; !maps.Equal(got, want) {
		t.Errorf("80 draws: %v, want %v", got, want)
	}
}

func TestTablesAreBounded(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(svc("ns", "s", at80("10.1.0.1"), balanced(failover, scopeZone), servicePorts(80, 8080, 81, 0)), pod("ns", "a", "10.0.0.2", in("ns/s.ns", 80, 1, 81, 2)))
	for i := range 3 * maxTables {
		w.put(pod("ns", fmt.Sprint("src", i), "", locality("r", fmt.Sprint("z", i), "")))
	}
	s := w.Snapshot()
	service := s.Service("ns", "s.ns")
	m, _ := s.members.get(service.ServiceKey)
	for i := range 3 * maxTables {
		name := fmt.Sprint("src", i)
		for _, port := range []uint16{80, 81} {
			if s.choose(s.Local(name, "ns", name), service, port) == nil {
				t.Fatal("no endpoint")
			}
		}
	}
	if n := len(*m.tables.Load()); n != maxTables {
		t.Errorf("%d tables are kept, want %d", n, maxTables)
	}
	before := (*m.tables.Load())[0]
	if s.choose(s.Local("src23", "ns", "src23"), service, 81); (*m.tables.Load())[0] != before {
		t.Error("the same question made another table")
	}
}
