package chart

import (
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write testdata anew")

const dir = "../../chart"

type values = map[string]any

// with is what every user says, and then v.
func with(v values) Options {
	all := values{"hub": "registry.test/ztun", "tag": "v1.0.0"}
	maps.Copy(all, v)
	return Options{Values: all}
}

func platform(name string) Options { return with(values{"global": values{"platform": name}}) }

// cases are the installations that testdata shows.
var cases = map[string]Options{
	"default":   with(nil),
	"gke":       platform("gke"),
	"openshift": platform("openshift"),
	"k3s":       platform("k3s"),
	"k3d":       platform("k3d"),
	"microk8s":  platform("microk8s"),
	"minikube":  platform("minikube"),
	"options":   with(options),
	"privileged": with(values{
		"cni":        values{"privileged": true, "hostPID": true, "ambient": values{"shareHostNetworkNamespace": true}},
		"monitoring": values{"serviceMonitor": values{"enabled": true}},
	}),
	"kubernetes-1.28": {Kube: "v1.28.0", Values: values{"image": "registry.test/ztun@sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"}},
}

// options has every value that is not a platform's once.
var options = values{
	"global":           values{"networkPolicy": values{"enabled": true}},
	"imagePullPolicy":  "Always",
	"imagePullSecrets": []any{"pull"},
	"resourceName":     "ztunnel-canary",
	"labels":           values{"team": "mesh"},
	"annotations":      values{"a": "daemonset"},
	"podLabels":        values{"a": "label", "app": "not-to-be-changed"},
	"podAnnotations":   values{"a": "pod"},
	"istioNamespace":   "istio-control",
	"revision":         "canary",
	"caAddress":        "ca.test:443",
	"trustBundleName":  "roots",
	"peerCaCrl":        values{"enabled": true},
	"network":          "east",
	"multiCluster":     values{"clusterName": "c1"},
	"meshConfig": values{"defaultConfig": values{
		"concurrency": 0, "statsPort": 15888, "proxyMetadata": values{"ISTIO_META_DNS_CAPTURE": "false"},
	}},
	"logLevel":  "info,ztun::pool=debug",
	"logAsJson": true,
	"env":       values{"RUST_LOG": "debug", "NODE_NAME": "by-hand", "SECRET_TTL": "1h", "IPV6_ENABLED": false},
	"resources": values{
		"requests": values{"cpu": "1500m", "memory": "1Gi"},
		"limits":   values{"cpu": 2, "memory": "1Gi"},
	},
	"runAsUser": 1337, "runAsGroup": 1338,
	"terminationGracePeriodSeconds": 60,
	"updateStrategy":                values{"rollingUpdate": values{"maxSurge": "10%"}},
	"nodeSelector":                  values{"mesh": "yes"},
	"affinity":                      values{"nodeAffinity": values{}},
	"dnsPolicy":                     "None",
	"dnsConfig":                     values{"nameservers": []any{"192.0.2.53"}},
	"seLinuxOptions":                values{"level": "s0"},
	"volumes":                       []any{values{"name": "more", "emptyDir": values{}}},
	"volumeMounts":                  []any{values{"name": "more", "mountPath": "/more"}},
	"resourceQuotas":                values{"enabled": true, "pods": 10},
	"cni": values{
		"cniBinDir": "/bin/cni", "cniConfDir": "/conf/cni", "cniNetnsDir": "/netns", "cniConfFileName": "10-calico.conflist",
		"chained": true, "istioOwnedCNIConfig": true,
		"excludeNamespaces": []any{"kube-system", "other"},
		"ambient": values{"dnsCapture": false, "enablementSelectors": []any{
			values{"podSelector": values{"matchLabels": values{"mesh": "in"}}},
		}},
		"logging": values{"level": "debug"}, "logAsJson": false,
		"env":       values{"MONITORING_PORT": 15014},
		"podLabels": values{"b": "label"}, "podAnnotations": values{"b": "pod"},
		"resources":      values{"limits": values{"memory": "200Mi"}},
		"updateStrategy": values{"rollingUpdate": values{"maxUnavailable": "10%"}},
		"tolerations":    []any{}, "nodeSelector": values{"mesh": "yes"},
		"seLinuxOptions": values{"type": "mine_t"}, "seccompProfile": values{"type": "Unconfined"},
	},
	"monitoring": values{"podMonitor": values{"enabled": true}, "interval": "15s", "labels": values{"release": "istio"}},
}

func manifests(t *testing.T, o Options) []Manifest {
	t.Helper()
	m, err := Manifests(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestLint(t *testing.T) {
	for _, v := range []values{nil, with(nil).Values, with(options).Values} {
		for _, m := range lint.RunAll(dir, v, "istio-system").Messages {
			if m.Severity > support.InfoSev {
				t.Errorf("%v", m)
			}
		}
	}
}

// What an installation brings is what testdata says: go test -update writes it anew.
func TestGolden(t *testing.T) {
	for name, o := range cases {
		t.Run(name, func(t *testing.T) {
			var text strings.Builder
			for _, m := range manifests(t, o) {
				text.WriteString("---\n" + m.YAML + "\n")
			}
			path := filepath.Join("testdata", name+".yaml")
			if *update {
				if err := os.WriteFile(path, []byte(text.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), text.String()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", path, diff)
			}
		})
	}
}

// Every object has only fields that its kind has.
func TestObjectsAreOfTheirKinds(t *testing.T) {
	kinds := map[string]func() any{
		"ClusterRole":        func() any { return &rbacv1.ClusterRole{} },
		"ClusterRoleBinding": func() any { return &rbacv1.ClusterRoleBinding{} },
		"ConfigMap":          func() any { return &corev1.ConfigMap{} },
		"DaemonSet":          func() any { return &appsv1.DaemonSet{} },
		"NetworkPolicy":      func() any { return &networkingv1.NetworkPolicy{} },
		"ResourceQuota":      func() any { return &corev1.ResourceQuota{} },
		"Role":               func() any { return &rbacv1.Role{} },
		"RoleBinding":        func() any { return &rbacv1.RoleBinding{} },
		"Service":            func() any { return &corev1.Service{} },
		"ServiceAccount":     func() any { return &corev1.ServiceAccount{} },
	}
	foreign := []string{"NetworkAttachmentDefinition", "PodMonitor", "ServiceMonitor"}
	for name, o := range cases {
		seen := map[string]bool{}
		for _, m := range manifests(t, o) {
			if id := m.Kind + "/" + m.Name; seen[id] {
				t.Errorf("%s: %s is there twice", name, id)
			} else {
				seen[id] = true
			}
			if slices.Contains(foreign, m.Kind) {
				continue
			}
			object, ok := kinds[m.Kind]
			if !ok {
				t.Errorf("%s: kind %s has no row in this test", name, m.Kind)
				continue
			}
			if err := yaml.UnmarshalStrict([]byte(m.YAML), object()); err != nil {
				t.Errorf("%s: %s %s: %v", name, m.Kind, m.Name, err)
			}
		}
	}
}

func TestRenderIsManifestsAsObjects(t *testing.T) {
	objects, err := Render(dir, with(nil))
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for _, u := range objects {
		got = append(got, u.GetKind()+"/"+u.GetName())
	}
	for _, m := range manifests(t, with(nil)) {
		want = append(want, m.Kind+"/"+m.Name)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
	// Accounts and configuration come before those who need them.
	if i := slices.Index(got, "DaemonSet/ztunnel"); i < slices.Index(got, "ServiceAccount/ztunnel") || i < slices.Index(got, "ConfigMap/ztunnel-mesh") {
		t.Errorf("order: %v", got)
	}
}

func TestRenderNamesWhatIsWrong(t *testing.T) {
	if _, err := Render(t.TempDir(), Options{}); err == nil || !strings.Contains(err.Error(), "Chart.yaml") {
		t.Errorf("an empty directory: %v", err)
	}
	if _, err := Render(dir, Options{Kube: "new"}); err == nil || !strings.Contains(err.Error(), `"new"`) {
		t.Errorf("a version that is none: %v", err)
	}
	if _, err := Render(dir, Options{}); err == nil || !strings.Contains(err.Error(), "hub: say where the image is") {
		t.Errorf("no hub: %v", err)
	}
}
