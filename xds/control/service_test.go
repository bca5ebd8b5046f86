package control

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/ztun/ztun/xds/workloadapi"
)

const serviceHead = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec:\n  ports: [{port: 80}]\n"

func TestServiceLoadBalancing(t *testing.T) {
	near := "routing_preference: [NETWORK, REGION, ZONE] mode: FAILOVER"
	node := "routing_preference: [NETWORK, REGION, ZONE, SUBZONE, NODE] mode: FAILOVER"
	for _, tc := range []struct{ name, namespace, meta, spec, want string }{
		{"nothing", "", "", "", ""},
		{"local", "", "", "internalTrafficPolicy: Local", "routing_preference: NODE mode: STRICT"},
		{"cluster", "", "", "internalTrafficPolicy: Cluster", ""},
		{"local wins", "", "", "internalTrafficPolicy: Local, trafficDistribution: PreferClose", "routing_preference: NODE mode: STRICT"},
		{"close", "", "", "trafficDistribution: PreferClose", near},
		{"same zone", "", "", "trafficDistribution: PreferSameZone", near},
		{"same node", "", "", "trafficDistribution: PreferSameNode", node},
		{"annotation", "", "annotations: {networking.istio.io/traffic-distribution: PreferClose}", "", near},
		{"spec wins over annotation", "", "annotations: {networking.istio.io/traffic-distribution: PreferClose}", "trafficDistribution: PreferSameNode", node},
		{"namespace", "networking.istio.io/traffic-distribution: PreferSameNode", "", "", node},
		{"annotation wins over namespace", "networking.istio.io/traffic-distribution: PreferSameNode", "annotations: {networking.istio.io/traffic-distribution: PreferClose}", "", near},
		{"not ready addresses", "", "", "publishNotReadyAddresses: true", "health_policy: ALLOW_ALL"},
		{"not ready addresses, close", "", "", "publishNotReadyAddresses: true, trafficDistribution: PreferClose", near + " health_policy: ALLOW_ALL"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := world(t, docs(
				"apiVersion: v1\nkind: Namespace\nmetadata: {name: x, annotations: {"+tc.namespace+"}}",
				"apiVersion: v1\nkind: Service\nmetadata:\n  name: s\n  namespace: x\n  "+tc.meta+"\nspec: {ports: [{port: 80}], "+tc.spec+"}"))
			got := w.service(t, "x", "s").LoadBalancing
			if tc.want == "" {
				if got != nil {
					t.Errorf("%v, want none", got)
				}
				return
			}
			wantProto(t, got, tc.want)
		})
	}
}

// A Service serves the pods of its own namespace that have all its labels,
// however many have one of them.
func TestServiceSelectsByAllLabels(t *testing.T) {
	pod := func(ns, name, labels, ip string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + ", namespace: " + ns + ", labels: {" + labels + "}}\nspec: {nodeName: n}\nstatus: {podIP: " + ip + "}"
	}
	service := func(name, selector string) string {
		return "apiVersion: v1\nkind: Service\nmetadata: {name: " + name + ", namespace: x}\nspec: {ports: [{port: 80}], selector: {" + selector + "}}"
	}
	w := world(t, docs(
		pod("x", "both", "app: a, tier: one", "10.0.0.1"),
		pod("x", "app", "app: a", "10.0.0.2"),
		pod("x", "tier", "tier: one", "10.0.0.3"),
		pod("x", "also", "tier: one, app: a, more: m", "10.0.0.4"),
		pod("x", "swapped", "app: one, tier: a", "10.0.0.5"),
		pod("x", "none", "", "10.0.0.6"),
		pod("y", "elsewhere", "app: a, tier: one", "10.0.0.7"),
		service("two", "app: a, tier: one"), service("one", "app: a"), service("empty", "app: b, tier: one"),
	))
	for service, want := range map[string]string{"two": "both also", "one": "both app also", "empty": ""} {
		var got []string
		for _, p := range []string{"x/both", "x/app", "x/tier", "x/also", "x/swapped", "x/none", "y/elsewhere"} {
			ns, name, _ := strings.Cut(p, "/")
			if _, ok := w.workload(t, ns, name).Services["x/"+service+".x.svc.cluster.local"]; ok {
				got = append(got, name)
			}
		}
		if got := strings.Join(got, " "); got != want {
			t.Errorf("service %s selects %q, want %q", service, got, want)
		}
	}
}

func TestServiceProtocols(t *testing.T) {
	for _, tc := range []struct {
		port string
		want workloadapi.AppProtocol
	}{
		{"name: http", workloadapi.AppProtocol_HTTP11},
		{"name: http-web", workloadapi.AppProtocol_HTTP11},
		{"name: http2-web", workloadapi.AppProtocol_HTTP2},
		{"name: grpc", workloadapi.AppProtocol_GRPC},
		{"name: grpc-web", workloadapi.AppProtocol_UNKNOWN},
		{"name: https-x", workloadapi.AppProtocol_TLS},
		{"name: tls", workloadapi.AppProtocol_TLS},
		{"name: tcp-x", workloadapi.AppProtocol_TCP},
		{"name: web", workloadapi.AppProtocol_UNKNOWN},
		{"name: http, appProtocol: grpc", workloadapi.AppProtocol_GRPC},
		{"name: x, appProtocol: HTTP2", workloadapi.AppProtocol_HTTP2},
		{"name: x, appProtocol: kubernetes.io/h2c", workloadapi.AppProtocol_HTTP2},
		{"name: x, appProtocol: kubernetes.io/ws", workloadapi.AppProtocol_HTTP11},
	} {
		w := world(t, "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 80, "+tc.port+"}]}")
		if got := w.service(t, "default", "s").Ports[0].AppProtocol; got != tc.want {
			t.Errorf("%s: %v, want %v", tc.port, got, tc.want)
		}
	}
	w := world(t, "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 3306}]}")
	if got := w.service(t, "default", "s").Ports[0].AppProtocol; got != workloadapi.AppProtocol_TCP {
		t.Errorf("port 3306: %v", got)
	}
}

func TestServiceFamiliesAndAddresses(t *testing.T) {
	const v4, v6 = 4, 6
	for _, tc := range []struct {
		name, spec string
		families   workloadapi.IPFamilies
		vips       []int
	}{
		{"nothing said", "", workloadapi.IPFamilies_IPV4_ONLY, []int{v4}},
		{"v6", "ipFamilies: [IPv6]", workloadapi.IPFamilies_IPV6_ONLY, []int{v6}},
		{"dual", "ipFamilyPolicy: PreferDualStack", workloadapi.IPFamilies_DUAL, []int{v4, v6}},
		{"dual, v6 first", "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]", workloadapi.IPFamilies_DUAL, []int{v6, v4}},
		{"both families", "ipFamilies: [IPv6, IPv4]", workloadapi.IPFamilies_DUAL, []int{v6, v4}},
		{"given", "clusterIP: 'fd00::5'", workloadapi.IPFamilies_IPV6_ONLY, []int{v6}},
		{"both given", "clusterIP: 10.3.3.3, clusterIPs: [10.3.3.3, 'fd00::5']", workloadapi.IPFamilies_DUAL, []int{v4, v6}},
		{"headless", "clusterIP: None", workloadapi.IPFamilies_AUTOMATIC, nil},
		{"headless of a family", "clusterIP: None, ipFamilies: [IPv4]", workloadapi.IPFamilies_IPV4_ONLY, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := world(t, "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 80}], "+tc.spec+"}").service(t, "default", "s")
			var vips []int
			for _, a := range s.Addresses {
				vips = append(vips, map[int]int{4: v4, 16: v6}[len(a.Address)])
			}
			if s.IpFamilies != tc.families || !cmp.Equal(vips, tc.vips) {
				t.Errorf("%v %v, want %v %v", s.IpFamilies, vips, tc.families, tc.vips)
			}
		})
	}
}

func TestServiceProblems(t *testing.T) {
	pod := "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: b}}\nstatus: {podIP: 10.0.0.1}"
	for _, tc := range []struct{ name, yaml, place, text string }{
		{"no ports", "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {}", "f.yaml:4: spec.ports: ", "at least one port"},
		{"port range", strings.Replace(serviceHead, "80", "65536", 1), "f.yaml:5: spec.ports[0].port: ", "is no port"},
		{"target port range", strings.Replace(serviceHead, "80}", "80, targetPort: -1}", 1), "f.yaml:5: spec.ports[0].targetPort: ", "is no port"},
		{"target port name", strings.Replace(serviceHead, "80}", "80, targetPort: not_a_name}", 1), "f.yaml:5: spec.ports[0].targetPort: ", "is no port name"},
		{"protocol", strings.Replace(serviceHead, "80}", "80, protocol: tcp}", 1), "f.yaml:5: spec.ports[0].protocol: ", "none of TCP"},
		{"nameless", strings.Replace(serviceHead, "80}", "80}, {port: 81}", 1), "f.yaml:5: spec.ports[1]", "a name is needed"},
		{"same name", strings.Replace(serviceHead, "80}", "80, name: a}, {port: 81, name: a}", 1), "f.yaml:5: spec.ports[1].name: ", "another port"},
		{"same port", strings.Replace(serviceHead, "80}", "80, name: a}, {port: 80, name: b}", 1), "f.yaml:5: spec.ports[1].port: ", "80/TCP is there twice"},
		{"cluster IP", serviceHead + "  clusterIP: x", "f.yaml:6: spec.clusterIP: ", "no IP address"},
		{"cluster IPs disagree", serviceHead + "  clusterIP: 10.1.1.1\n  clusterIPs: [10.1.1.2]", "f.yaml:6: spec.clusterIP: ", "must be the first"},
		{"None and another", serviceHead + "  clusterIPs: [None, 10.1.1.2]", "f.yaml:6: spec.clusterIPs: ", "None stands alone"},
		{"a pod's address", docs(pod, serviceHead+"  clusterIP: 10.0.0.1"), "f.yaml:11: spec.clusterIP: ", "is the address of Pod default/p too"},
		{"traffic policy", serviceHead + "  internalTrafficPolicy: Near", "f.yaml:6: spec.internalTrafficPolicy: ", "neither"},
		{"distribution", serviceHead + "  trafficDistribution: Near", "f.yaml:6: spec.trafficDistribution: ", "none of"},
		{"type", serviceHead + "  type: Port", "f.yaml:6: spec.type: ", "no type"},
		{"family", serviceHead + "  ipFamilies: [IPv5]", "f.yaml:6: spec.ipFamilies[0]: ", "no family"},
		{"family policy", serviceHead + "  ipFamilyPolicy: Both", "f.yaml:6: spec.ipFamilyPolicy: ", "none of"},
		{"waypoint", strings.Replace(serviceHead, "{name: s}", "{name: s, labels: {istio.io/use-waypoint: w}}", 1), "f.yaml:3: metadata.labels", "waypoints"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, r := readYAML(tc.yaml)
			if r.Used || !hasProblem(r, tc.place, tc.text) {
				t.Errorf("used: %v; no problem %q ... %q in %q", r.Used, tc.place, tc.text, texts(r))
			}
		})
	}
}

func TestServiceWarnings(t *testing.T) {
	pod := "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: b}}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.1}"
	for _, tc := range []struct{ name, yaml, place, text string }{
		{"no selector", serviceHead, "f.yaml:4: warning: spec: ", "nothing stands behind it"},
		{"selects nothing", serviceHead + "  selector: {a: c}", "f.yaml:6: warning: spec.selector: ", "selects no pod"},
		{"port nobody has", docs(pod, strings.Replace(serviceHead, "80}", "80, targetPort: web}", 1)+"  selector: {a: b}"), "f.yaml:11: warning: spec.ports[0].targetPort: ", "named web"},
		{"other family", docs(pod, serviceHead+"  selector: {a: b}\n  ipFamilies: [IPv6]"), "f.yaml:10: warning: spec: ", "pod p has no address"},
		{"external", "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {type: ExternalName, externalName: x.org}", "f.yaml:4: warning: spec.type: ", "not served"},
		{"annotation", strings.Replace(serviceHead, "{name: s}", "{name: s, annotations: {networking.istio.io/traffic-distribution: Near}}", 1), "f.yaml:3: warning: metadata.annotations", "not known"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, r := readYAML(tc.yaml)
			if err := r.Err(); err != nil {
				t.Error(err)
			}
			if !hasProblem(r, tc.place, tc.text) {
				t.Errorf("no warning %q ... %q in %q", tc.place, tc.text, texts(r))
			}
		})
	}
}

func TestServicesForHostsFiles(t *testing.T) {
	w := world(t, docs(
		"apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: b}}\nstatus: {podIP: 10.0.0.1}",
		"apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.9, ports: [{port: 1}]}",
		"apiVersion: v1\nkind: Service\nmetadata: {name: direct}\nspec: {clusterIP: None, selector: {a: b}, ports: [{port: 1}]}"))
	want := []ServiceAddress{
		{"default", "direct", "direct.default.svc.cluster.local", []netip.Addr{netip.MustParseAddr("10.0.0.1")}, true},
		{"default", "web", "web.default.svc.cluster.local", []netip.Addr{netip.MustParseAddr("10.96.0.9")}, false},
	}
	if diff := cmp.Diff(want, w.Services(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestNamedPortsOfSidecarsCount(t *testing.T) {
	w := world(t, docs(`
apiVersion: v1
kind: Pod
metadata: {name: p, labels: {a: b}}
spec:
  initContainers:
  - {name: i, ports: [{name: gone, containerPort: 1}]}
  - {name: side, restartPolicy: Always, ports: [{name: web, containerPort: 2}]}
  containers: [{name: c, ports: [{name: web, containerPort: 3, protocol: UDP}]}]
status: {podIP: 10.0.0.1}`,
		"apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {selector: {a: b}, ports: [{name: a, port: 1, targetPort: gone}, {name: b, port: 2, targetPort: web}]}"))
	want := map[string]*workloadapi.PortList{"default/s.default.svc.cluster.local": {Ports: []*workloadapi.Port{{ServicePort: 2, TargetPort: 2}}}}
	if diff := cmp.Diff(want, w.workload(t, "default", "p").Services, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestAssignedAddressesAreStable(t *testing.T) {
	r := netip.MustParsePrefix("10.96.0.0/29") // six addresses
	free := func(netip.Addr) bool { return false }
	book := newAddressBook(nil)
	got := make(map[string]netip.Addr)
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		addr, ok := book.take(r, name, free)
		if !ok || !r.Contains(addr) || addr == r.Addr() || addr == netip.MustParseAddr("10.96.0.7") {
			t.Fatalf("%s got %v", name, addr)
		}
		for other, a := range got {
			if a == addr {
				t.Fatalf("%s and %s share %v", name, other, a)
			}
		}
		got[name] = addr
	}
	if addr, ok := book.take(r, "g", free); ok {
		t.Errorf("a seventh address %v", addr)
	}
	// Read again in another order, by another process, with one gone and one new.
	data, err := book.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var again addressBook
	if err := again.UnmarshalJSON(data); err != nil {
		t.Fatal(err)
	}
	next := again.reading()
	for _, name := range []string{"f", "c", "a", "b", "e"} {
		if addr, ok := next.take(r, name, free); !ok || addr != got[name] {
			t.Errorf("%s moved from %v to %v", name, got[name], addr)
		}
	}
	last := next.next().reading()
	if addr, ok := last.take(r, "g", free); !ok || addr != got["d"] {
		t.Errorf("g got %v, the address of d is %v", addr, got["d"])
	}
	if addr, _ := last.take(r, "f", func(a netip.Addr) bool { return a == got["f"] }); addr == got["f"] {
		t.Error("an address that somebody else was given is kept")
	}
}

func TestSmallRangeRunsOut(t *testing.T) {
	var services []string
	for _, n := range "abcdefg" {
		services = append(services, "apiVersion: v1\nkind: Service\nmetadata: {name: "+string(n)+"}\nspec: {ports: [{port: 1}]}")
	}
	_, r := Check(Config{
		Static: NewStatic(map[string]string{"f.yaml": docs(services...)}),
		Mesh:   Mesh{ServiceRanges: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/29")}},
	})
	if !hasProblem(r, "f.yaml:34: spec: ", "no address is left") {
		t.Errorf("problems %q", texts(r))
	}
}
