package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestEnrolByNamespace(t *testing.T) {
	ctx := claim(t, "a namespace's label enrols its pods, new ones and those that run")
	mesh(t)
	p := newPlace(ctx, t)
	p.run(pod{name: "old", node: "node1"})
	p.apply("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {%s}}}", p.name, ambient)
	p.enrolled("old")
	p.run(pod{name: "new", node: "node2"})
	p.enrolled("new")
	p.apply("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {}}}", p.name)
	p.left("old", "new")
}

func TestEnrolByPod(t *testing.T) {
	ctx := claim(t, "a pod's label enrols it alone")
	mesh(t)
	p := newPlace(ctx, t)
	p.run(pod{name: "in", node: "node1", labels: []string{ambient}}, pod{name: "out", node: "node1"})
	p.enrolled("in")
	p.untouched("out")
}

func TestOptOut(t *testing.T) {
	ctx := claim(t, "the label none, istio.io/ambient-skip of a pod or of its Service, hostNetwork and a sidecar keep a pod out of a labelled namespace")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.apply(`{apiVersion: v1, kind: Service, metadata: {name: skipping, namespace: %s, labels: {istio.io/ambient-skip: "true"}},
		spec: {selector: {app: behind}, ports: [{port: 80}]}}`, p.name)
	p.run(
		pod{name: "none", node: "node1", labels: []string{"istio.io/dataplane-mode: none"}},
		pod{name: "skip", node: "node1", labels: []string{`istio.io/ambient-skip: "true"`}},
		pod{name: "behind", node: "node1"},
		pod{name: "in", node: "node1"},
	)
	p.start(pod{name: "host", node: "node1", spec: "hostNetwork: true"})
	p.apply(`{apiVersion: v1, kind: Pod, metadata: {name: sidecar, namespace: %s, annotations: {sidecar.istio.io/status: "{}"}},
		spec: {nodeName: node1, containers: [{name: app, image: "e2e.test/app:1", imagePullPolicy: Never, args: [serve]}]}}`, p.name)
	p.enrolled("in")
	p.wait("the pods to run", func() error { return world.Ready(ctx, p.name, "host", "sidecar") })
	p.untouched("none", "skip", "behind", "sidecar")
	if a := p.get("host").Annotations[redirection]; a != "" {
		t.Errorf("host: annotation %s is %q", redirection, a)
	}
}

// device is what a pod of the mesh has and no other pod.
const device = "ztun0"

// untouched wants pods without any trace of the mesh.
func (p *place) untouched(names ...string) {
	p.t.Helper()
	for _, name := range names {
		o := p.get(name)
		if a, ok := o.Annotations[redirection]; ok {
			p.t.Errorf("%s: annotation %s is %q", name, redirection, a)
		}
		if links := p.links(o); strings.Contains(links, device) {
			p.t.Errorf("%s has a device of the mesh: %s", name, links)
		}
	}
}

// left waits until pods that were in the mesh are out of it, and wants no trace.
func (p *place) left(names ...string) {
	p.t.Helper()
	for _, name := range names {
		p.wait(name+" out of the mesh", func() error {
			if a, ok := p.get(name).Annotations[redirection]; ok {
				return &still{name, a}
			}
			return nil
		})
	}
	p.untouched(names...)
}

type still struct{ pod, annotation string }

func (s *still) Error() string { return s.pod + " is annotated " + s.annotation }

// links lists a pod's interfaces, as /proc/PID/net/dev of its process shows them.
func (p *place) links(o *corev1.Pod) string {
	p.t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", p.process(o), "net/dev"))
	if err != nil {
		p.t.Fatal(err)
	}
	return string(text)
}

// process is the pid of some process of a pod.
func (p *place) process(o *corev1.Pod) string {
	p.t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		p.t.Fatal(err)
	}
	for _, file := range found {
		if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), string(o.UID)) {
			return filepath.Base(filepath.Dir(file))
		}
	}
	p.t.Fatalf("%s has no process", o.Name)
	return ""
}
