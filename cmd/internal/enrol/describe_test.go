package enrol

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/ztun/ztun/cmd/internal/agent"
)

func TestDescribeTakesAnnotations(t *testing.T) {
	for _, tt := range []struct {
		name        string
		global      bool // DNS capture.
		annotations []string
		want        agent.Pod
	}{
		{name: "none"},
		{name: "dns by default", global: true, want: agent.Pod{DNSCapture: true}},
		{name: "dns on", annotations: []string{dnsAnnotation, "true"}, want: agent.Pod{DNSCapture: true}},
		{name: "dns off", global: true, annotations: []string{dnsAnnotation, "false"}},
		{name: "dns no word", global: true, annotations: []string{dnsAnnotation, "off"}, want: agent.Pod{DNSCapture: true}},
		{name: "ingress", annotations: []string{bypassAnnotation, "T"}, want: agent.Pod{BypassInbound: true}},
		{name: "ingress no word", annotations: []string{bypassAnnotation, "yes"}},
		{name: "interfaces", annotations: []string{interfacesAnnotation, " veth1 ,br0,,br0"}, want: agent.Pod{VirtualInterfaces: []string{"br0", "veth1"}}},
		{name: "interfaces that cannot be", annotations: []string{interfacesAnnotation, "lo,ztun0,a/b,br0,name-of-16-bytes"}, want: agent.Pod{VirtualInterfaces: []string{"br0"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := decider(t, Config{DNSCapture: tt.global}).describe(annotated(pod("a", "u"), tt.annotations...), known{})
			if got.DNSCapture != tt.want.DNSCapture || got.BypassInbound != tt.want.BypassInbound || !slices.Equal(got.VirtualInterfaces, tt.want.VirtualInterfaces) {
				t.Errorf("describe = %+v, want %+v", got, tt.want)
			}
		})
	}
	p := pod("a", "u")
	p.Spec.ServiceAccountName = ""
	if got := decider(t, Config{}).describe(p, known{}).ServiceAccount; got != "default" {
		t.Errorf("service account %q", got)
	}
}

func TestStatusAddresses(t *testing.T) {
	for _, tt := range []struct {
		ips  []string
		ip   string
		want string
	}{
		{want: "[]"},
		{ip: "10.0.0.2", want: "[10.0.0.2]"},
		{ips: []string{"fd00::2", "10.0.0.2"}, ip: "fd00::2", want: "[10.0.0.2 fd00::2]"},
		{ips: []string{"::ffff:10.0.0.2", "10.0.0.2"}, want: "[10.0.0.2]"},
		{ips: []string{"", "nonsense", "127.0.0.1", "::", "fe80::1%eth0", "224.0.0.1", "10.0.0.2"}, want: "[10.0.0.2]"},
	} {
		p := pod("a", "u", tt.ips...)
		p.Status.PodIP = tt.ip
		if got := fmt.Sprint(statusAddresses(p)); got != tt.want {
			t.Errorf("statusAddresses(%q, %q) = %s, want %s", tt.ips, tt.ip, got, tt.want)
		}
	}
}

func TestTargetNamesContainers(t *testing.T) {
	p := annotated(pod("a", "u"), corev1.MirrorPodAnnotationKey, "hash")
	p.Status.InitContainerStatuses = []corev1.ContainerStatus{{ContainerID: "cri-o://i"}, {}}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{ContainerID: "containerd://c"}, {ContainerID: "odd"}}
	got := target(p, addrs("10.0.0.2"))
	if got.UID != "hash" || !slices.Equal(got.Containers, []string{"i", "c"}) || len(got.Addresses) != 1 {
		t.Errorf("target = %+v", got)
	}
}

func TestProbePorts(t *testing.T) {
	number, name := intstr.FromInt32, intstr.FromString
	get := func(port intstr.IntOrString) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: port}}}
	}
	tcp := func(port intstr.IntOrString) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: port}}}
	}
	grpc := func(port int32) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: port}}}
	}
	always := corev1.ContainerRestartPolicyAlways
	ports := []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}, {ContainerPort: 9}, {Name: "admin", ContainerPort: 9090}}
	for _, tt := range []struct {
		name string
		spec corev1.PodSpec
		want []uint16
	}{
		{"none", corev1.PodSpec{Containers: []corev1.Container{{Ports: ports}}}, nil},
		{"all three kinds", corev1.PodSpec{Containers: []corev1.Container{{LivenessProbe: get(number(80)), ReadinessProbe: tcp(number(70)), StartupProbe: grpc(60)}}}, []uint16{60, 70, 80}},
		{"once each", corev1.PodSpec{Containers: []corev1.Container{{LivenessProbe: get(number(80))}, {ReadinessProbe: tcp(number(80))}}}, []uint16{80}},
		{"named", corev1.PodSpec{Containers: []corev1.Container{{Ports: ports, LivenessProbe: get(name("admin")), ReadinessProbe: tcp(name("http"))}}}, []uint16{8080, 9090}},
		{"name of another container", corev1.PodSpec{Containers: []corev1.Container{{Ports: ports}, {LivenessProbe: get(name("http"))}}}, nil},
		{"name that is a number", corev1.PodSpec{Containers: []corev1.Container{{LivenessProbe: get(name("80"))}}}, nil},
		{"out of range", corev1.PodSpec{Containers: []corev1.Container{{LivenessProbe: get(number(0)), ReadinessProbe: tcp(number(65536)), StartupProbe: grpc(-1)}}}, nil},
		{"sidecar", corev1.PodSpec{InitContainers: []corev1.Container{{RestartPolicy: &always, StartupProbe: tcp(number(7))}}}, []uint16{7}},
		{"init container", corev1.PodSpec{InitContainers: []corev1.Container{{StartupProbe: tcp(number(7))}}}, nil},
		{"exec", corev1.PodSpec{Containers: []corev1.Container{{LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{}}}}}}, nil},
		{"another host", corev1.PodSpec{Containers: []corev1.Container{{LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{
			HTTPGet: &corev1.HTTPGetAction{Host: "example.org", Port: number(80)}}}}}}, nil},
		{"lifecycle hooks", corev1.PodSpec{Containers: []corev1.Container{{Ports: ports, Lifecycle: &corev1.Lifecycle{
			PostStart: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: name("http")}},
			PreStop:   &corev1.LifecycleHandler{Exec: &corev1.ExecAction{}}}}}}, []uint16{8080}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := probePorts(&corev1.Pod{Spec: tt.spec}); !slices.Equal(got, tt.want) {
				t.Errorf("probePorts = %v, want %v", got, tt.want)
			}
		})
	}
	var many corev1.PodSpec
	for i := range 2 * maxProbePorts {
		many.Containers = append(many.Containers, corev1.Container{LivenessProbe: tcp(number(int32(i + 1)))})
	}
	if got := probePorts(&corev1.Pod{Spec: many}); len(got) != maxProbePorts {
		t.Errorf("%d ports, want %d", len(got), maxProbePorts)
	}
}
