package mesh

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

func toJSON(t *testing.T, v any) any {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var out any
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// testdata/config_dump.json is what stock ztunnel printed for this world.
func TestDumpIsZtunnels(t *testing.T) {
	w := newWorld(t, Config{LocalNode: "na"})
	golden := func(name, ip string, o ...workloadOption) *pbWorkload {
		return pod("default", name, ip, append([]workloadOption{uid("cluster1//v1/Pod/default/" + name)}, o...)...)
	}
	app := func(canonical, revision, name string) workloadOption {
		return func(w *pbWorkload) { w.CanonicalName, w.CanonicalRevision, w.WorkloadName = canonical, revision, name }
	}
	w.put(
		golden("pa", "10.0.0.1", on("na"), locality("r1", "z1", "s1"), app("client", "v1", "client")),
		golden("pb", "10.0.0.2", on("na"), app("server", "v2", "server"), named("default/deny-9999"),
			in("default/server.default.svc.cluster.local", 80, 8080, 443, 8443)),
		golden("pc", "10.0.0.3", on("nb"), plain, unhealthy),
		svc("default", "server", host("server.default.svc.cluster.local"), at80("10.96.0.10"), canonicalService,
			servicePorts(80, 8080, 443, 8443), balanced(failover, scopeZone)),
	)
	w.policies(&securityapi.Authorization{
		Name: "allow-all", Namespace: "istio-system",
		Rules: oneMatch(&securityapi.Match{
			NotSourceIps: []*securityapi.Address{{Address: []byte{192, 0, 2, 0}, Length: 24}},
			Namespaces:   []*securityapi.StringMatch{{MatchType: &securityapi.StringMatch_Prefix{Prefix: "def"}}},
		}),
	}, &securityapi.Authorization{
		Name: "deny-9999", Namespace: "default", Scope: selected, Action: securityapi.Action_DENY,
		Rules: oneMatch(&securityapi.Match{
			DestinationPorts: []uint32{9999},
			Principals:       []*securityapi.StringMatch{{MatchType: &securityapi.StringMatch_Exact{Exact: "cluster.local/ns/default/sa/pa"}}},
		}),
	})
	b, err := os.ReadFile("testdata/config_dump.json")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]any
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	got := toJSON(t, w.Snapshot().Dump()).(map[string]any)
	// The golden world came from a local file: there a workload does not list
	// its services, and what the file leaves out is not filled in.
	workloads := got["workloads"].([]any)
	if services := workloads[1].(map[string]any)["services"]; cmp.Diff([]any{"default/server.default.svc.cluster.local"}, services) != "" {
		t.Errorf("services of pb = %v", services)
	}
	delete(workloads[1].(map[string]any), "services")
	for _, elided := range []struct {
		workload      int
		key, want, is string
	}{
		{1, "workloadType", "deployment", ""},
		{2, "workloadType", "deployment", ""},
		{2, "trustDomain", "cluster.local", ""},
		{2, "clusterId", "Kubernetes", "\"\""},
	} {
		m := workloads[elided.workload].(map[string]any)
		if m[elided.key] != elided.want {
			t.Errorf("workload %d: %s = %v, want %s", elided.workload, elided.key, m[elided.key], elided.want)
		}
		delete(m, elided.key)
		if elided.is != "" {
			m[elided.key] = ""
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-ztunnel +ztun\n%s", diff)
	}
}

func oneMatch(m *securityapi.Match) []*securityapi.Rule {
	return []*securityapi.Rule{{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{m}}}}}
}

func TestDumpOfEveryField(t *testing.T) {
	w := newWorld(t, Config{})
	s := svc("ns", "s", at80("10.1.0.1", "10.2.0.0/16"), namespaceOnly, servicePorts(80, 0), balanced(strict, scopeRegion, scopeSub, scopeNode, scopeClust, scopeNet), allowAll)
	s.Waypoint = byAddr("net", "10.9.9.9")
	s.WeightedWaypoints = []*workloadapi.WeightedWaypoint{{Destination: byHost("ns", "wp"), Weight: 3}}
	s.IpFamilies = workloadapi.IPFamilies_DUAL
	s.SubjectAltNames = []string{"spiffe://a/ns/b/sa/c", "dns"}
	p := pod("ns", "p", "10.0.0.1,fd00::1", uid("u"), hostNetwork, network("net"), hostname("h"), capacity(7), unhealthy, viaWaypoint(byHost("ns", "wp")), viaGateway(byAddr("far", "fd00::9")), in("ns/later", 1, 2))
	p.NativeTunnel = true
	p.ApplicationTunnel = &workloadapi.ApplicationTunnel{Protocol: workloadapi.ApplicationTunnel_PROXY, Port: 15088}
	p.WorkloadType = workloadapi.WorkloadType_CRONJOB
	bare := &pbWorkload{Uid: "v", ApplicationTunnel: &workloadapi.ApplicationTunnel{}}
	w.put(s, p, bare)
	const want = `{"policies": [], "stagedServices": {"ns/later": {"u": {"workloadUid": "u", "status": "Unhealthy", "port": {"1": 2}}}},
	"services": [{
		"name": "s", "namespace": "ns", "hostname": "s.ns", "vips": ["/10.1.0.1"], "cidrVips": [{"network": "", "cidr": "10.2.0.0/16"}],
		"ports": {"80": 0}, "endpoints": {}, "subjectAltNames": ["spiffe://a/ns/b/sa/c", "dns"],
		"waypoint": {"destination": "net/10.9.9.9", "hboneMtlsPort": 15008},
		"weightedWaypoints": [{"destination": {"destination": "ns/wp", "hboneMtlsPort": 15008}, "weight": 3}],
		"loadBalancer": {"routingPreferences": ["Region", "Subzone", "Node", "Cluster", "Network"], "mode": "Strict", "healthPolicy": "AllowAll"},
		"ipFamilies": "Dual", "canonical": false, "visibility": "Namespace"}],
	"workloads": [{
		"workloadIps": ["10.0.0.1", "fd00::1"], "waypoint": {"destination": "ns/wp", "hboneMtlsPort": 15008},
		"networkGateway": {"destination": "far/fd00::9", "hboneMtlsPort": 15008}, "protocol": "HBONE", "networkMode": "HostNetwork",
		"uid": "u", "name": "p", "namespace": "ns", "trustDomain": "cluster.local", "serviceAccount": "p", "network": "net",
		"workloadType": "cronjob", "hostname": "h", "nativeTunnel": true, "applicationTunnel": {"protocol": "PROXY", "port": 15088},
		"status": "Unhealthy", "clusterId": "Kubernetes", "services": ["ns/later"], "capacity": 7
	}, {
		"workloadIps": [], "protocol": "TCP", "networkMode": "Standard", "uid": "v", "name": "", "namespace": "", "trustDomain": "cluster.local",
		"serviceAccount": "default", "workloadType": "deployment", "applicationTunnel": {"protocol": "NONE", "port": null},
		"status": "Healthy", "clusterId": "Kubernetes", "capacity": 1
	}]}`
	if diff := cmp.Diff(toJSON(t, json.RawMessage(want)), toJSON(t, w.Snapshot().Dump())); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}
