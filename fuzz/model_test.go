package fuzz

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

// A model is the mesh as facts/ztunnel.md sections 2.5, 3 and 4 describe it, in
// maps and loops over the messages themselves. Where package mesh says that it
// differs, the model says so too.
type model struct {
	localNode string
	clock     int  // counts what was put
	tie       bool // set by lookups: among services only the order of arrival decided
	workloads map[string]*worker
	services  map[string]*served
	policies  map[string]*policy
}

// A worker is a workload; later ones win over earlier ones of the same rank.
type worker struct {
	*workloadapi.Workload
	put  int
	body []byte
}

// A served is a service. first is when it came, at each of its addresses and
// as a whole (under ""): sent again it keeps its places, "else first inserted".
type served struct {
	*workloadapi.Service
	first map[string]int
	body  []byte
}

// A policy that cannot be used, usable false, is remembered if no usable one of
// that name is: where it would apply it counts as missing (package mesh; what
// ztunnel leaves out).
type policy struct {
	*securityapi.Authorization
	usable bool
	body   []byte
}

func newModel(localNode string) *model {
	return &model{localNode: localNode, workloads: map[string]*worker{}, services: map[string]*served{}, policies: map[string]*policy{}}
}

// put takes one resource of a type, and reports whether it is accepted: "a
// malformed resource rejects only itself" (2.5).
func (m *model) put(kind int, name string, body []byte) bool {
	m.clock++
	if kind == policies {
		return m.putPolicy(name, body)
	}
	var a workloadapi.Address
	if proto.Unmarshal(body, &a) != nil {
		return false
	}
	switch {
	case a.GetWorkload() != nil:
		w := a.GetWorkload()
		if w.GetUid() != name || !usableWorkload(w) {
			return false
		}
		delete(m.services, name)
		m.workloads[name] = &worker{w, m.clock, body}
	case a.GetService() != nil:
		s := a.GetService()
		if serviceName(s) != name || !usableService(s) {
			return false
		}
		delete(m.workloads, name)
		m.putService(name, &served{s, map[string]int{"": m.clock}, body})
	default:
		return false
	}
	return true
}

func (m *model) putService(name string, s *served) {
	for _, a := range s.GetAddresses() {
		s.first[addressKey(a)] = m.clock
	}
	if old := m.services[name]; old != nil {
		for key := range s.first {
			if at, ok := old.first[key]; ok {
				s.first[key] = at
			}
		}
	}
	m.services[name] = s
}

func (m *model) putPolicy(name string, body []byte) bool {
	var a securityapi.Authorization
	if proto.Unmarshal(body, &a) != nil {
		return false
	}
	if a.GetScope() == securityapi.Scope_NAMESPACE && a.GetNamespace() == "" {
		return false
	}
	p := &policy{&a, usablePolicy(&a), body}
	if old := m.policies[name]; p.usable || old == nil || !old.usable {
		m.policies[name] = p
	}
	return p.usable
}

// remove drops a name of a type: "first tried as workload uid", else a service
// (3.2). Here the two never share a name.
func (m *model) remove(kind int, name string) {
	if kind == policies {
		delete(m.policies, name)
		return
	}
	delete(m.workloads, name)
	delete(m.services, name)
}

func serviceName(s *workloadapi.Service) string { return s.GetNamespace() + "/" + s.GetHostname() }

// usableWorkload is section 2.7, and stricter where package mesh is: a uid is
// needed, ports end at 65535, lists have bounds.
func usableWorkload(w *workloadapi.Workload) bool {
	ok := w.GetUid() != "" && len(w.GetAddresses()) <= 1024 && len(w.GetServices()) <= 4096
	for _, a := range w.GetAddresses() {
		ok = ok && (len(a) == 4 || len(a) == 16)
	}
	for key, list := range w.GetServices() {
		ok = ok && strings.Contains(key, "/") && usablePorts(list.GetPorts())
	}
	ok = ok && (w.GetTunnelProtocol() == workloadapi.TunnelProtocol_NONE || w.GetTunnelProtocol() == workloadapi.TunnelProtocol_HBONE)
	ok = ok && w.GetStatus() >= 0 && w.GetStatus() <= 1 && w.GetNetworkMode() >= 0 && w.GetNetworkMode() <= 1
	if t := w.GetApplicationTunnel(); t != nil {
		ok = ok && t.GetProtocol() >= 0 && t.GetProtocol() <= 1 && t.GetPort() <= 65535
	}
	return ok && usableGateway(w.GetWaypoint()) && usableGateway(w.GetNetworkGateway())
}

func usableService(s *workloadapi.Service) bool {
	ok := !strings.Contains(s.GetNamespace(), "/") && len(s.GetAddresses()) <= 1024 && usablePorts(s.GetPorts())
	for _, a := range s.GetAddresses() {
		n := len(a.GetAddress())
		ok = ok && (n == 4 || n == 16) && (a.Length == nil || int64(a.GetLength()) <= int64(n)*8)
	}
	ok = ok && usableGateway(s.GetWaypoint())
	for _, w := range s.GetWeightedWaypoints() {
		ok = ok && w.GetDestination() != nil && usableGateway(w.GetDestination())
	}
	ok = ok && s.GetIpFamilies() >= 0 && s.GetIpFamilies() <= 3
	if lb := s.GetLoadBalancing(); lb != nil {
		ok = ok && lb.GetMode() >= 0 && lb.GetMode() <= 3 && lb.GetHealthPolicy() >= 0 && lb.GetHealthPolicy() <= 1 && len(lb.GetRoutingPreference()) <= 1024
		for _, scope := range lb.GetRoutingPreference() {
			ok = ok && scope >= 1 && scope <= 6
		}
	}
	return ok
}

func usablePorts(ports []*workloadapi.Port) bool {
	for _, p := range ports {
		if p.GetServicePort() > 65535 || p.GetTargetPort() > 65535 {
			return false
		}
	}
	return len(ports) <= 65535
}

func usableGateway(g *workloadapi.GatewayAddress) bool {
	if g == nil {
		return true
	}
	if g.GetHboneMtlsPort() > 65535 {
		return false
	}
	switch d := g.GetDestination().(type) {
	case *workloadapi.GatewayAddress_Hostname:
		return true
	case *workloadapi.GatewayAddress_Address:
		n := len(d.Address.GetAddress())
		return n == 4 || n == 16
	}
	return false
}

func addrOf(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a.Unmap()
}

// addrsOf are a workload's addresses, each once.
func addrsOf(w *workloadapi.Workload) (out []netip.Addr) {
	for _, b := range w.GetAddresses() {
		if a := addrOf(b); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// prefixOf is what a service's address covers: "length absent or equal to
// 32/128: exact VIP; otherwise CIDR" (2.7).
func prefixOf(a *workloadapi.NetworkAddress) netip.Prefix {
	ip, _ := netip.AddrFromSlice(a.GetAddress())
	bits := ip.BitLen()
	if a.Length != nil {
		bits = int(a.GetLength())
	}
	if ip.Is4In6() && bits >= 96 {
		ip, bits = ip.Unmap(), bits-96
	}
	return netip.PrefixFrom(ip, bits).Masked()
}

func addressKey(a *workloadapi.NetworkAddress) string {
	return a.GetNetwork() + "|" + prefixOf(a).String()
}

// workloadByIP: "several workloads on one IP: choose by rank: uid contains
// //Pod/ and HBONE = 3, Pod only = 2, HBONE only = 1, else 0 (ties: last one
// wins)"; those of the host's network are not found (3.1).
func (m *model) workloadByIP(network string, ip netip.Addr) *worker {
	var found *worker
	for _, w := range m.workloads {
		if w.GetNetwork() != network || w.GetNetworkMode() != workloadapi.NetworkMode_STANDARD || !slices.Contains(addrsOf(w.Workload), ip) {
			continue
		}
		if found == nil || cmp.Or(cmp.Compare(w.rank(), found.rank()), cmp.Compare(w.put, found.put)) > 0 {
			found = w
		}
	}
	return found
}

func (w *worker) rank() (n int) {
	if strings.Contains(w.GetUid(), "//Pod/") {
		n = 2
	}
	if w.GetTunnelProtocol() == workloadapi.TunnelProtocol_HBONE {
		n++
	}
	return n
}

// local is the workload of this node that is somebody: the latest of the best
// rank.
func (m *model) local(name, namespace, account string) *worker {
	var found *worker
	for _, w := range m.workloads {
		if w.GetNode() != m.localNode || w.GetName() != name || w.GetNamespace() != namespace || accountOf(w.Workload) != account {
			continue
		}
		if found == nil || cmp.Or(cmp.Compare(w.rank(), found.rank()), cmp.Compare(w.put, found.put)) > 0 {
			found = w
		}
	}
	return found
}

func accountOf(w *workloadapi.Workload) string { return cmp.Or(w.GetServiceAccount(), "default") }

func identityOf(w *workloadapi.Workload) string {
	id, _ := identity.New(cmp.Or(w.GetTrustDomain(), "cluster.local"), w.GetNamespace(), accountOf(w))
	return id.String()
}

// serviceByVIP is section 3.3.
func (m *model) serviceByVIP(network string, ip netip.Addr, client string) *served {
	var found *served
	best, tie := -1, false
	defer func() { m.tie = m.tie || tie }()
	consider := func(s *served, key string, rank int, foundKey *string) {
		switch {
		case rank > best:
			found, best, tie, *foundKey = s, rank, false, key
		case rank == best:
			tie = true
			if s.first[key] < found.first[*foundKey] {
				found, *foundKey = s, key
			}
		}
	}
	var at string
	for _, s := range m.services {
		for key := range vipsOf(s, network, ip, true) {
			if visible(s, client) {
				consider(s, key, preference(s, client), &at)
			}
		}
	}
	if found != nil {
		return found
	}
	for _, s := range m.services {
		for key, bits := range vipsOf(s, network, ip, false) {
			if !visible(s, client) {
				continue
			}
			rank := bits * 2
			if client != "" && s.GetNamespace() == client {
				rank += 1000
			}
			if s.GetCanonical() {
				rank++
			}
			consider(s, key, rank, &at)
		}
	}
	return found
}

// vipsOf are the addresses of s that ip is, or the prefixes that contain it.
func vipsOf(s *served, network string, ip netip.Addr, exact bool) map[string]int {
	out := make(map[string]int)
	for _, a := range s.GetAddresses() {
		p := prefixOf(a)
		if a.GetNetwork() == network && p.Contains(ip) && p.IsSingleIP() == exact {
			out[addressKey(a)] = p.Bits()
		}
	}
	return out
}

func visible(s *served, client string) bool {
	return s.GetVisibility() != workloadapi.Service_NAMESPACE || client == "" || client == s.GetNamespace()
}

// preference: "same namespace as client; else a canonical one; else first".
func preference(s *served, client string) int {
	switch {
	case client != "" && s.GetNamespace() == client:
		return 2
	case s.GetCanonical():
		return 1
	}
	return 0
}

func (m *model) serviceByHostname(host, client string) *served {
	var found *served
	tie := false
	for _, s := range m.services {
		if s.GetHostname() != host || !visible(s, client) {
			continue
		}
		switch {
		case found == nil || preference(s, client) > preference(found, client):
			found, tie = s, false
		case preference(s, client) == preference(found, client):
			tie = true
			if s.first[""] < found.first[""] {
				found = s
			}
		}
	}
	m.tie = m.tie || tie
	return found
}

// endpoints of a service are the workloads that name it, if healthy or if the
// service takes all (3.2; live, where ztunnel has a gap).
func (m *model) endpoints(s *served) (out []*worker) {
	for _, w := range m.workloads {
		if _, member := w.GetServices()[serviceName(s.Service)]; member && accepts(s, w) {
			out = append(out, w)
		}
	}
	return out
}

func accepts(s *served, w *worker) bool {
	return w.GetStatus() == workloadapi.WorkloadStatus_HEALTHY || s.GetLoadBalancing().GetHealthPolicy() == workloadapi.LoadBalancing_ALLOW_ALL
}

// An answer of Resolve, as text, and how often it comes among the sum of all.
type answers map[string]uint64

// resolve is sections 3.3 to 3.5 and 4.2, with all that chance may answer.
// Waypoints, gateways and host names are refused (package mesh).
func (m *model) resolve(src *worker, dst netip.AddrPort) answers {
	one := func(text string) answers { return answers{text: 1} }
	svc := m.serviceByVIP(src.GetNetwork(), dst.Addr(), src.GetNamespace())
	if svc == nil {
		peer := m.workloadByIP(src.GetNetwork(), dst.Addr())
		switch {
		case peer == nil:
			return one("PASSTHROUGH " + dst.String())
		case peer.GetWaypoint() != nil && !m.behind(src, peer.GetWaypoint()):
			return one(unsupported)
		}
		return one(route(peer, nil, dst))
	}
	if svc.hasWaypoint() {
		return one(unsupported)
	}
	if svc.GetLoadBalancing().GetMode() == workloadapi.LoadBalancing_PASSTHROUGH {
		return one("PASSTHROUGH " + dst.String())
	}
	target, declared := portIn(svc.GetPorts(), dst.Port())
	if !declared {
		return one(mesh.ErrNoPort.Error())
	}
	out := make(answers)
	for _, w := range m.candidates(src, svc, dst.Port(), target) {
		if n := capacityOf(w); n > 0 {
			out[m.through(src, svc, w, dst, target)] += n
		}
	}
	if len(out) == 0 {
		return one(mesh.ErrNoHealthyUpstream.Error())
	}
	return out
}

const unsupported = "not supported yet"

func capacityOf(w *worker) uint64 {
	if w.GetCapacity() == nil {
		return 1
	}
	return uint64(w.GetCapacity().GetValue())
}

// behind: traffic from a workload's own waypoint goes on to the workload (4.2
// step 4).
func (m *model) behind(src *worker, g *workloadapi.GatewayAddress) bool {
	namespace, host := g.GetHostname().GetNamespace(), g.GetHostname().GetHostname()
	if a := g.GetAddress(); a != nil {
		s := m.serviceByVIP(a.GetNetwork(), addrOf(a.GetAddress()), "")
		if s == nil {
			return src.GetNetwork() == a.GetNetwork() && slices.Contains(addrsOf(src.Workload), addrOf(a.GetAddress()))
		}
		namespace, host = s.GetNamespace(), s.GetHostname()
	}
	for _, w := range m.workloads {
		if _, member := w.GetServices()[namespace+"/"+host]; member {
			_, is := src.GetServices()[namespace+"/"+host]
			return is
		}
	}
	return src.GetHostname() != "" && src.GetHostname() == host && src.GetNamespace() == namespace
}

func (s *served) hasWaypoint() bool {
	if s.GetWaypoint() != nil {
		return true
	}
	for _, w := range s.GetWeightedWaypoints() {
		if w.GetWeight() > 0 {
			return true
		}
	}
	return false
}

// portIn finds a port; the last of two wins.
func portIn(ports []*workloadapi.Port, port uint16) (target uint16, ok bool) {
	for _, p := range ports {
		if p.GetServicePort() == uint32(port) {
			target, ok = uint16(p.GetTargetPort()), true
		}
	}
	return target, ok
}

// candidates is section 3.4.
func (m *model) candidates(src *worker, svc *served, port, target uint16) (out []*worker) {
	best := 0
	for _, w := range m.endpoints(svc) {
		if len(w.GetAddresses()) == 0 && w.GetHostname() == "" && (w.GetNetwork() == src.GetNetwork() || w.GetNetworkGateway() == nil) {
			continue
		}
		if own, _ := portIn(w.GetServices()[serviceName(svc.Service)].GetPorts(), port); target == 0 && own == 0 {
			continue
		}
		rank, ok := rankOf(svc, src, w)
		switch {
		case !ok || rank < best:
		case rank > best:
			best, out = rank, []*worker{w}
		default:
			out = append(out, w)
		}
	}
	return out
}

// rankOf: "rank = count of leading routing preferences matched, stopping at the
// first mismatch"; NETWORK in front does not stop the walk, and adds the number
// of preferences less one if it matches; STRICT must match all.
func rankOf(svc *served, src, w *worker) (rank int, ok bool) {
	lb := svc.GetLoadBalancing()
	if lb.GetMode() == workloadapi.LoadBalancing_UNSPECIFIED_MODE {
		return 0, true
	}
	scopes := lb.GetRoutingPreference()
	all := true
	walking := true
	for i, scope := range scopes {
		same := scopeOf(scope, src) == scopeOf(scope, w)
		network := i == 0 && scope == workloadapi.LoadBalancing_NETWORK
		all = all && same
		walking = walking && (same || network)
		if walking && same {
			rank++
			if network {
				rank += len(scopes) - 1
			}
		}
	}
	return rank, lb.GetMode() != workloadapi.LoadBalancing_STRICT || all
}

func scopeOf(scope workloadapi.LoadBalancing_Scope, w *worker) string {
	switch scope {
	case workloadapi.LoadBalancing_REGION:
		return w.GetLocality().GetRegion()
	case workloadapi.LoadBalancing_ZONE:
		return w.GetLocality().GetZone()
	case workloadapi.LoadBalancing_SUBZONE:
		return w.GetLocality().GetSubzone()
	case workloadapi.LoadBalancing_NODE:
		return w.GetNode()
	case workloadapi.LoadBalancing_CLUSTER:
		return cmp.Or(w.GetClusterId(), "Kubernetes")
	}
	return w.GetNetwork()
}

// through is the route to a chosen endpoint.
func (m *model) through(src *worker, svc *served, w *worker, dst netip.AddrPort, target uint16) string {
	if w.GetNetwork() != src.GetNetwork() {
		if w.GetNetworkGateway() == nil {
			return mesh.ErrNoDestination.Error()
		}
		return unsupported
	}
	port, _ := portIn(w.GetServices()[serviceName(svc.Service)].GetPorts(), dst.Port())
	if port = cmp.Or(port, target); port == 0 {
		return mesh.ErrNoHealthyUpstream.Error()
	}
	addrs := addrsOf(w.Workload)
	if slices.Contains(addrs, dst.Addr()) {
		return route(w, svc, netip.AddrPortFrom(dst.Addr(), port))
	}
	var first, same netip.Addr
	for _, a := range addrs {
		f := svc.GetIpFamilies()
		if f == workloadapi.IPFamilies_IPV4_ONLY && !a.Is4() || f == workloadapi.IPFamilies_IPV6_ONLY && a.Is4() {
			continue
		}
		if !first.IsValid() {
			first = a
		}
		if !same.IsValid() && a.Is4() == dst.Addr().Is4() {
			same = a
		}
	}
	switch {
	case same.IsValid():
		return route(w, svc, netip.AddrPortFrom(same, port))
	case first.IsValid():
		return route(w, svc, netip.AddrPortFrom(first, port))
	case w.GetHostname() != "":
		return unsupported
	}
	return mesh.ErrNoDestination.Error()
}

// route is the last step of 4.2: HBONE to port 15008 with the selected address
// and port as authority, else plain.
func route(peer *worker, svc *served, target netip.AddrPort) string {
	if peer.GetTunnelProtocol() != workloadapi.TunnelProtocol_HBONE {
		return fmt.Sprintf("TCP %v to %s", target, peer.GetUid())
	}
	id := identityOf(peer.Workload)
	if id == "" {
		return mesh.ErrNoIdentity.Error()
	}
	ids := []string{id}
	if svc != nil {
		for _, name := range svc.GetSubjectAltNames() {
			if _, err := identity.Parse(name); err == nil {
				ids = append(ids, name)
			}
		}
	}
	slices.Sort(ids)
	return fmt.Sprintf("HBONE %v:15008 authority %v to %s as %v", target.Addr(), target, peer.GetUid(), slices.Compact(ids))
}

// policiesOf is section 7.1, with what is missing apart.
func (m *model) policiesOf(w *worker) (apply, missing []string) {
	add := func(name string, p *policy) {
		switch {
		case p != nil && p.usable:
			apply = append(apply, name)
		case p == nil || !p.GetDryRun():
			missing = append(missing, name)
		}
	}
	for name, p := range m.policies {
		switch {
		case p.GetScope() == securityapi.Scope_GLOBAL,
			p.GetScope() == securityapi.Scope_NAMESPACE && p.GetNamespace() == w.GetNamespace():
			add(name, p)
		}
	}
	for _, name := range w.GetAuthorizationPolicies() {
		add(name, m.policies[name])
	}
	return sorted(apply), sorted(missing)
}

func sorted(list []string) []string {
	slices.Sort(list)
	return slices.Compact(list)
}

// allows is section 7.2 for a connection to w; what is missing denies.
func (m *model) allows(w *worker, in connection) bool {
	apply, missing := m.policiesOf(w)
	var list []*securityapi.Authorization
	for _, name := range apply {
		list = append(list, m.policies[name].Authorization)
	}
	return len(missing) == 0 && allowed(list, in)
}

// localIdentities are those that need a certificate here.
func (m *model) localIdentities() (out []string) {
	for _, w := range m.workloads {
		if w.GetNode() == m.localNode && identityOf(w.Workload) != "" && (w.GetTunnelProtocol() == workloadapi.TunnelProtocol_HBONE || w.GetNativeTunnel()) {
			out = append(out, identityOf(w.Workload))
		}
	}
	return sorted(out)
}
