package control

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/ztun/ztun/xds/workloadapi"
)

// wantProto compares a message with its text form.
func wantProto(t *testing.T, got proto.Message, text string) {
	t.Helper()
	want := got.ProtoReflect().New().Interface()
	if err := prototext.Unmarshal([]byte(text), want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestPodBecomesWorkload(t *testing.T) {
	const mesh = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z, topology.istio.io/subzone: s}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  clusterIP: 10.96.7.7
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: raw, port: 81}
  - {name: other, port: 82, targetPort: 9000}
  - {name: absent, port: 83, targetPort: nobody}
  - {name: dns, port: 53, protocol: UDP}
---
`
	w := world(t, mesh+`
apiVersion: v1
kind: Pod
metadata:
  name: web-6b7c-x
  namespace: shop
  labels: {app: web, version: v2, pod-template-hash: 6b7c}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-6b7c, uid: u, controller: true}]
spec:
  nodeName: n1
  serviceAccountName: seller
  containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]
status: {podIPs: [{ip: 10.1.0.2}, {ip: "fd00::2"}]}
`)
	wantProto(t, w.workload(t, "shop", "web-6b7c-x"), `
uid: "Kubernetes//Pod/shop/web-6b7c-x" name: "web-6b7c-x" namespace: "shop"
addresses: "\n\x01\x00\x02" addresses: "\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02"
tunnel_protocol: HBONE service_account: "seller" node: "n1"
canonical_name: "web" canonical_revision: "v2" workload_type: POD workload_name: "web"
cluster_id: "Kubernetes" locality { region: "r" zone: "z" subzone: "s" }
services { key: "shop/web.shop.svc.cluster.local" value {
  ports { service_port: 80 target_port: 8080 } ports { service_port: 81 target_port: 81 } ports { service_port: 82 target_port: 9000 } } }`)
	wantProto(t, w.service(t, "shop", "web"), `
name: "web" namespace: "shop" hostname: "web.shop.svc.cluster.local" canonical: true ip_families: IPV4_ONLY
addresses { address: "\n\x60\x07\x07" }
ports { service_port: 80 target_port: 0 app_protocol: HTTP11 }
ports { service_port: 81 target_port: 81 }
ports { service_port: 82 target_port: 9000 }
ports { service_port: 83 target_port: 0 }`)
}

// Facts istio.md 1.1 and the rules of this control plane, which has no agent.
func TestEnrolment(t *testing.T) {
	type want struct {
		tunnel workloadapi.TunnelProtocol
		native bool
		mode   workloadapi.NetworkMode
	}
	none, hbone := want{}, want{tunnel: workloadapi.TunnelProtocol_HBONE}
	for _, tc := range []struct {
		name, namespace, meta, spec string
		want                        want
	}{
		{"neither", "", "", "", none},
		{"namespace label", "istio.io/dataplane-mode: ambient", "", "", hbone},
		{"namespace label of another mode", "istio.io/dataplane-mode: sidecar", "", "", none},
		{"pod label", "", "labels: {istio.io/dataplane-mode: ambient}", "", hbone},
		{"both", "istio.io/dataplane-mode: ambient", "labels: {istio.io/dataplane-mode: ambient}", "", hbone},
		{"pod opts out", "istio.io/dataplane-mode: ambient", "labels: {istio.io/dataplane-mode: none}", "", none},
		{"host network", "istio.io/dataplane-mode: ambient", "labels: {istio.io/dataplane-mode: ambient}", "hostNetwork: true", want{mode: workloadapi.NetworkMode_HOST_NETWORK}},
		{"sidecar", "istio.io/dataplane-mode: ambient", "annotations: {sidecar.istio.io/status: x}", "", none},
		{"annotation enabled", "", "annotations: {ambient.istio.io/redirection: enabled}", "", hbone},
		{"annotation pending", "istio.io/dataplane-mode: ambient", "annotations: {ambient.istio.io/redirection: pending}", "", none},
		{"native tunnel", "", "labels: {networking.istio.io/tunnel: http}", "", want{tunnel: workloadapi.TunnelProtocol_HBONE, native: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := world(t, docs(
				"apiVersion: v1\nkind: Namespace\nmetadata: {name: x, labels: {"+tc.namespace+"}}",
				"apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  namespace: x\n  "+tc.meta+"\nspec: {nodeName: n, "+tc.spec+"}\nstatus: {podIP: 10.0.0.1}"))
			m := w.workload(t, "x", "a")
			if got := (want{m.TunnelProtocol, m.NativeTunnel, m.NetworkMode}); got != tc.want {
				t.Errorf("%+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestExcludedNamespacesAreNeverEnrolled(t *testing.T) {
	w := world(t, docs(
		"apiVersion: v1\nkind: Namespace\nmetadata: {name: kube-system, labels: {istio.io/dataplane-mode: ambient}}",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: kube-system, labels: {istio.io/dataplane-mode: ambient}}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.1}"))
	if got := w.workload(t, "kube-system", "a").TunnelProtocol; got != workloadapi.TunnelProtocol_NONE {
		t.Errorf("tunnel protocol %v", got)
	}
}

func TestPodReadinessAndLife(t *testing.T) {
	for _, tc := range []struct {
		name, meta, status string
		served             bool
		want               workloadapi.WorkloadStatus
	}{
		{"says nothing", "", "", true, workloadapi.WorkloadStatus_HEALTHY},
		{"pending with an address", "", "phase: Pending, ", true, workloadapi.WorkloadStatus_HEALTHY},
		{"ready", "", "conditions: [{type: Ready, status: 'True'}], ", true, workloadapi.WorkloadStatus_HEALTHY},
		{"not ready", "", "conditions: [{type: Ready, status: 'False'}], ", true, workloadapi.WorkloadStatus_UNHEALTHY},
		{"unknown", "", "conditions: [{type: Ready, status: Unknown}], ", true, workloadapi.WorkloadStatus_UNHEALTHY},
		{"another condition", "", "conditions: [{type: PodScheduled, status: 'False'}], ", true, workloadapi.WorkloadStatus_HEALTHY},
		{"being deleted", ", deletionTimestamp: 2026-01-01T00:00:00Z", "", true, workloadapi.WorkloadStatus_UNHEALTHY},
		{"succeeded", "", "phase: Succeeded, ", false, 0},
		{"failed", "", "phase: Failed, ", false, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := world(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: a"+tc.meta+"}\nspec: {nodeName: n}\nstatus: {"+tc.status+"podIP: 10.0.0.1}")
			if served := len(w.wire.workloads) == 1; served != tc.served {
				t.Fatalf("served: %v", served)
			}
			if tc.served && w.wire.workloads[0].Status != tc.want {
				t.Errorf("%v, want %v", w.wire.workloads[0].Status, tc.want)
			}
			if on := w.hasIdentity("n", identityKey{"default", "default"}); on != tc.served {
				t.Errorf("identity on its node: %v", on)
			}
		})
	}
}

func TestWorkloadNames(t *testing.T) {
	owner := func(kind, name string) string {
		return ", ownerReferences: [{apiVersion: x/v1, kind: " + kind + ", name: " + name + ", uid: u, controller: true}]"
	}
	for _, tc := range []struct{ name, meta, workload, canonical, revision string }{
		{"bare", "", "a", "a", "latest"},
		{"replica set", ", labels: {pod-template-hash: abc}" + owner("ReplicaSet", "web-abc"), "web", "web", "latest"},
		{"replica set without a hash", owner("ReplicaSet", "web-abc"), "web-abc", "web-abc", "latest"},
		{"stateful set", owner("StatefulSet", "db"), "db", "db", "latest"},
		{"job", owner("Job", "once"), "once", "once", "latest"},
		{"cron job", owner("Job", "nightly-28411200"), "nightly", "nightly", "latest"},
		{"app label", ", labels: {app: front, version: v1}", "a", "front", "v1"},
		{"recommended labels", ", labels: {app: x, app.kubernetes.io/name: front, app.kubernetes.io/version: v3, version: v1}", "a", "front", "v3"},
		{"istio labels", ", labels: {app.kubernetes.io/name: x, service.istio.io/canonical-name: front, service.istio.io/canonical-revision: v9, service.istio.io/workload-name: w}", "w", "front", "v9"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := world(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: a"+tc.meta+"}\nstatus: {podIP: 10.0.0.1}").workload(t, "default", "a")
			if m.WorkloadName != tc.workload || m.CanonicalName != tc.canonical || m.CanonicalRevision != tc.revision {
				t.Errorf("%s, %s, %s; want %s, %s, %s", m.WorkloadName, m.CanonicalName, m.CanonicalRevision, tc.workload, tc.canonical, tc.revision)
			}
		})
	}
}

func TestMeshSettingsReachTheWire(t *testing.T) {
	files := NewStatic(map[string]string{"f.yaml": docs(
		"apiVersion: v1\nkind: Namespace\nmetadata: {name: root, labels: {topology.istio.io/network: net1}}",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 10.0.0.1}",
		"apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: 10.9.9.9, ports: [{port: 1}]}")})
	for _, tc := range []struct{ network, want string }{{"", "net1"}, {"net2", "net2"}} {
		w, r := Check(Config{Static: files, Mesh: Mesh{TrustDomain: "td", ClusterDomain: "example", ClusterID: "c1", RootNamespace: "root", Network: tc.network}})
		if err := r.Err(); err != nil {
			t.Fatal(err)
		}
		m, s := w.workload(t, "default", "a"), w.service(t, "default", "s")
		if m.TrustDomain != "td" || m.ClusterId != "c1" || m.Uid != "c1//Pod/default/a" || m.Network != tc.want {
			t.Errorf("workload %v", m)
		}
		if s.Hostname != "s.default.svc.example" || s.Addresses[0].Network != tc.want {
			t.Errorf("service %v", s)
		}
		if got := w.resolve(typeAddress, tc.want+"/10.9.9.9"); len(got) != 1 || got[0] != "default/s.default.svc.example" {
			t.Errorf("alias resolves to %q", got)
		}
	}
}

func TestAddressesOfPodsFromElsewhere(t *testing.T) {
	w := world(t, "apiVersion: v1\nkind: Pod\nmetadata: {name: a, annotations: {ztun.io/pod-ips: '10.0.0.1, fd00::1'}}")
	if got := len(w.workload(t, "default", "a").Addresses); got != 2 {
		t.Errorf("%d addresses from the annotation", got)
	}
	files := NewStatic(map[string]string{"f.yaml": "apiVersion: v1\nkind: Pod\nmetadata: {name: a}"})
	known := func(addrs ...netip.Addr) func(ns, name string) []netip.Addr {
		return func(ns, name string) []netip.Addr {
			if ns == "default" && name == "a" {
				return addrs
			}
			return nil
		}
	}
	if w, r := Check(Config{Static: files, PodAddrs: known(netip.MustParseAddr("10.0.0.5"))}); !r.Used || len(w.workload(t, "default", "a").Addresses) != 1 {
		t.Errorf("from the embedder: %q", texts(r))
	}
	if _, r := Check(Config{Static: files, PodAddrs: known(netip.Addr{})}); r.Used {
		t.Error("an invalid address from the embedder is used")
	}
	if got := w.Pods(); len(got) != 1 || len(got[0].Addrs) != 2 {
		t.Errorf("places %v", got)
	}
}
