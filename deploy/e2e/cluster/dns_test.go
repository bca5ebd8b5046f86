package cluster

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/yaml"
)

const named = `
- {kind: Service, metadata: {name: both, namespace: ns}, spec: {clusterIP: 10.96.0.5, clusterIPs: [10.96.0.5, "fd00:96::5"]}}
- {kind: Service, metadata: {name: none, namespace: ns}, spec: {clusterIP: None, clusterIPs: [None]}}
- {kind: Service, metadata: {name: other, namespace: ns}, spec: {type: ExternalName, externalName: both.ns.svc.cluster.local}}
- {kind: Service, metadata: {name: away, namespace: ns}, spec: {type: ExternalName, externalName: example.test}}
- {kind: Service, metadata: {name: itself, namespace: ns}, spec: {type: ExternalName, externalName: itself.ns.svc.cluster.local}}
- kind: EndpointSlice
  metadata: {name: none-4, namespace: ns, labels: {kubernetes.io/service-name: none}}
  endpoints:
  - {addresses: [10.244.1.2], hostname: one, conditions: {ready: true}}
  - {addresses: [10.244.1.3], hostname: two, conditions: {ready: false}}
- kind: EndpointSlice
  metadata: {name: none-6, namespace: ns, labels: {kubernetes.io/service-name: none}}
  endpoints: [{addresses: ["fd00:44:1::2"], hostname: one}]
- kind: EndpointSlice
  metadata: {name: stray, namespace: ns, labels: {kubernetes.io/service-name: both}}
  endpoints: [{addresses: [10.244.9.9], hostname: one}]
`

func knownNames(t *testing.T) *names {
	t.Helper()
	by := cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}
	services, endpoints := cache.NewIndexer(cache.MetaNamespaceKeyFunc, by), cache.NewIndexer(cache.MetaNamespaceKeyFunc, by)
	var all []runtime.RawExtension
	if err := yaml.Unmarshal([]byte(named), &all); err != nil {
		t.Fatal(err)
	}
	for _, one := range all {
		var kind metav1.TypeMeta
		var object any = &corev1.Service{}
		to := services
		err := yaml.Unmarshal(one.Raw, &kind)
		if kind.Kind == "EndpointSlice" {
			object, to = &discoveryv1.EndpointSlice{}, endpoints
		}
		if err == nil {
			err = yaml.Unmarshal(one.Raw, object)
		}
		if err == nil {
			err = to.Add(object)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return &names{corelisters.NewServiceLister(services), discoverylisters.NewEndpointSliceLister(endpoints)}
}

// answered keeps what ServeDNS writes.
type answered struct {
	dns.ResponseWriter
	msg *dns.Msg
}

func (a *answered) WriteMsg(m *dns.Msg) error { a.msg = m; return nil }

func TestAnswers(t *testing.T) {
	n := knownNames(t)
	const end = ".ns.svc.cluster.local."
	for _, c := range []struct {
		name  string
		kind  uint16
		want  []string // the last column of each record
		rcode int
	}{
		{"both" + end, dns.TypeA, []string{"10.96.0.5"}, 0},
		{"BOTH" + strings.ToUpper(end), dns.TypeA, []string{"10.96.0.5"}, 0},
		{"both" + end, dns.TypeAAAA, []string{"fd00:96::5"}, 0},
		{"both" + end, dns.TypeMX, nil, 0},
		{"none" + end, dns.TypeA, []string{"10.244.1.2"}, 0},
		{"none" + end, dns.TypeAAAA, []string{"fd00:44:1::2"}, 0},
		{"one.none" + end, dns.TypeAAAA, []string{"fd00:44:1::2"}, 0},
		{"two.none" + end, dns.TypeA, nil, dns.RcodeNameError},
		{"other" + end, dns.TypeAAAA, []string{"both.ns.svc.cluster.local.", "fd00:96::5"}, 0},
		{"away" + end, dns.TypeA, []string{"example.test."}, 0},
		{"itself" + end, dns.TypeA, slices.Repeat([]string{"itself.ns.svc.cluster.local."}, maxAliases), 0},
		{"missing" + end, dns.TypeA, nil, dns.RcodeNameError},
		{"both.m.svc.cluster.local.", dns.TypeA, nil, dns.RcodeNameError},
		{"ns.svc.cluster.local.", dns.TypeA, nil, dns.RcodeNameError},
		{"a.b.both" + end, dns.TypeA, nil, dns.RcodeNameError},
		{"example.test.", dns.TypeA, nil, dns.RcodeNameError},
	} {
		var w answered
		n.ServeDNS(&w, new(dns.Msg).SetQuestion(c.name, c.kind))
		var got []string
		for _, r := range w.msg.Answer {
			fields := strings.Fields(r.String())
			got = append(got, fields[len(fields)-1])
		}
		if d := cmp.Diff(c.want, got); d != "" || w.msg.Rcode != c.rcode || !w.msg.Authoritative {
			t.Errorf("%s %s: %s (-want +got)\n%s", c.name, dns.TypeToString[c.kind], dns.RcodeToString[w.msg.Rcode], d)
		}
	}
	var w answered
	n.ServeDNS(&w, new(dns.Msg))
	if len(w.msg.Answer) != 0 {
		t.Errorf("no question, and the answer %v", w.msg.Answer)
	}
}
