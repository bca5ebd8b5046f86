package mesh

import (
	"net/netip"

	"github.com/gaissmai/bart"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/authz"
)

// A Snapshot is the mesh at one moment. It is immutable.
type Snapshot struct {
	// Version grows with every change, PolicyVersion with every change of a
	// policy.
	Version       uint64
	PolicyVersion uint64

	config *Config

	workloads pmap[string, *Workload]      // By UID.
	byIP      pmap[addrKey, []*Workload]   // In the order of arrival.
	local     pmap[localKey, []*Workload]  // Of this node.
	ids       pmap[identity.ID, int]       // Local identities that need a certificate, counted.
	members   pmap[ServiceKey, *members]   // Workloads that name a service, known or not.
	services  pmap[ServiceKey, *Service]   //
	byHost    pmap[string, []*Service]     // In the order of arrival.
	byVIP     pmap[addrKey, []*Service]    // In the order of arrival.
	byCIDR    pmap[string, *cidrTable]     // By network.
	policies  pmap[string, *policyEntry]   // By key.
	scoped    pmap[string, []*policyEntry] // By namespace; global ones under "".
}

type cidrTable = bart.Table[[]*Service]

type localKey struct{ name, namespace, account string }

// An addrKey is an address on a network. The address is canonical, so that its
// 16 bytes are unambiguous.
type addrKey struct {
	network string
	ip      [16]byte
}

func keyOf(network string, ip netip.Addr) addrKey {
	return addrKey{network, ip.As16()}
}

// canonical turns an IPv4-mapped IPv6 address into the IPv4 one and drops a zone.
func canonical(ip netip.Addr) netip.Addr { return ip.Unmap().WithZone("") }

// Workload returns the workload with this UID, or nil.
func (s *Snapshot) Workload(uid string) *Workload {
	w, _ := s.workloads.get(uid)
	return w
}

// Local returns the workload of this node with this name, namespace and
// service account, or nil.
func (s *Snapshot) Local(name, namespace, serviceAccount string) *Workload {
	list, _ := s.local.get(localKey{name, namespace, serviceAccount})
	return best(list)
}

// WorkloadByIP returns the workload that owns an address, or nil. Where several
// do, pods win over others, then HBONE over plain, then the latest.
func (s *Snapshot) WorkloadByIP(network string, ip netip.Addr) *Workload {
	list, _ := s.byIP.get(keyOf(network, canonical(ip)))
	return best(list)
}

func best(list []*Workload) *Workload {
	var found *Workload
	rank := -1
	for _, w := range list {
		if r := w.rank(); r >= rank {
			found, rank = w, r
		}
	}
	return found
}

// LocalIdentities returns the identities that workloads of this node need a
// certificate for, in no order.
func (s *Snapshot) LocalIdentities() []identity.ID {
	out := make([]identity.ID, 0, s.ids.len())
	for id := range s.ids.all() {
		out = append(out, id)
	}
	return out
}

// Service returns the service with this namespace and host name, or nil.
func (s *Snapshot) Service(namespace, hostname string) *Service {
	svc, _ := s.services.get(ServiceKey{namespace, hostname})
	return svc
}

// ServiceByVIP returns the service that an address stands for, as a client of
// clientNamespace sees it, or nil. An exact address comes before any prefix.
// Among those with the same address: the client's own namespace, then the
// canonical one, then the first. Among prefixes: the client's own namespace,
// then the longest, then the canonical one, then the first. An empty
// clientNamespace sees every service.
func (s *Snapshot) ServiceByVIP(network string, ip netip.Addr, clientNamespace string) *Service {
	ip = canonical(ip)
	list, _ := s.byVIP.get(keyOf(network, ip))
	if svc := prefer(list, clientNamespace, ""); svc != nil {
		return svc
	}
	table, _ := s.byCIDR.get(network)
	if table == nil || !ip.IsValid() {
		return nil
	}
	var found *Service
	for _, list := range table.Supernets(netip.PrefixFrom(ip, ip.BitLen())) {
		svc := prefer(list, clientNamespace, "")
		switch {
		case svc == nil:
		case clientNamespace != "" && svc.Namespace == clientNamespace:
			return svc
		case found == nil:
			found = svc
		}
	}
	return found
}

// ServiceByHostname returns the service with this host name, as a client of
// clientNamespace sees it: of its own namespace, else the canonical one, else
// of the preferred namespace (if not empty), else the first; or nil.
func (s *Snapshot) ServiceByHostname(hostname, clientNamespace, preferred string) *Service {
	list, _ := s.byHost.get(hostname)
	return prefer(list, clientNamespace, preferred)
}

func prefer(list []*Service, clientNamespace, preferred string) *Service {
	var found *Service
	rank := -1
	for _, svc := range list {
		if !svc.visible(clientNamespace) {
			continue
		}
		r := 0
		switch {
		case clientNamespace != "" && svc.Namespace == clientNamespace:
			r = 3
		case svc.Canonical:
			r = 2
		case preferred != "" && svc.Namespace == preferred:
			r = 1
		}
		if r > rank {
			found, rank = svc, r
		}
	}
	return found
}

// ServicesOf returns the services that w is an endpoint of, as far as they
// are known.
func (s *Snapshot) ServicesOf(w *Workload) []*Service {
	var out []*Service
	for i := range w.Services {
		if svc, ok := s.services.get(w.Services[i].Service); ok && svc.accepts(w) {
			out = append(out, svc)
		}
	}
	return out
}

// Endpoints returns the workloads that the service uses, in no order.
func (s *Snapshot) Endpoints(svc *Service) []*Workload {
	var out []*Workload
	if m, ok := s.members.get(svc.ServiceKey); ok {
		for _, w := range m.byUID.all() {
			if svc.accepts(w) {
				out = append(out, w)
			}
		}
	}
	return out
}

// A policyEntry is a policy, or what is known of one that could not be used.
type policyEntry struct {
	key    string
	home   string // Where in scoped: "" for global, else the namespace.
	scoped bool   // False: for workloads that name it.
	inert  bool   // It could not be used, but it would only be a dry run.
	policy *authz.Policy
}

// Policies returns the policies that apply to connections to w: those of its
// namespace, the global ones, and those it names. missing are the keys of
// those that apply but are not there, because they have not been delivered or
// could not be used; authz.Check takes both.
func (s *Snapshot) Policies(w *Workload) (apply []*authz.Policy, missing []string) {
	namespaced, _ := s.scoped.get(w.Namespace)
	global, _ := s.scoped.get("")
	if w.Namespace == "" {
		namespaced = nil
	}
	if n := len(namespaced) + len(global) + len(w.Policies); n > 0 {
		apply = make([]*authz.Policy, 0, n)
	}
	add := func(key string, e *policyEntry) {
		switch {
		case e != nil && e.policy != nil:
			apply = append(apply, e.policy)
		case e == nil || !e.inert:
			missing = append(missing, key)
		}
	}
	for _, e := range namespaced {
		add(e.key, e)
	}
	for _, e := range global {
		add(e.key, e)
	}
	for _, key := range w.Policies {
		e, _ := s.policies.get(key)
		add(key, e)
	}
	return apply, missing
}
