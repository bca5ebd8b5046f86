package control

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

const (
	typeAddress       = "type.googleapis.com/istio.workload.Address"
	typeAuthorization = "type.googleapis.com/istio.security.Authorization"
)

// resource is one thing as it goes on the wire.
type resource struct {
	name    string
	aliases []string // network/ip
	version string   // changes when and only when the body does
	body    *anypb.Any
}

// World is one consistent state of the mesh, ready to be served. Immutable.
type World struct {
	mesh      Mesh
	resources map[string]map[string]*resource // by type, then name
	names     map[string][]string             // by type, sorted

	byAlias    map[string]string   // network/ip -> name of a workload, or else of a service
	endpoints  map[string][]string // service -> uids of its workloads
	byNode     map[string][]string // node -> uids
	identities map[string]map[identityKey]bool

	services []ServiceAddress
	places   []PodPlace
	wire     struct { // as served, for tests and the curious
		workloads      []*workloadapi.Workload
		services       []*workloadapi.Service
		authorizations []*securityapi.Authorization
	}
}

// identityKey is a workload identity within the mesh's trust domain.
type identityKey struct{ namespace, serviceAccount string }

func newWorld(mesh Mesh) *World {
	return &World{
		mesh: mesh,
		resources: map[string]map[string]*resource{
			typeAddress:       {},
			typeAuthorization: {},
		},
		names:      make(map[string][]string),
		byAlias:    make(map[string]string),
		endpoints:  make(map[string][]string),
		byNode:     make(map[string][]string),
		identities: make(map[string]map[identityKey]bool),
	}
}

func (w *World) add(typeURL, name string, aliases []string, m proto.Message) {
	// Marshalling fails on invalid UTF-8 only, which YAML does not let through.
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic("control: " + name + ": " + err.Error())
	}
	w.resources[typeURL][name] = &resource{
		name: name, aliases: aliases,
		version: strconv.FormatUint(xxhash.Sum64(data), 16),
		body:    &anypb.Any{TypeUrl: typeURL, Value: data},
	}
}

func (w *World) addWorkload(m *workloadapi.Workload) {
	var aliases []string
	if m.NetworkMode != workloadapi.NetworkMode_HOST_NETWORK {
		aliases = addrAliases(m.Network, m.Addresses)
	}
	for _, a := range aliases {
		w.byAlias[a] = m.Uid
	}
	for key := range m.Services {
		w.endpoints[key] = append(w.endpoints[key], m.Uid)
	}
	w.byNode[m.Node] = append(w.byNode[m.Node], m.Uid)
	w.wire.workloads = append(w.wire.workloads, m)
	w.add(typeAddress, m.Uid, aliases, &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: m}})
}

func (w *World) addService(m *workloadapi.Service, s *builtService) {
	var aliases []string
	for _, a := range m.Addresses {
		aliases = append(aliases, addrAliases(a.Network, [][]byte{a.Address})...)
	}
	for _, a := range aliases {
		w.byAlias[a] = s.key()
	}
	w.wire.services = append(w.wire.services, m)
	w.add(typeAddress, s.key(), aliases, &workloadapi.Address{Type: &workloadapi.Address_Service{Service: m}})

	addrs := slices.Clone(s.vips)
	if s.headless {
		for _, p := range s.pods {
			addrs = append(addrs, p.addrs...)
		}
	}
	w.services = append(w.services, ServiceAddress{Namespace: s.ns, Name: s.Name, Hostname: s.hostname, Addrs: addrs, Headless: s.headless})
}

func (w *World) addAuthorization(m *securityapi.Authorization) {
	w.wire.authorizations = append(w.wire.authorizations, m)
	w.add(typeAuthorization, m.Namespace+"/"+m.Name, nil, m)
}

// addPlace notes a pod that has not run to its end, served or not: its proxy
// may need its certificate before it has an address.
func (w *World) addPlace(p PodPlace) {
	w.places = append(w.places, p)
	if p.Node == "" {
		return
	}
	on := w.identities[p.Node]
	if on == nil {
		on = make(map[identityKey]bool)
		w.identities[p.Node] = on
	}
	on[identityKey{p.Namespace, p.ServiceAccount}] = true
}

// finish sorts what was added; nothing is added afterwards.
func (w *World) finish() {
	for typeURL, byName := range w.resources {
		w.names[typeURL] = slices.Sorted(keysOf(byName))
	}
	for _, uids := range w.endpoints {
		slices.Sort(uids)
	}
	for _, uids := range w.byNode {
		slices.Sort(uids)
	}
	slices.SortFunc(w.services, func(a, b ServiceAddress) int { return strings.Compare(a.Hostname, b.Hostname) })
}

func (w *World) size(typeURL string) int { return len(w.resources[typeURL]) }

// resolve yields the names of the resources that a subscription to key brings:
// a workload by uid or network/ip, or a service by namespace/hostname or
// network/ip together with its workloads. None: nothing has that name.
func (w *World) resolve(typeURL, key string) (names []string) {
	if typeURL == typeAddress {
		if name, ok := w.byAlias[key]; ok {
			key = name
		}
	}
	if w.resources[typeURL][key] == nil {
		return nil
	}
	names = []string{key}
	if typeURL == typeAddress {
		names = append(names, w.endpoints[key]...)
	}
	return names
}

// hasIdentity says whether a pod with that identity is placed on the node.
func (w *World) hasIdentity(node string, id identityKey) bool { return w.identities[node][id] }

// Services lists every Service by hostname.
func (w *World) Services() []ServiceAddress {
	out := slices.Clone(w.services)
	for i := range out {
		out[i].Addrs = slices.Clone(out[i].Addrs)
	}
	return out
}

// Pods lists every pod by namespace and name, served or not.
func (w *World) Pods() []PodPlace {
	out := slices.Clone(w.places)
	for i := range out {
		out[i].Addrs = slices.Clone(out[i].Addrs)
	}
	return out
}

func addrAliases(network string, addrs [][]byte) []string {
	var out []string
	for _, raw := range addrs {
		if a, ok := netip.AddrFromSlice(raw); ok {
			out = append(out, network+"/"+a.String())
		}
	}
	return out
}
