package enrol

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/ztun/ztun/cmd/internal/enrol/marks"
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
		{"another value on the namespace", app(), []any{namespace("demo", marks.ModeLabel, "sidecar")}, false},
		{"another value on the pod", labelled(app(), marks.ModeLabel, "sidecar"), []any{inMesh}, true},
		{"revision and injection play no part", app(), []any{namespace("demo", "istio.io/rev", "x", "istio-injection", "enabled")}, false},
		{"sidecar", annotated(app(), sidecarStatus, "{}"), []any{inMesh}, false},
		{"sidecar without a value", annotated(app(), sidecarStatus, ""), []any{inMesh}, false},
		{"sidecar, pod label", annotated(labelled(app(), ambient...), sidecarStatus, "{}"), []any{inMesh}, false},
		{"none", labelled(app(), marks.ModeLabel, "none"), []any{inMesh}, false},
		{"hostNetwork", hostNetwork(app()), []any{inMesh}, false},
		{"hostNetwork, pod label", hostNetwork(labelled(app(), ambient...)), []any{inMesh}, false},
		{"excluded", in("kube-system", app()), []any{namespace("kube-system", ambient...)}, false},
		{"excluded, pod label", in("kube-system", labelled(app(), ambient...)), []any{namespace("kube-system")}, false},
		{"proxy", in("istio-system", labelled(app(), "app", "ztunnel")), []any{namespace("istio-system", ambient...)}, false},
		{"beside the proxy", in("istio-system", app()), []any{namespace("istio-system", ambient...)}, true},
		{"called as the proxy is", labelled(app(), "app", "ztunnel"), []any{inMesh}, true},
		{"pod skips by label", labelled(app(), skipMark, "true", marks.ModeLabel, "ambient"), []any{inMesh}, false},
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
			c := decider(t, Config{ExcludeNamespaces: []string{"kube-system", "istio-cni"}}, tt.with...)
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

// Whatever a pod's annotations say, the agent can attach it.
func TestAnnotations(t *testing.T) {
	c := decider(t, Config{})
	for _, tt := range []struct {
		bypass, dns, interfaces, skip string
		wantBypass, wantDNS, wantSkip bool
		want                          []string
	}{
		{"true", "0", "br0, veth1,,br0", "x", true, false, false, []string{"br0", "veth1"}},
		{"T", "no", "a-name-that-is-too-long,lo,ztun0,a/b", "TRUE", true, false, true, nil},
		{"", "t", "", "false", false, true, false, nil},
	} {
		p := annotated(pod("a", "u"), bypassAnnotation, tt.bypass, dnsAnnotation, tt.dns, interfacesAnnotation, tt.interfaces, skipMark, tt.skip)
		got := c.describe(p, known{})
		if got.BypassInbound != tt.wantBypass || got.DNSCapture != tt.wantDNS || skips(&p.ObjectMeta) != tt.wantSkip || !slices.Equal(got.VirtualInterfaces, tt.want) {
			t.Errorf("%+v: %+v", tt, got)
		}
	}
}
