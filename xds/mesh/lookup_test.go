package mesh

import (
	"testing"

	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/workloadapi"
)

func TestWorkloadByIP(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(
		pod("ns", "entry", "10.0.0.1", uid("cluster1/networking.istio.io/WorkloadEntry/ns/e"), plain),
		pod("ns", "entry-hbone", "10.0.0.1", uid("cluster1/networking.istio.io/WorkloadEntry/ns/f")),
		pod("ns", "pod-plain", "10.0.0.1", plain),
		pod("ns", "pod-hbone", "10.0.0.1,10.0.0.2"),
		pod("ns", "node-1", "10.0.0.9", hostNetwork),
		pod("ns", "six", "fd00::6"),
		pod("ns", "remote", "10.0.0.1", network("remote"), plain),
	)
	find := func(network, ip string) string {
		if found := w.Snapshot().WorkloadByIP(network, addrOf(ip)); found != nil {
			return found.Name
		}
		return ""
	}
	for _, tt := range []struct{ network, ip, want string }{
		{"", "10.0.0.1", "pod-hbone"},
		{"", "::ffff:10.0.0.1", "pod-hbone"},
		{"", "10.0.0.2", "pod-hbone"},
		{"", "10.0.0.3", ""},
		{"", "10.0.0.9", ""}, // Host network.
		{"", "fd00::6", "six"},
		{"remote", "10.0.0.1", "remote"},
		{"other", "10.0.0.1", ""},
	} {
		if got := find(tt.network, tt.ip); got != tt.want {
			t.Errorf("WorkloadByIP(%q, %s) = %q, want %q", tt.network, tt.ip, got, tt.want)
		}
	}
	for _, step := range []struct{ remove, want string }{
		{"cluster1//Pod/ns/pod-hbone", "pod-plain"},
		{"cluster1//Pod/ns/pod-plain", "entry-hbone"},
		{"cluster1/networking.istio.io/WorkloadEntry/ns/f", "entry"},
		{"cluster1/networking.istio.io/WorkloadEntry/ns/e", ""},
	} {
		w.remove(step.remove)
		if got := find("", "10.0.0.1"); got != step.want {
			t.Errorf("without %s: %q, want %q", step.remove, got, step.want)
		}
	}
	if got := find("", "10.0.0.2"); got != "" {
		t.Errorf("second address of a removed workload still finds %q", got)
	}
	w.put(pod("ns", "x", "10.1.0.1"), pod("ns", "y", "10.1.0.1"))
	if got := find("", "10.1.0.1"); got != "y" {
		t.Errorf("equal ranks: %q, want the last", got)
	}
	w.put(pod("ns", "y", "10.1.0.2"))
	if got := find("", "10.1.0.1") + find("", "10.1.0.2"); got != "xy" {
		t.Errorf("after y moved: %q, want xy", got)
	}
}

func TestLocal(t *testing.T) {
	w := newWorld(t, Config{LocalNode: "na"})
	w.put(pod("ns", "a", "10.0.0.1", on("na")), pod("ns", "b", "10.0.0.2", on("nb")), pod("ns", "c", "10.0.0.3", on("na"), plain))
	s := w.Snapshot()
	for _, tt := range []struct {
		name, ns, sa string
		found        bool
	}{
		{"a", "ns", "a", true}, {"c", "ns", "c", true}, {"b", "ns", "b", false},
		{"a", "other", "a", false}, {"a", "ns", "other", false}, {"x", "ns", "a", false},
	} {
		if got := s.Local(tt.name, tt.ns, tt.sa); (got != nil) != tt.found {
			t.Errorf("Local(%s, %s, %s) = %v, want found %v", tt.name, tt.ns, tt.sa, got, tt.found)
		}
	}
	if ids := s.LocalIdentities(); len(ids) != 1 || ids[0].String() != "spiffe://cluster.local/ns/ns/sa/a" {
		t.Errorf("LocalIdentities = %v, want that of a", ids)
	}
	twin := pod("ns", "a2", "10.0.0.4", on("na"))
	twin.ServiceAccount = "a"
	w.put(twin)
	w.remove("cluster1//Pod/ns/a")
	if n := len(w.Snapshot().LocalIdentities()); n != 1 {
		t.Errorf("%d identities although one workload still has it", n)
	}
	w.remove("cluster1//Pod/ns/a2")
	if n := len(w.Snapshot().LocalIdentities()); n != 0 {
		t.Errorf("%d identities, want none", n)
	}
	everywhere := newWorld(t, Config{})
	everywhere.put(pod("ns", "b", "10.0.0.2", on("nb")))
	if everywhere.Snapshot().Local("b", "ns", "b") == nil {
		t.Error("without a node name every workload is local")
	}
}

func TestServiceByVIP(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(
		svc("a", "one", at80("10.1.0.1")),
		svc("b", "one", at80("10.1.0.1")),
		svc("k", "canon", at80("10.1.0.2")),
		svc("l", "canon", at80("10.1.0.2"), canonicalService),
		svc("a", "hidden", at80("10.1.0.3"), namespaceOnly),
		svc("b", "open", at80("10.1.0.0/24")),
		svc("a", "wide", at80("10.1.0.0/16")),
		svc("c", "narrow", at80("10.1.9.0/28", "fd00:1::/64")),
		svc("d", "narrow", at80("10.1.9.0/28"), canonicalService),
		svc("e", "hidden", at80("10.1.9.0/30"), namespaceOnly),
		svc("f", "six", at80("fd00:2::1")),
		svc("g", "mapped", at80("::ffff:10.7.0.1", "::ffff:10.8.0.0/112")),
	)
	other := svc("r", "remote")
	other.Addresses = append(other.Addresses, vip("remote", "10.1.0.1"), vip("remote", "10.9.0.0/16"))
	w.put(other)
	for _, tt := range []struct{ why, network, ip, client, want string }{
		{"client's own namespace", "", "10.1.0.1", "b", "b/one.b"},
		{"client's own namespace, the other", "", "10.1.0.1", "a", "a/one.a"},
		{"third client: the first", "", "10.1.0.1", "z", "a/one.a"},
		{"canonical", "", "10.1.0.2", "z", "l/canon.l"},
		{"own before canonical", "", "10.1.0.2", "k", "k/canon.k"},
		{"hidden, own namespace", "", "10.1.0.3", "a", "a/hidden.a"},
		{"hidden exact falls to the prefix", "", "10.1.0.3", "z", "b/open.b"},
		{"no client namespace sees all", "", "10.1.0.3", "", "a/hidden.a"},
		{"prefix, longest", "", "10.1.0.77", "z", "b/open.b"},
		{"own wide prefix beats foreign narrow one", "", "10.1.0.77", "a", "a/wide.a"},
		{"prefix, canonical among equals", "", "10.1.9.8", "z", "d/narrow.d"},
		{"prefix, own among equals", "", "10.1.9.8", "c", "c/narrow.c"},
		{"hidden prefix", "", "10.1.9.1", "z", "d/narrow.d"},
		{"hidden prefix, own", "", "10.1.9.1", "e", "e/hidden.e"},
		{"IPv6 exact", "", "fd00:2::1", "z", "f/six.f"},
		{"IPv6 prefix", "", "fd00:1::9", "z", "c/narrow.c"},
		{"IPv4-mapped VIP", "", "10.7.0.1", "z", "g/mapped.g"},
		{"IPv4-mapped prefix", "", "10.8.1.1", "z", "g/mapped.g"},
		{"IPv4-mapped question", "", "::ffff:10.1.0.1", "b", "b/one.b"},
		{"other network, exact", "remote", "10.1.0.1", "z", "r/remote.r"},
		{"other network, prefix", "remote", "10.9.1.1", "z", "r/remote.r"},
		{"prefix of another network", "", "10.9.1.1", "z", ""},
		{"unknown", "", "172.16.0.1", "z", ""},
	} {
		got := ""
		if s := w.Snapshot().ServiceByVIP(tt.network, addrOf(tt.ip), tt.client); s != nil {
			got = s.String()
		}
		if got != tt.want {
			t.Errorf("%s: ServiceByVIP(%q, %s, %s) = %q, want %q", tt.why, tt.network, tt.ip, tt.client, got, tt.want)
		}
	}
}

func TestServiceIndexesFollowUpdates(t *testing.T) {
	w := newWorld(t, Config{})
	find := func(ip string) string {
		if s := w.Snapshot().ServiceByVIP("", addrOf(ip), ""); s != nil {
			return s.String()
		}
		return ""
	}
	w.put(svc("a", "s", at80("10.1.0.1", "10.2.0.0/16")), svc("b", "s", at80("10.1.0.1")))
	w.put(svc("a", "s", at80("10.1.0.1", "10.1.0.2", "10.3.0.0/16")))
	for ip, want := range map[string]string{"10.1.0.1": "a/s.a", "10.1.0.2": "a/s.a", "10.2.0.1": "", "10.3.0.1": "a/s.a"} {
		if got := find(ip); got != want {
			t.Errorf("after an update: %s = %q, want %q", ip, got, want)
		}
	}
	w.remove("a/s.a", "a/unknown", "nonsense")
	for ip, want := range map[string]string{"10.1.0.1": "b/s.b", "10.1.0.2": "", "10.3.0.1": ""} {
		if got := find(ip); got != want {
			t.Errorf("after a removal: %s = %q, want %q", ip, got, want)
		}
	}
	w.remove("b/s.b")
	s := w.Snapshot()
	if n := s.services.len() + s.byHost.len() + s.byVIP.len() + s.byCIDR.len(); n != 0 {
		t.Errorf("%d entries are left in the indexes", n)
	}
}

func TestServiceByHostname(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(
		svc("a", "x", host("x.test")), svc("b", "x", host("x.test")), svc("c", "x", host("x.test"), namespaceOnly),
		svc("d", "y", host("y.test")), svc("e", "y", host("y.test"), canonicalService),
	)
	for _, tt := range []struct{ host, client, preferred, want string }{
		{"x.test", "b", "", "b"}, {"x.test", "z", "", "a"}, {"x.test", "z", "b", "b"}, {"x.test", "c", "b", "c"}, {"x.test", "z", "c", "a"},
		{"y.test", "z", "d", "e"}, {"y.test", "d", "", "d"}, {"z.test", "z", "", ""},
	} {
		got := ""
		if s := w.Snapshot().ServiceByHostname(tt.host, tt.client, tt.preferred); s != nil {
			got = s.Namespace
		}
		if got != tt.want {
			t.Errorf("ServiceByHostname(%s, %s, %s) in %q, want %q", tt.host, tt.client, tt.preferred, got, tt.want)
		}
	}
	if s := w.Snapshot().Service("b", "x.test"); s == nil || s.Name != "x" {
		t.Errorf("Service(b, x.test) = %v", s)
	}
}

func TestEndpointsFollowWorkloadsAndHealth(t *testing.T) {
	w := newWorld(t, Config{})
	want := func(why, want string) {
		t.Helper()
		got := "no service"
		if s := w.Snapshot().Service("ns", "s.ns"); s != nil {
			got = names(w.Snapshot().Endpoints(s))
		}
		if got != want {
			t.Errorf("%s: endpoints %s, want %s", why, got, want)
		}
	}
	staged := func() int { return len(w.Snapshot().Dump().StagedServices) }
	w.put(pod("ns", "a", "10.0.0.1", in("ns/s.ns", 80, 8080)), pod("ns", "b", "10.0.0.2", in("ns/s.ns", 80, 8080), unhealthy))
	want("endpoints first", "no service")
	if staged() != 1 {
		t.Error("endpoints of an unknown service are not staged")
	}
	w.put(svc("ns", "s"))
	want("then the service", "[a]")
	if staged() != 0 {
		t.Error("still staged")
	}
	w.put(svc("ns", "s", allowAll))
	want("allow all", "[a b]")
	w.put(svc("ns", "s"))
	want("only healthy again", "[a]")
	w.put(svc("ns", "s", allowAll))
	want("allow all brings them back", "[a b]")
	w.put(svc("ns", "s"), pod("ns", "a", "10.0.0.1", in("ns/s.ns", 80, 8080), unhealthy))
	want("sent again as unhealthy", "[]")
	w.put(pod("ns", "a", "10.0.0.1", in("ns/s.ns", 80, 8080)), pod("ns", "b", "10.0.0.2", in("ns/other.ns")))
	want("b left", "[a]")
	w.remove("ns/s.ns")
	w.put(svc("ns", "s"))
	want("the service comes back", "[a]")
	w.remove("cluster1//Pod/ns/a", "cluster1//Pod/ns/b", "ns/s.ns")
	s := w.Snapshot()
	if n := s.members.len() + s.workloads.len() + s.byIP.len() + s.local.len() + s.ids.len(); n != 0 {
		t.Errorf("%d entries are left in the indexes", n)
	}
}

func TestServicesOf(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(svc("ns", "s"), svc("ns", "t"), pod("ns", "a", "10.0.0.1", in("ns/s.ns"), in("ns/t.ns"), in("ns/unknown")))
	s := w.Snapshot()
	var got []string
	for _, svc := range s.ServicesOf(s.Workload("cluster1//Pod/ns/a")) {
		got = append(got, svc.Name)
	}
	if len(got) != 2 || got[0] != "s" || got[1] != "t" {
		t.Errorf("ServicesOf = %v, want s and t", got)
	}
}

func TestUpdatesThenRemovals(t *testing.T) {
	w := newWorld(t, Config{})
	a := encode(t, pod("ns", "a", "10.0.0.1"))
	w.Addresses().Apply([]xds.Resource{a}, []string{a.Name})
	if w.Snapshot().Workload(a.Name) != nil {
		t.Error("a name that is both updated and removed must be gone")
	}
}

func TestTargetPort(t *testing.T) {
	w := newWorld(t, Config{})
	tunnel := func(port uint32) workloadOption {
		return func(w *pbWorkload) { w.ApplicationTunnel = &workloadapi.ApplicationTunnel{Port: port} }
	}
	w.put(svc("ns", "s", servicePorts(80, 8080, 81, 0)),
		pod("ns", "own", "10.0.0.1", in("ns/s.ns", 80, 9090, 81, 9191, 82, 0)),
		pod("ns", "none", "10.0.0.2", in("ns/s.ns")),
		pod("ns", "tunnel", "10.0.0.3", in("ns/s.ns"), tunnel(15088)),
		pod("ns", "tunnel-0", "10.0.0.4", in("ns/s.ns"), tunnel(0)),
	)
	for _, tt := range []struct {
		pod        string
		port, want uint16
	}{
		{"own", 80, 9090}, {"own", 81, 9191}, {"own", 82, 0},
		{"none", 80, 8080}, {"none", 81, 0},
		{"tunnel", 80, 8080}, {"tunnel", 81, 81}, {"tunnel", 99, 99},
		{"tunnel-0", 81, 0},
	} {
		s := w.Snapshot()
		got, ok := s.Service("ns", "s.ns").TargetPort(s.Workload("cluster1//Pod/ns/"+tt.pod), tt.port)
		if got != tt.want || ok != (tt.want != 0) {
			t.Errorf("TargetPort(%s, %d) = %d, %v, want %d", tt.pod, tt.port, got, ok, tt.want)
		}
	}
}
