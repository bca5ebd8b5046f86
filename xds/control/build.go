package control

import (
	"net/netip"
	"slices"
	"strings"
)

// builder turns the objects of one directory into a World, and finds what does
// not fit together. It lives for one reading.
type builder struct {
	mesh          Mesh
	set           *objects
	ps            *problems
	embedderAddrs func(namespace, name string) []netip.Addr
	network       string

	owners   map[netip.Addr]*object // of pod addresses and service addresses
	services []*builtService
	pods     []*builtPod
	podsWith map[podLabel][]*builtPod // those that are served
	servedBy map[*builtPod][]*builtService
	world    *World
}

// podLabel is a label of pods in one namespace.
type podLabel struct{ ns, name, value string }

// builtPod is a pod that is served, or that runs without an address.
type builtPod struct {
	*pod
	addrs    []netip.Addr
	enrolled bool
	policies []string
}

func (p *builtPod) served() bool { return len(p.addrs) > 0 }

// build makes the world that the objects describe. What is returned means
// nothing if a problem is more than a warning.
func build(cfg Config, set *objects, ps *problems, addresses *addressBook) *World {
	b := &builder{
		mesh: cfg.Mesh, set: set, ps: ps, embedderAddrs: cfg.PodAddrs,
		owners:   make(map[netip.Addr]*object),
		podsWith: make(map[podLabel][]*builtPod),
		servedBy: make(map[*builtPod][]*builtService),
		world:    newWorld(cfg.Mesh),
	}
	if b.network = b.mesh.Network; b.network == "" {
		b.network = b.namespaceLabels(b.mesh.RootNamespace)[networkLabel]
	}
	b.checkNamespaces()
	b.collectPods()
	b.collectServices(addresses)
	b.convertPolicies()
	b.emit()
	set.counts.Addresses = b.world.size(typeAddress)
	set.counts.Authorizations = b.world.size(typeAuthorization)
	return b.world
}

// checkNamespaces names what uses a namespace that nobody has made. Kubernetes
// would refuse it; here it counts as one without labels.
func (b *builder) checkNamespaces() {
	known := map[string]bool{"default": true, "kube-system": true, b.mesh.RootNamespace: true}
	for name, ns := range sorted(b.set.namespaces) {
		known[name] = true
		b.refuseWaypoint(&ns.object)
	}
	for _, key := range slices.Sorted(keysOf(b.set.seen)) {
		o := b.set.seen[key]
		if o.ns == "" || known[o.ns] {
			continue
		}
		known[o.ns] = true
		o.warnf(path{"metadata", "namespace"}, "there is no Namespace %s; it counts as one without labels", o.ns)
	}
}

// refuseWaypoint refuses objects that must be reached through a waypoint:
// sending the traffic past it would skip what it enforces.
func (b *builder) refuseWaypoint(o *object) {
	const useWaypoint = "istio.io/use-waypoint"
	if v, ok := o.meta.Labels[useWaypoint]; ok && v != "none" {
		o.errorf(path{"metadata", "labels", useWaypoint}, "waypoints are not served by this control plane")
	}
}

// own notes whose address it is, and names both when it has an owner already.
func (b *builder) own(addr netip.Addr, o *object, field path) {
	if first, ok := b.owners[addr]; ok {
		o.errorf(field, "%v is the address of %s %s too, at %s", addr, first.kind, first.key(), first.where())
		return
	}
	b.owners[addr] = o
}

func (b *builder) collectPods() {
	for _, p := range b.set.pods {
		b.refuseWaypoint(&p.object)
		checkContainerPorts(p)
		if isOver(p.Pod) {
			continue
		}
		built := &builtPod{pod: p, addrs: b.podAddrs(p), enrolled: b.enrolled(p)}
		for _, a := range built.addrs {
			if !p.Spec.HostNetwork {
				b.own(a, &p.object, path{"status"})
			}
		}
		switch {
		case !built.served():
			p.warnf(nil, "is not served: it has neither status.podIPs nor the annotation %s", podIPsAnnotation)
		case p.Spec.NodeName == "" && built.enrolled:
			p.warnf(path{"spec"}, "spec.nodeName is missing: no proxy gets a certificate for it")
		}
		if built.enrolled {
			b.set.counts.Enrolled++
		}
		b.pods = append(b.pods, built)
		if built.served() {
			for name, value := range p.Labels {
				l := podLabel{p.ns, name, value}
				b.podsWith[l] = append(b.podsWith[l], built)
			}
		}
	}
}

// emit puts every resource into the world.
func (b *builder) emit() {
	for _, s := range b.services {
		b.world.addService(s.wire(b), s)
	}
	for _, p := range b.pods {
		place := PodPlace{Namespace: p.ns, Name: p.Name, ServiceAccount: serviceAccount(p.Pod), Node: p.Spec.NodeName, Addrs: p.addrs, Enrolled: p.enrolled}
		b.world.addPlace(place)
		if p.served() {
			b.world.addWorkload(b.workload(p))
		}
	}
	b.world.finish()
}

func keysOf[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// hostname is a Service's name in DNS.
func (m Mesh) hostname(namespace, name string) string {
	return strings.Join([]string{name, namespace, "svc", m.ClusterDomain}, ".")
}
