package enrol

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/ztun/ztun/tun/podnet"
)

// decider is a controller whose caches hold these objects.
func decider(t testing.TB, cfg Config, objects ...any) *Controller {
	t.Helper()
	cfg.Client, cfg.Agent, cfg.Finder, cfg.NodeName = fake.NewClientset(), newMemAgent(), &memProcs{pods: map[string]memPod{}}, "n1"
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.queue.ShutDown)
	for _, o := range objects {
		var err error
		switch o := o.(type) {
		case *corev1.Pod:
			err = c.informers[0].GetIndexer().Add(o)
		case *corev1.Namespace:
			err = c.informers[1].GetIndexer().Add(o)
		case *corev1.Service:
			small, e := trimService(o)
			if err = e; err == nil {
				err = c.services.Add(small)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func skippingService(change func(s *corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "demo", Labels: map[string]string{skipMark: "true"}},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "a"}},
	}
	if change != nil {
		change(s)
	}
	return s
}

func TestWants(t *testing.T) {
	inMesh := namespace("demo", ambient...)
	app := func() *corev1.Pod { return labelled(pod("a", "u"), "app", "a") }
	hostNetwork := func(p *corev1.Pod) *corev1.Pod { p.Spec.HostNetwork = true; return p }
	in := func(ns string, p *corev1.Pod) *corev1.Pod { p.Namespace = ns; return p }
	for _, tt := range []struct {
		name string
		pod  *corev1.Pod
		with []any
		want bool
	}{
		{"namespace label", app(), []any{inMesh}, true},
		{"pod label", labelled(app(), ambient...), []any{namespace("demo")}, true},
		{"both", labelled(app(), ambient...), []any{inMesh}, true},
		{"neither", app(), []any{namespace("demo")}, false},
		{"another value on the namespace", app(), []any{namespace("demo", modeLabel, "sidecar")}, false},
		{"another value on the pod", labelled(app(), modeLabel, "sidecar"), []any{inMesh}, true},
		{"revision and injection play no part", app(), []any{namespace("demo", "istio.io/rev", "x", "istio-injection", "enabled")}, false},
		{"sidecar", annotated(app(), sidecarStatus, "{}"), []any{inMesh}, false},
		{"sidecar without a value", annotated(app(), sidecarStatus, ""), []any{inMesh}, false},
		{"sidecar, pod label", annotated(labelled(app(), ambient...), sidecarStatus, "{}"), []any{inMesh}, false},
		{"none", labelled(app(), modeLabel, "none"), []any{inMesh}, false},
		{"hostNetwork", hostNetwork(app()), []any{inMesh}, false},
		{"hostNetwork, pod label", hostNetwork(labelled(app(), ambient...)), []any{inMesh}, false},
		{"excluded", in("kube-system", app()), []any{namespace("kube-system", ambient...)}, false},
		{"excluded, pod label", in("kube-system", labelled(app(), ambient...)), []any{namespace("kube-system")}, false},
		{"proxy", in("istio-system", labelled(app(), "app", "ztunnel")), []any{namespace("istio-system", ambient...)}, false},
		{"beside the proxy", in("istio-system", app()), []any{namespace("istio-system", ambient...)}, true},
		{"called as the proxy is", labelled(app(), "app", "ztunnel"), []any{inMesh}, true},
		{"pod skips by label", labelled(app(), skipMark, "true", modeLabel, "ambient"), []any{inMesh}, false},
		{"pod skips by annotation", annotated(app(), skipMark, "True"), []any{inMesh}, false},
		{"pod does not skip", labelled(app(), skipMark, "false"), []any{inMesh}, true},
		{"pod skips, it seems", annotated(app(), skipMark, "yes"), []any{inMesh}, true},
		{"namespace skips by label", labelled(app(), ambient...), []any{namespace("demo", skipMark, "true")}, false},
		{"namespace skips by annotation", app(), []any{func() *corev1.Namespace {
			ns := namespace("demo", ambient...)
			ns.Annotations = map[string]string{skipMark: "1"}
			return ns
		}()}, false},
		{"service skips by label", app(), []any{inMesh, skippingService(nil)}, false},
		{"service skips by annotation", app(), []any{inMesh, skippingService(func(s *corev1.Service) { s.Labels, s.Annotations = nil, s.Labels })}, false},
		{"service of others", labelled(app(), "app", "b"), []any{inMesh, skippingService(nil)}, true},
		{"service of another namespace", app(), []any{inMesh, skippingService(func(s *corev1.Service) { s.Namespace = "other" })}, true},
		{"service without a selector", app(), []any{inMesh, skippingService(func(s *corev1.Service) { s.Spec.Selector = nil })}, true},
		{"external service", app(), []any{inMesh, skippingService(func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName })}, true},
		{"service that does not skip", app(), []any{inMesh, skippingService(func(s *corev1.Service) { s.Labels = nil })}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := decider(t, Config{ExcludeNamespaces: ParseNamespaces("kube-system, istio-cni")}, tt.with...)
			got, err := c.wants(tt.pod)
			if err != nil || got != tt.want {
				t.Errorf("wants = %v, %v, want %v", got, err, tt.want)
			}
		})
	}
	t.Run("unknown namespace", func(t *testing.T) {
		if got, err := decider(t, Config{}).wants(app()); err == nil || got || !strings.Contains(err.Error(), "demo/a") {
			t.Errorf("wants = %v, %v, want an error that names the pod", got, err)
		}
	})
}

func TestParseSelectors(t *testing.T) {
	plain, labelledNS := namespace("x"), namespace("x", "mesh", "yes")
	for _, tt := range []struct {
		name, text string
		err        string
		// Whether a pod with label a=1 is taken in a plain namespace, one labelled mesh=yes, and there a pod without.
		want [3]bool
	}{
		{name: "empty list", text: "[]"},
		{name: "namespace only", text: "- namespaceSelector: {matchLabels: {mesh: 'yes'}}", want: [3]bool{false, true, true}},
		{name: "pod only", text: "- podSelector: {matchLabels: {a: '1'}}", want: [3]bool{true, true, false}},
		{name: "both halves", text: "- podSelector: {matchLabels: {a: '1'}}\n  namespaceSelector: {matchLabels: {mesh: 'yes'}}", want: [3]bool{false, true, false}},
		{name: "two entries", text: "- podSelector: {matchLabels: {a: '2'}}\n- podSelector: {matchExpressions: [{key: a, operator: DoesNotExist}]}", want: [3]bool{false, false, true}},
		{name: "everything", text: "- {}", want: [3]bool{true, true, true}},
		{name: "json", text: `[{"podSelector":{"matchLabels":{"a":"1"}}}]`, want: [3]bool{true, true, false}},
		{name: "null entry", text: "- null", err: "entry 0"},
		{name: "not a list", text: "podSelector: {}", err: "enablement selectors"},
		{name: "unknown field", text: "- podSelectors: {}", err: "podSelectors"},
		{name: "unknown operator", text: "- {}\n- podSelector: {matchExpressions: [{key: a, operator: Like, values: [b]}]}", err: "entry 1: podSelector"},
		{name: "impossible label", text: "- namespaceSelector: {matchLabels: {'a b': c}}", err: "entry 0: namespaceSelector"},
		{name: "number", text: "- podSelector: {matchLabels: {a: 1}}", want: [3]bool{true, true, false}}, // As kubectl takes it.
		{name: "no YAML", text: "\t- {", err: "enablement selectors"},
		{name: "too long", text: strings.Repeat("#", maxSelectorText+1), err: "more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseSelectors(tt.text)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil || got == nil {
				t.Fatalf("ParseSelectors = %v, %v", got, err)
			}
			c := decider(t, Config{Selectors: got})
			p, other := labelled(pod("a", "u"), "a", "1"), pod("b", "v")
			if have := [3]bool{c.selected(p, plain), c.selected(p, labelledNS), c.selected(other, labelledNS)}; have != tt.want {
				t.Errorf("selected: %v, want %v", have, tt.want)
			}
		})
	}
	for _, text := range []string{"", " \n"} {
		if got, err := ParseSelectors(text); got != nil || err != nil {
			t.Errorf("ParseSelectors(%q) = %v, %v, want nil: the default", text, got, err)
		}
	}
}

func TestParseNamespaces(t *testing.T) {
	for list, want := range map[string][]string{
		"": nil, " , ,": nil, "kube-system": {"kube-system"}, " a ,b,, c ": {"a", "b", "c"},
	} {
		if got := ParseNamespaces(list); !slices.Equal(got, want) {
			t.Errorf("ParseNamespaces(%q) = %q, want %q", list, got, want)
		}
	}
}

func TestNamespaceMatchIgnoresSelectorsOfAllNamespaces(t *testing.T) {
	c := decider(t, Config{})
	plain, same := c.namespaceMatch(namespace("x")), c.namespaceMatch(namespace("x", "team", "a"))
	other := c.namespaceMatch(namespace("x", ambient...))
	if !slices.Equal(plain, same) || slices.Equal(plain, other) || len(plain) != 2 {
		t.Errorf("namespaceMatch: %v, %v, %v", plain, same, other)
	}
}

func TestConfig(t *testing.T) {
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "Finder") || !strings.Contains(err.Error(), "NodeName") {
		t.Errorf("New(Config{}) = %v, want every problem", err)
	}
}

// FuzzParseSelectors: what is taken decides as a plain reading of the labels
// would.
func FuzzParseSelectors(f *testing.F) {
	f.Add("- podSelector: {matchLabels: {a: b}}", "a", "b")
	f.Add("- podSelector: {matchExpressions: [{key: a, operator: NotIn, values: [b, c]}]}\n  namespaceSelector: {matchLabels: {a: b}}", "a", "c")
	f.Add("- {}\n- namespaceSelector: {matchExpressions: [{key: a, operator: Exists}]}", "x", "y")
	f.Add("- podSelector: {matchExpressions: [{key: a, operator: In, values: [b]}, {key: c, operator: DoesNotExist}]}", "a", "b")
	f.Add("- &x {podSelector: {matchLabels: {a: b}}}\n- *x", "a", "b")
	f.Fuzz(func(t *testing.T, text, key, value string) {
		selectors, err := ParseSelectors(text)
		if err != nil || selectors == nil {
			return
		}
		var entries []selectorText
		if err := yaml.Unmarshal([]byte(text), &entries); err != nil || len(entries) != len(selectors) {
			t.Fatalf("%d selectors of %d entries, %v", len(selectors), len(entries), err)
		}
		with, without := map[string]string{key: value}, map[string]string{}
		for i, s := range selectors {
			for _, pod := range []map[string]string{with, without} {
				for _, ns := range []map[string]string{with, without} {
					want := plainMatch(entries[i].PodSelector, pod) && plainMatch(entries[i].NamespaceSelector, ns)
					if got := s.matches(pod, ns); got != want {
						t.Errorf("entry %d with pod %v in namespace %v: %v, want %v", i, pod, ns, got, want)
					}
				}
			}
		}
	})
}

// plainMatch is what a LabelSelector means, word for word.
func plainMatch(s metav1.LabelSelector, labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, ok := labels[e.Key]
		in := ok && slices.Contains(e.Values, have)
		if want := map[metav1.LabelSelectorOperator]bool{
			metav1.LabelSelectorOpIn: in, metav1.LabelSelectorOpNotIn: !in,
			metav1.LabelSelectorOpExists: ok, metav1.LabelSelectorOpDoesNotExist: !ok,
		}; !want[e.Operator] {
			return false
		}
	}
	return true
}

// FuzzAnnotations: whatever a pod's annotations say, the agent can attach it.
func FuzzAnnotations(f *testing.F) {
	f.Add("true", "0", "br0, veth1,,br0", "x")
	f.Add("T", "no", strings.Repeat("a,", 40)+"a-name-that-is-too-long,lo,ztun0,a/b", "TRUE")
	c := decider(f, Config{})
	f.Fuzz(func(t *testing.T, bypass, dns, interfaces, skip string) {
		p := annotated(pod("a", "u"), bypassAnnotation, bypass, dnsAnnotation, dns, interfacesAnnotation, interfaces, skipMark, skip)
		got := c.describe(p, known{})
		isTrue := func(s string) bool { return slices.Contains([]string{"1", "t", "T", "TRUE", "true", "True"}, s) }
		if got.BypassInbound != isTrue(bypass) || got.DNSCapture != isTrue(dns) || skips(&p.ObjectMeta) != isTrue(skip) {
			t.Errorf("bypass %q, dns %q, skip %q: %+v", bypass, dns, skip, got)
		}
		cfg := podnet.Config{Device: podnet.DefaultDevice, VirtualInterfaces: got.VirtualInterfaces}
		if err := cfg.Validate(); err != nil {
			t.Error(err)
		}
		for _, name := range got.VirtualInterfaces {
			if !strings.Contains(interfaces, name) {
				t.Errorf("interface %q is not in %q", name, interfaces)
			}
		}
	})
}
