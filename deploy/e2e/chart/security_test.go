package chart

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

// parse reads the one object of a kind and a name.
func parse[T any](t *testing.T, all []Manifest, kind, name string) *T {
	t.Helper()
	for _, m := range all {
		if m.Kind == kind && (name == "" || m.Name == name) {
			object := new(T)
			if err := yaml.UnmarshalStrict([]byte(m.YAML), object); err != nil {
				t.Fatal(err)
			}
			return object
		}
	}
	t.Fatalf("there is no %s %s", kind, name)
	return nil
}

// pods are the templates of the proxy and the agent.
func pods(t *testing.T, o Options) (proxy, agent corev1.PodTemplateSpec) {
	t.Helper()
	all := manifests(t, o)
	name := "ztunnel"
	if s, ok := o.Values["resourceName"].(string); ok {
		name = s
	}
	return parse[appsv1.DaemonSet](t, all, "DaemonSet", name).Spec.Template,
		parse[appsv1.DaemonSet](t, all, "DaemonSet", "istio-cni-node").Spec.Template
}

func TestProxyHasNoPrivilege(t *testing.T) {
	for name, o := range cases {
		t.Run(name, func(t *testing.T) {
			proxy, _ := pods(t, o)
			p := proxy.Spec
			if p.HostNetwork || p.HostPID || p.HostIPC || p.ShareProcessNamespace != nil || len(p.InitContainers) > 0 || len(p.Containers) != 1 {
				t.Errorf("the pod is not one container in namespaces of its own")
			}
			if p.AutomountServiceAccountToken == nil || *p.AutomountServiceAccountToken {
				t.Error("it gets a token for the API of Kubernetes")
			}
			c := p.Containers[0]
			if c.Name != "istio-proxy" {
				t.Errorf("container %s, want istio-proxy", c.Name)
			}
			s := c.SecurityContext
			if *s.Privileged || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !*s.RunAsNonRoot {
				t.Errorf("security context %v", s)
			}
			want := &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}
			if diff := cmp.Diff(want, s.Capabilities); diff != "" {
				t.Errorf("capabilities (-want +got):\n%s", diff)
			}
			if s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || s.ProcMount != nil || s.RunAsUser != nil {
				t.Errorf("security context %v", s)
			}
			if u := p.SecurityContext; *u.RunAsUser == 0 || *u.RunAsGroup == 0 || *u.FSGroup != *u.RunAsGroup || !*u.RunAsNonRoot || len(u.Sysctls) > 0 {
				t.Errorf("security context of the pod %v", u)
			}
			for _, v := range p.Volumes {
				if v.HostPath != nil && v.HostPath.Path != "/var/run/ztunnel" {
					t.Errorf("the host's %s is mounted", v.HostPath.Path)
				}
			}
			for _, m := range c.VolumeMounts {
				if !m.ReadOnly && m.Name != "tmp" && m.Name != "more" {
					t.Errorf("%s is writable", m.MountPath)
				}
			}
		})
	}
}

func TestAgentHasTheLeastPrivileges(t *testing.T) {
	for name, o := range cases {
		t.Run(name, func(t *testing.T) {
			_, agent := pods(t, o)
			if len(agent.Spec.Containers) != 1 || len(agent.Spec.InitContainers) > 0 {
				t.Fatal("the pod is not one container")
			}
			asked := name == "privileged"
			if agent.Spec.HostNetwork != asked || agent.Spec.HostPID != asked || agent.Spec.HostIPC {
				t.Errorf("host namespaces: network %v, PIDs %v", agent.Spec.HostNetwork, agent.Spec.HostPID)
			}
			s := agent.Spec.Containers[0].SecurityContext
			if *s.Privileged != asked || !*s.ReadOnlyRootFilesystem || *s.RunAsUser != 0 {
				t.Errorf("security context %v", s)
			}
			if asked {
				// The API refuses both for privileged containers.
				if s.AllowPrivilegeEscalation != nil || s.SeccompProfile != nil {
					t.Errorf("security context %v", s)
				}
				return
			}
			want := &corev1.Capabilities{
				Drop: []corev1.Capability{"ALL"},
				Add:  []corev1.Capability{"SYS_ADMIN", "NET_ADMIN", "NET_RAW", "SYS_PTRACE", "DAC_OVERRIDE", "CHOWN"},
			}
			if diff := cmp.Diff(want, s.Capabilities); diff != "" {
				t.Errorf("capabilities (-want +got):\n%s", diff)
			}
			if *s.AllowPrivilegeEscalation {
				t.Error("privileges may grow")
			}
			_, annotated := agent.Annotations["container.apparmor.security.beta.kubernetes.io/install-cni"]
			if (s.AppArmorProfile == nil) != annotated {
				t.Errorf("AppArmor: field %v, annotation %v", s.AppArmorProfile, annotated)
			}
		})
	}
}

// Each capability of the agent has its reason above it.
func TestCapabilitiesAreJustified(t *testing.T) {
	text, err := os.ReadFile(dir + "/templates/agent-daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	added := regexp.MustCompile(`^ +- [A-Z_]+$`)
	n := 0
	for i, line := range lines {
		if added.MatchString(line) {
			n++
			if !strings.HasPrefix(strings.TrimSpace(lines[i-1]), "#") {
				t.Errorf("%s has no reason", strings.TrimSpace(line))
			}
		}
	}
	if n != 6 {
		t.Errorf("%d capabilities, want 6", n)
	}
}

// Neither is enrolled, whatever its namespace says, nor gets a sidecar.
func TestBothAreOutOfTheMesh(t *testing.T) {
	for name, o := range cases {
		proxy, agent := pods(t, o)
		for _, p := range []corev1.PodTemplateSpec{proxy, agent} {
			if p.Labels["istio.io/dataplane-mode"] != "none" || p.Labels["sidecar.istio.io/inject"] != "false" {
				t.Errorf("%s: labels %v", name, p.Labels)
			}
		}
		if proxy.Labels["app"] != "ztunnel" || agent.Labels["k8s-app"] != "istio-cni-node" {
			t.Errorf("%s: labels %v and %v", name, proxy.Labels, agent.Labels)
		}
	}
}

// Roles name what may be done, and nothing by "*".
func TestRolesAreLeast(t *testing.T) {
	for name, o := range cases {
		bound := map[string]bool{}
		var got []string
		for _, m := range manifests(t, o) {
			switch m.Kind {
			case "ClusterRole", "Role":
				r := parse[rbacv1.ClusterRole](t, []Manifest{m}, m.Kind, m.Name)
				for _, rule := range r.Rules {
					got = append(got, m.Name+": "+strings.Join(rule.Verbs, " ")+" "+strings.Join(rule.Resources, " ")+" "+strings.Join(rule.ResourceNames, " "))
				}
			case "ClusterRoleBinding", "RoleBinding":
				for _, s := range parse[rbacv1.ClusterRoleBinding](t, []Manifest{m}, m.Kind, m.Name).Subjects {
					bound[s.Name] = true
				}
			}
		}
		slices.Sort(got)
		want := []string{
			"istio-cni-ambient: patch pods/status ",
			"istio-cni: get daemonsets istio-cni-node",
			"istio-cni: get nodes ",
			"istio-cni: list watch pods namespaces services ",
		}
		accounts := 1
		if name == "openshift" {
			want = append(want, "istio-cni: use securitycontextconstraints privileged", "ztunnel: use securitycontextconstraints privileged")
			accounts = 2
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: rules (-want +got):\n%s", name, diff)
		}
		if len(bound) != accounts || !bound["istio-cni"] {
			t.Errorf("%s: roles are bound to %v", name, bound)
		}
	}
}
