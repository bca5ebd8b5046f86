package control

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"gopkg.in/yaml.v3"
	securityv1 "istio.io/api/security/v1beta1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// object is what every object has: its place, its metadata.
type object struct {
	*document
	kind string
	meta *metav1.ObjectMeta
	ns   string // empty for what has no namespace
	at   path   // of the object inside its document: empty, or items[i] of a List
}

func (o *object) name() string { return o.meta.Name }

// key is namespace/name.
func (o *object) key() string { return o.ns + "/" + o.meta.Name }

// errorf and warnf take fields relative to the object.
func (o *object) errorf(p path, format string, args ...any) {
	o.document.errorf(o.at.of(p...), format, args...)
}

func (o *object) warnf(p path, format string, args ...any) {
	o.document.warnf(o.at.of(p...), format, args...)
}

// find returns the node of a field of the object, nil when there is none.
func (o *object) find(p path) *yaml.Node { return o.document.find(o.at.of(p...)) }

// where is file:line, to be named in another object's problem.
func (o *object) where() string { return fmt.Sprintf("%s:%d", o.file, o.document.line(o.at)) }

type pod struct {
	object
	*corev1.Pod
}

type service struct {
	object
	*corev1.Service
}

type namespace struct {
	object
	*corev1.Namespace
}

type node struct {
	object
	*corev1.Node
}

type authorizationPolicy struct {
	object
	spec *securityv1.AuthorizationPolicy
}

type peerAuthentication struct {
	object
	spec *securityv1.PeerAuthentication
}

// objects is a directory as read, each kind by namespace and name.
type objects struct {
	pods       []*pod
	services   []*service
	namespaces map[string]*namespace
	nodes      map[string]*node
	policies   []*authorizationPolicy
	peerAuths  []*peerAuthentication
	counts     Counts
	seen       map[string]*object // by kind and key
}

// readObjects understands every file it is given. What it cannot use is a problem.
func readObjects(files map[string][]byte, ps *problems) *objects {
	set := &objects{
		namespaces: make(map[string]*namespace),
		nodes:      make(map[string]*node),
		seen:       make(map[string]*object),
	}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		set.counts.Files++
		for _, d := range parseFile(name, files[name], ps) {
			set.read(d, nil, d.root, 0)
		}
	}
	slices.SortFunc(set.pods, func(a, b *pod) int { return strings.Compare(a.key(), b.key()) })
	slices.SortFunc(set.services, func(a, b *service) int { return strings.Compare(a.key(), b.key()) })
	slices.SortFunc(set.policies, func(a, b *authorizationPolicy) int { return strings.Compare(a.key(), b.key()) })
	slices.SortFunc(set.peerAuths, func(a, b *peerAuthentication) int { return strings.Compare(a.key(), b.key()) })
	return set
}

// read takes one object, or each object of a List.
func (set *objects) read(d *document, at path, n *yaml.Node, depth int) {
	if n.Kind != yaml.MappingNode {
		d.errorf(at, "must be an object with apiVersion and kind, is %s", kindOf(n))
		return
	}
	version, kind := text(n, "apiVersion"), text(n, "kind")
	if version == "" || kind == "" {
		d.errorf(at, "apiVersion and kind are needed")
		return
	}
	if version == "v1" && kind == "List" && depth == 0 {
		if _, items := lookup(n, "items"); items != nil {
			d.eachItem(at.of("items"), items, func(p path, item *yaml.Node) { set.read(d, p, item, depth+1) })
		}
		return
	}
	o := object{document: d, kind: kind, at: at}
	group, _, grouped := strings.Cut(version, "/")
	switch {
	case !grouped && isCore(kind):
		if version != "v1" {
			d.errorf(at.of("apiVersion"), "%s is known in v1, not in %s", kind, version)
			return
		}
		set.readCore(o, n)
	case group == "security.istio.io" && (kind == "AuthorizationPolicy" || kind == "PeerAuthentication"):
		if version != group+"/v1" && version != group+"/v1beta1" {
			d.errorf(at.of("apiVersion"), "%s is known in v1 and v1beta1, not in %s", kind, version)
			return
		}
		set.readPolicy(o, n)
	case misspelt(version, group, kind):
		d.errorf(at, "%s %s is not known: Pod, Service, Namespace, Node and ServiceAccount are v1, AuthorizationPolicy and PeerAuthentication security.istio.io/v1", kind, version)
	default:
		set.counts.Ignored++
		d.warnf(at, "%s %s is ignored: this control plane does not serve it", kind, version)
	}
}

func isCore(kind string) bool {
	switch kind {
	case "Pod", "Service", "Namespace", "Node", "ServiceAccount":
		return true
	}
	return false
}

// misspelt tells what was meant for this control plane from what is another's:
// a policy with a typing error must not pass for something to ignore.
func misspelt(version, group, kind string) bool {
	if group == "security.istio.io" {
		return kind != "RequestAuthentication"
	}
	for _, k := range []string{"AuthorizationPolicy", "PeerAuthentication"} {
		if strings.EqualFold(kind, k) {
			return true
		}
	}
	for _, k := range []string{"Pod", "Service", "Namespace", "Node", "ServiceAccount"} {
		if strings.EqualFold(kind, k) && kind != k && version == "v1" {
			return true
		}
	}
	return false
}

func (set *objects) readCore(o object, n *yaml.Node) {
	switch o.kind {
	case "Pod":
		v := &corev1.Pod{}
		if o.meta = &v.ObjectMeta; o.decode(o.at, n, v) && set.admit(&o) {
			set.pods = append(set.pods, &pod{o, v})
			set.counts.Pods++
		}
	case "Service":
		v := &corev1.Service{}
		if o.meta = &v.ObjectMeta; o.decode(o.at, n, v) && set.admit(&o) {
			set.services = append(set.services, &service{o, v})
			set.counts.Services++
		}
	case "Namespace":
		v := &corev1.Namespace{}
		if o.meta = &v.ObjectMeta; o.decode(o.at, n, v) && set.admit(&o) {
			set.namespaces[v.Name] = &namespace{o, v}
		}
	case "Node":
		v := &corev1.Node{}
		if o.meta = &v.ObjectMeta; o.decode(o.at, n, v) && set.admit(&o) {
			set.nodes[v.Name] = &node{o, v}
		}
	case "ServiceAccount": // its name in a Pod is all that counts
		v := &corev1.ServiceAccount{}
		if o.meta = &v.ObjectMeta; o.decode(o.at, n, v) {
			set.admit(&o)
		}
	}
}

// readPolicy takes an object whose spec is a message of the Istio API. Its
// status is istiod's, and of no interest here.
func (set *objects) readPolicy(o object, n *yaml.Node) {
	ap, pa := &securityv1.AuthorizationPolicy{}, &securityv1.PeerAuthentication{}
	var spec proto.Message = ap
	if o.kind == "PeerAuthentication" {
		spec = pa
	}
	o.meta = &metav1.ObjectMeta{}
	ok := true
	o.eachEntry(o.at, n, func(p path, key, v *yaml.Node) {
		switch key.Value {
		case "apiVersion", "kind", "status":
		case "metadata":
			ok = o.decode(p, v, o.meta) && ok
		case "spec":
			ok = o.decodeProto(p, v, spec) && ok
		default:
			o.document.errorf(p, "unknown field")
			ok = false
		}
	})
	if !ok || !set.admit(&o) {
		return
	}
	set.counts.Policies++
	if o.kind == "PeerAuthentication" {
		set.peerAuths = append(set.peerAuths, &peerAuthentication{o, pa})
	} else {
		set.policies = append(set.policies, &authorizationPolicy{o, ap})
	}
}

// admit checks the metadata, fills in the namespace, and finds duplicates.
func (set *objects) admit(o *object) bool {
	before := len(o.ps.list)
	meta := path{"metadata"}
	if o.kind != "Namespace" && o.kind != "Node" {
		if o.ns = o.meta.Namespace; o.ns == "" {
			o.ns = "default"
		}
		for _, msg := range validation.IsDNS1123Label(o.ns) {
			o.errorf(meta.of("namespace"), "%q is no namespace: %s", o.ns, msg)
		}
		o.meta.Namespace = o.ns
	} else if o.meta.Namespace != "" {
		o.errorf(meta.of("namespace"), "a %s has no namespace", o.kind)
	}
	check := validation.IsDNS1123Subdomain
	switch o.kind {
	case "Service":
		check = validation.IsDNS1035Label
	case "Namespace":
		check = validation.IsDNS1123Label
	}
	if o.meta.Name == "" {
		o.errorf(meta.of("name"), "a name is needed")
	} else {
		for _, msg := range check(o.meta.Name) {
			o.errorf(meta.of("name"), "%q is no name: %s", o.meta.Name, msg)
		}
	}
	o.checkLabels(meta.of("labels"), o.meta.Labels)
	if first, ok := set.seen[o.kind+" "+o.key()]; ok {
		o.errorf(meta.of("name"), "%s %s is defined a second time; the first is at %s", o.kind, o.meta.Name, first.where())
	} else {
		set.seen[o.kind+" "+o.key()] = o
	}
	return len(o.ps.list) == before
}

// checkLabels finds labels that Kubernetes would not take.
func (o *object) checkLabels(p path, labels map[string]string) {
	for k, v := range sorted(labels) {
		for _, msg := range validation.IsQualifiedName(k) {
			o.errorf(p.of(k), "is no label: %s", msg)
		}
		for _, msg := range validation.IsValidLabelValue(v) {
			o.errorf(p.of(k), "%q is no label value: %s", v, msg)
		}
	}
}

// matches says whether a selector's labels are all among an object's.
func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
