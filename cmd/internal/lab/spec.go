package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"
	corev1 "k8s.io/api/core/v1"

	"github.com/ztun/ztun/xds/control"
)

// A spec is what a directory of YAML describes, placed and addressed.
type spec struct {
	nodes    []string // Sorted; a node's index is its place here.
	pods     []*podSpec
	services []*corev1.Service
	rendered []byte // What the control plane is to serve, as one file.
	world    *control.World
}

// A podSpec is one pod of a spec.
type podSpec struct {
	Namespace, Name, Account, Node string
	Addrs                          []netip.Addr
	Enrolled                       bool
	Pod                            *corev1.Pod
}

func (p *podSpec) key() string { return p.Namespace + "/" + p.Name }

func (p *podSpec) hostNetwork() bool { return p.Pod.Spec.HostNetwork }

// An addresser gives a pod its addresses. The same pod gets the same ones
// again.
type addresser func(p *podSpec) ([]netip.Addr, error)

// defaultNode is where pods without a nodeName go when no pod has one.
const defaultNode = "node1"

// load reads a directory. Its errors name file, line and field.
func load(dir string, mesh control.Mesh, address addresser) (*spec, error) {
	// The control plane's own reading comes first: it names what is wrong
	// where the user wrote it.
	_, seen := control.Check(control.Config{Dir: dir, Mesh: mesh})
	if err := seen.Err(); err != nil {
		return nil, fmt.Errorf("lab: %s: %w", dir, err)
	}
	s := &spec{}
	documents, err := readDir(dir)
	if err != nil {
		return nil, err
	}
	for _, d := range documents {
		if err := s.take(d); err != nil {
			return nil, err
		}
	}
	if err := s.place(address); err != nil {
		return nil, err
	}
	if err := s.render(documents); err != nil {
		return nil, err
	}
	world, report := control.Check(control.Config{Static: control.NewStatic(map[string]string{renderedFile: string(s.rendered)}), Mesh: mesh})
	if err := report.Err(); err != nil {
		return nil, fmt.Errorf("lab: %s, after pods were placed: %w", dir, err)
	}
	s.world = world
	enrolled := map[string]bool{}
	for _, p := range world.Pods() {
		enrolled[p.Namespace+"/"+p.Name] = p.Enrolled
	}
	for _, p := range s.pods {
		p.Enrolled = enrolled[p.key()]
	}
	return s, nil
}

// A document is one YAML document of a file.
type document struct {
	file    string // Relative to the directory.
	line    int
	object  map[string]any
	podSpec *podSpec
}

func (d document) errorf(format string, args ...any) error {
	return fmt.Errorf("lab: %s:%d: %w", d.file, d.line, fmt.Errorf(format, args...))
}

// readDir returns the documents of a directory's YAML and JSON files, those
// of a List each for itself.
func readDir(dir string) ([]*document, error) {
	var documents []*document
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)) {
			return nil
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		found, err := readFile(name, content)
		documents = append(documents, found...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("lab: read %s: %w", dir, err)
	}
	return documents, nil
}

func readFile(name string, content []byte) ([]*document, error) {
	var documents []*document
	for dec := yaml.NewDecoder(bytes.NewReader(content)); ; {
		var node yaml.Node
		err := dec.Decode(&node)
		if errors.Is(err, io.EOF) {
			return documents, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		var object map[string]any
		if err := node.Decode(&object); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, node.Line, err)
		}
		if object == nil {
			continue
		}
		line := node.Line
		if len(node.Content) > 0 {
			line = node.Content[0].Line
		}
		items, isList := object["items"].([]any)
		if kind, _ := object["kind"].(string); !isList || !strings.HasSuffix(kind, "List") {
			documents = append(documents, &document{file: name, line: line, object: object})
			continue
		}
		for _, item := range items {
			if inner, ok := item.(map[string]any); ok {
				documents = append(documents, &document{file: name, line: line, object: inner})
			}
		}
	}
}

// take keeps what the lab itself needs of a document.
func (s *spec) take(d *document) error {
	kind, _ := d.object["kind"].(string)
	switch kind {
	case "Pod":
		pod := &corev1.Pod{}
		if err := convert(d.object, pod); err != nil {
			return d.errorf("%w", err)
		}
		if err := runnable(pod); err != nil {
			return d.errorf("pod %s: %w", pod.Name, err)
		}
		if pod.Namespace == "" {
			pod.Namespace = "default"
		}
		d.podSpec = &podSpec{Namespace: pod.Namespace, Name: pod.Name, Account: pod.Spec.ServiceAccountName, Node: pod.Spec.NodeName, Pod: pod}
		if d.podSpec.Account == "" {
			d.podSpec.Account = "default"
		}
		s.pods = append(s.pods, d.podSpec)
	case "Service":
		service := &corev1.Service{}
		if err := convert(d.object, service); err != nil {
			return d.errorf("%w", err)
		}
		if service.Namespace == "" {
			service.Namespace = "default"
		}
		s.services = append(s.services, service)
	}
	return nil
}

// runnable says why a pod cannot be made of processes.
func runnable(pod *corev1.Pod) error {
	if len(pod.Spec.Containers) == 0 {
		return errors.New("spec.containers: a pod needs one")
	}
	for i, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if len(c.Command) == 0 {
			return fmt.Errorf("container %d (%s): command: the lab runs processes, not images; say what to run", i, c.Name)
		}
	}
	return nil
}

// place gives each pod its node and addresses.
func (s *spec) place(address addresser) error {
	for _, p := range s.pods {
		if p.Node != "" && !slices.Contains(s.nodes, p.Node) {
			s.nodes = append(s.nodes, p.Node)
		}
	}
	slices.Sort(s.nodes)
	if len(s.nodes) == 0 {
		s.nodes = []string{defaultNode}
	}
	for _, p := range s.pods {
		if p.Node == "" {
			p.Node = s.nodes[0]
		}
	}
	byNode := slices.Clone(s.pods)
	slices.SortStableFunc(byNode, func(a, b *podSpec) int { return strings.Compare(a.Node, b.Node) })
	for _, p := range byNode {
		addrs, err := address(p)
		if err != nil {
			return fmt.Errorf("%w (pod %s)", err, p.key())
		}
		p.Addrs = addrs
	}
	return nil
}

// renderedFile is all that the control plane finds in its directory: one
// file, so that a change to many objects is one change.
const renderedFile = "lab.yaml"

// render writes the documents as the control plane is to see them: pods with
// the node and the addresses that they have here.
func (s *spec) render(documents []*document) error {
	for _, d := range documents {
		if p := d.podSpec; p != nil {
			set(d.object, p.Node, "spec", "nodeName")
			ips := make([]any, 0, len(p.Addrs))
			for _, a := range p.Addrs {
				ips = append(ips, map[string]any{"ip": a.String()})
			}
			set(d.object, ips, "status", "podIPs")
			set(d.object, p.Addrs[0].String(), "status", "podIP")
		}
		text, err := json.MarshalIndent(d.object, "", "  ")
		if err != nil {
			return d.errorf("%w", err)
		}
		s.rendered = append(s.rendered, fmt.Sprintf("---\n%s\n", text)...)
	}
	return nil
}

// set puts value at a path of nested maps.
func set(object map[string]any, value any, path ...string) {
	for _, key := range path[:len(path)-1] {
		inner, ok := object[key].(map[string]any)
		if !ok {
			inner = map[string]any{}
			object[key] = inner
		}
		object = inner
	}
	object[path[len(path)-1]] = value
}

// convert fills a typed object from an untyped one.
func convert(from map[string]any, to any) error {
	text, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, to)
}

// servicePods returns the addresses of the pods that a service selects.
func (s *spec) servicePods(namespace, name string) []netip.Addr {
	var addrs []netip.Addr
	for _, svc := range s.services {
		if svc.Namespace != namespace || svc.Name != name || len(svc.Spec.Selector) == 0 {
			continue
		}
		for _, p := range s.pods {
			if p.Namespace == namespace && selects(svc.Spec.Selector, p.Pod.Labels) {
				addrs = append(addrs, p.Addrs...)
			}
		}
	}
	return addrs
}

func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}
