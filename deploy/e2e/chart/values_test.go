package chart

import (
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// nest makes values of a path: a.b=1.
func nest(path string, v any) values {
	keys := strings.Split(path, ".")
	for _, k := range slices.Backward(keys) {
		v = values{k: v}
	}
	return v.(values)
}

// A misspelt name or a value of another kind is an error that says where.
func TestSchemaRefuses(t *testing.T) {
	tests := []struct {
		path  string
		value any
		want  string
	}{
		{"imagePullPolcy", "Always", "imagePullPolcy"},
		{"imagePullPolicy", "Sometimes", "/imagePullPolicy"},
		{"global.platfrom", "gke", "platfrom"},
		{"global.platform", "aks", "/global/platform"},
		{"cni.ambient.dnscapture", true, "dnscapture"},
		{"cni.ambient.dnsCapture", "yes", "/cni/ambient/dnsCapture"},
		{"cni.ambient.enablementSelectors", []any{values{"pods": values{}}}, "pods"},
		{"cni.cniBinDir", "opt/cni/bin", "/cni/cniBinDir"},
		{"cni.cniConfFileName", "../10-calico.conflist", "/cni/cniConfFileName"},
		{"cni.repair.enabled", true, "repair"},
		{"cni.ambient.ipv6", false, "ipv6"},
		{"cni.logging.level", "verbose", "/cni/logging/level"},
		{"env", []any{"A=B"}, "/env"},
		{"env", values{"A B": "1"}, "A B"},
		{"meshConfig.defaultConfig.concurrency", "2", "/meshConfig/defaultConfig/concurrency"},
		{"meshConfig.defaultConfig.concurency", 2, "concurency"},
		{"resources.limit", values{"cpu": 1}, "limit"},
		{"resourceScope", "none", "/resourceScope"},
		{"runAsUser", 0, "/runAsUser"},
		{"terminationGracePeriodSeconds", "30s", "/terminationGracePeriodSeconds"},
		{"updateStrategy.rollingUpdate.maxsurge", 1, "maxsurge"},
		{"monitoring.interval", "30", "/monitoring/interval"},
		{"podMonitor.enabled", true, "podMonitor"},
	}
	for _, tt := range tests {
		_, err := Manifests(dir, with(nest(tt.path, tt.value)))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s=%v: error %v, want one about %s", tt.path, tt.value, err, tt.want)
		}
	}
}

// leaves are the paths of what is not a table with names of its own.
func leaves(prefix string, v any, out map[string]bool) {
	table, ok := v.(map[string]any)
	if !ok || len(table) == 0 {
		out[prefix] = true
		return
	}
	for k, x := range table {
		leaves(strings.TrimPrefix(prefix+"."+k, "."), x, out)
	}
}

func chartValues(t *testing.T) values {
	t.Helper()
	text, err := os.ReadFile(dir + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var v values
	if err := yaml.UnmarshalStrict(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// schemaPaths are the paths of the properties that the schema names.
func schemaPaths(prefix string, node, defs map[string]any, out map[string]bool) {
	if ref, ok := node["$ref"].(string); ok {
		node = defs[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
	}
	properties, ok := node["properties"].(map[string]any)
	if !ok {
		out[prefix] = true
		return
	}
	if node["additionalProperties"] != false {
		panic("schema: " + prefix + " takes any name")
	}
	for k, x := range properties {
		schemaPaths(strings.TrimPrefix(prefix+"."+k, "."), x.(map[string]any), defs, out)
	}
}

// The schema knows each value, and only values that the chart has.
func TestSchemaIsComplete(t *testing.T) {
	text, err := os.ReadFile(dir + "/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	named, have := map[string]bool{}, map[string]bool{}
	schemaPaths("", schema, schema["$defs"].(map[string]any), named)
	leaves("", chartValues(t), have)
	under := func(path string, set map[string]bool) bool {
		for p := range set {
			if p == path || strings.HasPrefix(path, p+".") || strings.HasPrefix(p, path+".") {
				return true
			}
		}
		return false
	}
	for path := range have {
		if !under(path, named) {
			t.Errorf("%s is not in the schema", path)
		}
	}
	// Parts of what Kubernetes defines, and what the mesh configuration may say besides.
	elsewhere := regexp.MustCompile(`(resources|updateStrategy|affinity|seLinuxOptions|seccompProfile)\.|^meshConfig\.`)
	for path := range named {
		if !under(path, have) && !elsewhere.MatchString(path) {
			t.Errorf("the schema has %s, the chart does not", path)
		}
	}
}

// The README's tables have a row for each value.
func TestREADMEListsEveryValue(t *testing.T) {
	text, err := os.ReadFile(dir + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, tables, _ := strings.Cut(string(text), "\n## Values\n")
	rows := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Za-z0-9.]+)` \\|").FindAllStringSubmatch(tables, -1) {
		rows[m[1]] = true
	}
	have := map[string]bool{}
	leaves("", chartValues(t), have)
	covered := map[string]bool{}
	for path := range have {
		row := path
		for !rows[row] && strings.Contains(row, ".") {
			row = row[:strings.LastIndex(row, ".")]
		}
		if !rows[row] {
			t.Errorf("%s has no row", path)
		}
		covered[row] = true
	}
	for row := range rows {
		if !covered[row] && !strings.HasPrefix(row, "meshConfig.defaultConfig.") {
			t.Errorf("the README tells of %s, which is no value", row)
		}
	}
}

// envOf is a container's environment, with what it takes from a ConfigMap.
func envOf(t *testing.T, all []Manifest, c corev1.Container) map[string]string {
	t.Helper()
	env := map[string]string{}
	for _, from := range c.EnvFrom {
		maps.Copy(env, parse[corev1.ConfigMap](t, all, "ConfigMap", from.ConfigMapRef.Name).Data)
	}
	seen := map[string]bool{}
	for _, e := range c.Env {
		if seen[e.Name] {
			t.Errorf("%s is set twice", e.Name)
		}
		seen[e.Name] = true
		env[e.Name] = e.Value
		switch f := e.ValueFrom; {
		case f == nil:
		case f.FieldRef != nil:
			env[e.Name] = f.FieldRef.FieldPath
		case f.ResourceFieldRef != nil:
			env[e.Name] = f.ResourceFieldRef.Resource
		}
	}
	return env
}

func mount(c corev1.Container, volumes []corev1.Volume, path string) *corev1.Volume {
	for _, m := range c.VolumeMounts {
		if m.MountPath != path {
			continue
		}
		for _, v := range volumes {
			if v.Name == m.Name {
				return &v
			}
		}
	}
	return nil
}

// What one program offers is what the other looks for.
func TestBothProgramsAgree(t *testing.T) {
	for name, o := range cases {
		all := manifests(t, o)
		proxy, agent := pods(t, o)
		p, a := proxy.Spec.Containers[0], agent.Spec.Containers[0]
		pe, ae := envOf(t, all, p), envOf(t, all, a)
		if pe["INPOD_UDS"] != ae["ZTUNNEL_UDS_ADDRESS"] {
			t.Errorf("%s: the proxy connects to %s, the agent listens on %s", name, pe["INPOD_UDS"], ae["ZTUNNEL_UDS_ADDRESS"])
		}
		pv, av := mount(p, proxy.Spec.Volumes, "/var/run/ztunnel"), mount(a, agent.Spec.Volumes, "/var/run/ztunnel")
		if pv == nil || av == nil || pv.HostPath.Path != av.HostPath.Path {
			t.Errorf("%s: the socket's directory is %v and %v", name, pv, av)
		}
		if uid := strconv.FormatInt(*proxy.Spec.SecurityContext.RunAsUser, 10); ae["ZTUN_PROXY_UID"] != uid {
			t.Errorf("%s: the proxy is user %s, the agent lets %s connect", name, uid, ae["ZTUN_PROXY_UID"])
		}
		if gid := strconv.FormatInt(*proxy.Spec.SecurityContext.RunAsGroup, 10); ae["ZTUN_PROXY_GID"] != gid {
			t.Errorf("%s: the proxy is of group %s, the agent's socket of %s", name, gid, ae["ZTUN_PROXY_GID"])
		}
		if want := strconv.FormatInt(*proxy.Spec.TerminationGracePeriodSeconds, 10); pe["TERMINATION_GRACE_PERIOD_SECONDS"] != want {
			t.Errorf("%s: the proxy is told %s seconds, and gets %s", name, pe["TERMINATION_GRACE_PERIOD_SECONDS"], want)
		}
	}
}

func TestImageReference(t *testing.T) {
	const digest = "@sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
	for want, v := range map[string]values{
		"registry.test/ztun/ztun:v1.0.0":   nil,
		"other.test:5000/z:v2":             {"hub": "other.test:5000", "image": "z", "tag": "v2"},
		"global.test/ztun:v3":              {"hub": "", "tag": "", "global": values{"hub": "global.test", "tag": "v3"}},
		"whole.test:5000/z:v1.0.0":         {"image": "whole.test:5000/z"},
		"whole.test/z:mine":                {"image": "whole.test/z:mine"},
		"whole.test/z" + digest:            {"image": "whole.test/z" + digest},
		"registry.test/ztun/ztun" + digest: {"image": "ztun" + digest},
		"registry.test/ztun/ztun:7":        {"tag": 7},
	} {
		proxy, agent := pods(t, with(v))
		for _, p := range []corev1.PodTemplateSpec{proxy, agent} {
			if got := p.Spec.Containers[0].Image; got != want {
				t.Errorf("%v: image %s, want %s", v, got, want)
			}
		}
	}
}

func TestProxyEnvironment(t *testing.T) {
	all := manifests(t, with(nil))
	proxy, _ := pods(t, with(nil))
	got := envOf(t, all, proxy.Spec.Containers[0])
	want := map[string]string{
		"CA_ADDRESS":                       "istiod.istio-system.svc:15012",
		"XDS_ADDRESS":                      "istiod.istio-system.svc:15012",
		"RUST_LOG":                         "info",
		"ISTIO_META_CLUSTER_ID":            "Kubernetes",
		"ISTIO_META_ENABLE_HBONE":          "true",
		"INPOD_ENABLED":                    "true",
		"INPOD_UDS":                        "/var/run/ztunnel/ztunnel.sock",
		"TERMINATION_GRACE_PERIOD_SECONDS": "30",
		"ZTUNNEL_CPU_LIMIT":                "limits.cpu",
		"ZTUNNEL_RESOURCE_CPU_REQUEST":     "200m",
		"POD_NAME":                         "metadata.name",
		"POD_NAMESPACE":                    "metadata.namespace",
		"NODE_NAME":                        "spec.nodeName",
		"INSTANCE_IP":                      "status.podIP",
		"SERVICE_ACCOUNT":                  "spec.serviceAccountName",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
	all = manifests(t, with(options))
	proxy, _ = pods(t, with(options))
	got = envOf(t, all, proxy.Spec.Containers[0])
	for name, want := range map[string]string{
		"XDS_ADDRESS": "istiod-canary.istio-control.svc:15012", "CA_ADDRESS": "ca.test:443", "LOG_FORMAT": "json",
		"NETWORK": "east", "ISTIO_META_CLUSTER_ID": "c1", "ISTIO_META_DNS_CAPTURE": "false", "RUST_LOG": "debug",
		"NODE_NAME": "by-hand", "SECRET_TTL": "1h", "IPV6_ENABLED": "false", "CRL_PATH": "/var/run/secrets/istio/crl/ca-crl.pem",
		"ZTUNNEL_RESOURCE_CPU_LIMIT": "2", "ZTUNNEL_RESOURCE_CPU_REQUEST": "1500m", "GOMEMLIMIT": "limits.memory",
		"TERMINATION_GRACE_PERIOD_SECONDS": "60",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
}

// The mesh configuration is where the proxy reads it, and a change of it starts the proxy again.
func TestMeshConfig(t *testing.T) {
	o := with(nest("meshConfig.defaultConfig.concurrency", 3))
	all := manifests(t, o)
	proxy, _ := pods(t, o)
	v := mount(proxy.Spec.Containers[0], proxy.Spec.Volumes, "/etc/istio/config")
	if v == nil || v.ConfigMap == nil {
		t.Fatal("no ConfigMap is mounted on /etc/istio/config")
	}
	var mesh struct {
		DefaultConfig struct{ Concurrency int }
	}
	if err := yaml.Unmarshal([]byte(parse[corev1.ConfigMap](t, all, "ConfigMap", v.ConfigMap.Name).Data["mesh"]), &mesh); err != nil {
		t.Fatal(err)
	}
	if got := mesh.DefaultConfig.Concurrency; got != 3 {
		t.Errorf("concurrency %d, want 3", got)
	}
	before, _ := pods(t, with(nil))
	if before.Annotations["checksum/mesh"] == proxy.Annotations["checksum/mesh"] {
		t.Error("the pod is the same as without it")
	}
}

func TestAgentConfigStartsTheAgentAgain(t *testing.T) {
	_, before := pods(t, with(nil))
	_, after := pods(t, with(nest("cni.ambient.dnsCapture", false)))
	if before.Annotations["checksum/config"] == after.Annotations["checksum/config"] {
		t.Error("the pod is the same")
	}
}

func TestPlatforms(t *testing.T) {
	type paths struct {
		bin, conf, netns, chained, file string
		quota                           bool
	}
	usual := paths{"/opt/cni/bin", "/etc/cni/net.d", "/var/run/netns", "true", "", false}
	change := func(f func(*paths)) paths { p := usual; f(&p); return p }
	for name, want := range map[string]paths{
		"default": usual,
		"gke":     change(func(p *paths) { p.bin, p.quota = "/home/kubernetes/bin", true }),
		"openshift": change(func(p *paths) {
			p.bin, p.conf, p.chained, p.file = "/var/lib/cni/bin", "/etc/cni/multus/net.d", "false", "ztun-cni.conf"
		}),
		"k3s": change(func(p *paths) {
			p.bin, p.conf = "/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d"
		}),
		"k3d": change(func(p *paths) { p.bin, p.conf = "/bin", "/var/lib/rancher/k3s/agent/etc/cni/net.d" }),
		"microk8s": change(func(p *paths) {
			p.bin, p.conf = "/var/snap/microk8s/current/opt/cni/bin", "/var/snap/microk8s/current/args/cni-network"
		}),
		"minikube": change(func(p *paths) { p.netns = "/var/run/docker/netns" }),
	} {
		all := manifests(t, cases[name])
		proxy, agent := pods(t, cases[name])
		c := agent.Spec.Containers[0]
		env := envOf(t, all, c)
		host := func(path string) string { return mount(c, agent.Spec.Volumes, path).HostPath.Path }
		got := paths{
			host("/host/opt/cni/bin"), host("/host/etc/cni/net.d"), host("/host/var/run/netns"), env["CHAINED_CNI_PLUGIN"], env["CNI_CONF_NAME"],
			slices.ContainsFunc(all, func(m Manifest) bool { return m.Kind == "ResourceQuota" }),
		}
		if got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
		if dir := env["ZTUN_HOST_NETNS_DIR"]; dir != want.netns { // Else the runtime's paths lead nowhere.
			t.Errorf("%s: the agent is told of %q, want %q", name, dir, want.netns)
		}
		openshift := name == "openshift"
		if nad := slices.ContainsFunc(all, func(m Manifest) bool { return m.Kind == "NetworkAttachmentDefinition" }); nad != openshift {
			t.Errorf("%s: NetworkAttachmentDefinition: %v", name, nad)
		}
		for _, p := range []corev1.PodTemplateSpec{proxy, agent} {
			if s := p.Spec.Containers[0].SecurityContext.SELinuxOptions; (s != nil && s.Type == "spc_t") != openshift {
				t.Errorf("%s: SELinux options %v", name, s)
			}
		}
	}
	// What a user says wins over the platform.
	_, agent := pods(t, with(values{"global": values{"platform": "gke"}, "cni": values{"cniBinDir": "/mine"}, "resourceQuotas": values{"enabled": false}}))
	if got := mount(agent.Spec.Containers[0], agent.Spec.Volumes, "/host/opt/cni/bin").HostPath.Path; got != "/mine" {
		t.Errorf("the plugin goes to %s, want /mine", got)
	}
}

// A monitor's port is one that the pods have.
func TestMonitors(t *testing.T) {
	type monitor struct {
		Spec struct {
			Selector  struct{ MatchLabels map[string]string }
			Endpoints []struct{ Port, Path, Interval string }
			Pods      []struct{ Port, Path, Interval string } `json:"podMetricsEndpoints"`
		}
	}
	for kind, on := range map[string]string{"PodMonitor": "monitoring.podMonitor.enabled", "ServiceMonitor": "monitoring.serviceMonitor.enabled"} {
		o := with(nest(on, true))
		all := manifests(t, o)
		proxy, agent := pods(t, o)
		for name, pod := range map[string]corev1.PodTemplateSpec{"ztunnel": proxy, "istio-cni-node": agent} {
			var m monitor
			for _, x := range all {
				if x.Kind == kind && x.Name == name {
					if err := yaml.Unmarshal([]byte(x.YAML), &m); err != nil {
						t.Fatal(err)
					}
				}
			}
			endpoints, labels := m.Spec.Pods, pod.Labels
			if kind == "ServiceMonitor" {
				s := parse[corev1.Service](t, all, "Service", name)
				if s.Spec.ClusterIP != corev1.ClusterIPNone || !contains(pod.Labels, s.Spec.Selector) || s.Spec.Ports[0].Name != "http-monitoring" {
					t.Errorf("service %s: %+v", name, s.Spec)
				}
				if target := s.Spec.Ports[0].TargetPort.String(); target != pod.Spec.Containers[0].Ports[0].Name {
					t.Errorf("service %s leads to port %s", name, target)
				}
				endpoints, labels = m.Spec.Endpoints, s.Labels
			}
			if !contains(labels, m.Spec.Selector.MatchLabels) {
				t.Errorf("%s %s selects %v", kind, name, m.Spec.Selector.MatchLabels)
			}
			want := []struct{ Port, Path, Interval string }{{"http-monitoring", "/metrics", "30s"}}
			if diff := cmp.Diff(want, endpoints); diff != "" {
				t.Errorf("%s %s (-want +got):\n%s", kind, name, diff)
			}
			if got := pod.Spec.Containers[0].Ports[0].Name; got != "http-monitoring" {
				t.Errorf("%s: port %s", name, got)
			}
		}
	}
	_, err := Manifests(dir, with(values{"monitoring": values{"podMonitor": values{"enabled": true}, "serviceMonitor": values{"enabled": true}}}))
	if err == nil || !strings.Contains(err.Error(), "enable one") {
		t.Errorf("both kinds: %v", err)
	}
}

func contains(labels, selector map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return len(selector) > 0
}

// What Helm prints says what is left to do.
func TestNotes(t *testing.T) {
	text := func(o Options) string {
		files, err := render(dir, o)
		if err != nil {
			t.Fatal(err)
		}
		return files["ztun/"+notes]
	}
	const trust, privileged, hostPID = "trustedZtunnelNamespace=", "The agent is privileged", "cni.hostPID"
	plain := text(with(nil))
	for _, want := range []string{"ztun v1.0.0:", "    istio-system/ztunnel\n", "rollout status daemonset/istio-cni-node daemonset/ztunnel"} {
		if !strings.Contains(plain, want) {
			t.Errorf("no %q in\n%s", want, plain)
		}
	}
	for _, other := range []string{trust, privileged, hostPID} {
		if strings.Contains(plain, other) {
			t.Errorf("%q in\n%s", other, plain)
		}
	}
	o := cases["privileged"]
	o.Namespace = "mesh"
	special := text(o)
	for _, want := range []string{trust + "mesh and trustedZtunnelName=ztunnel", privileged, hostPID} {
		if !strings.Contains(special, want) {
			t.Errorf("no %q in\n%s", want, special)
		}
	}
}

// The two scopes are the whole.
func TestResourceScope(t *testing.T) {
	ids := func(scope string) (out []string) {
		for _, m := range manifests(t, with(values{"resourceScope": scope, "global": values{"platform": "openshift"}})) {
			out = append(out, m.Kind+"/"+m.Name)
		}
		slices.Sort(out)
		return out
	}
	cluster, namespace := ids("cluster"), ids("namespace")
	both := slices.Sorted(slices.Values(append(slices.Clone(cluster), namespace...)))
	if diff := cmp.Diff(ids("all"), both); diff != "" {
		t.Errorf("all (-) and both scopes (+):\n%s", diff)
	}
	for _, id := range cluster {
		if !strings.HasPrefix(id, "ClusterRole") {
			t.Errorf("scope cluster has %s", id)
		}
	}
	if len(cluster) == 0 || len(namespace) == 0 {
		t.Errorf("%d and %d objects", len(cluster), len(namespace))
	}
}

func TestUpdateStrategies(t *testing.T) {
	all := manifests(t, with(nil))
	proxy := parse[appsv1.DaemonSet](t, all, "DaemonSet", "ztunnel").Spec.UpdateStrategy.RollingUpdate
	if proxy.MaxSurge.String() != "1" || proxy.MaxUnavailable.String() != "0" {
		t.Errorf("proxy: %v", proxy)
	}
	agent := parse[appsv1.DaemonSet](t, all, "DaemonSet", "istio-cni-node").Spec.UpdateStrategy.RollingUpdate
	if agent.MaxSurge != nil || agent.MaxUnavailable.String() != "1" {
		t.Errorf("agent: %v", agent)
	}
}
