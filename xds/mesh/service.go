package mesh

import (
	"fmt"
	"net/netip"

	"github.com/ztun/ztun/tunnel/identity"
)

// A ServiceKey names a service.
type ServiceKey struct {
	Namespace string
	Hostname  string
}

// String is namespace/hostname, the name of the XDS resource.
func (k ServiceKey) String() string { return k.Namespace + "/" + k.Hostname }

// A Service is the definition of a service, without its endpoints. It is
// immutable.
type Service struct {
	ServiceKey
	Name  string
	VIPs  []VIP
	CIDRs []CIDR
	// Ports maps the service's ports to target ports; 0 says that the
	// endpoint knows.
	Ports PortMap
	// SubjectAltNames as sent; Identities are those that are SPIFFE IDs. They
	// are accepted besides the endpoint's own.
	SubjectAltNames   []string
	Identities        []identity.ID
	Waypoint          *Gateway
	WeightedWaypoints []WeightedWaypoint
	LoadBalancer      *LoadBalancer // nil: random over the healthy endpoints.
	Families          Families
	// Canonical wins over other services with the same host name or address.
	Canonical bool
	// NamespaceOnly services are seen by clients of their namespace only.
	NamespaceOnly bool
}

// A VIP is an address that stands for a service.
type VIP struct {
	Network string
	Addr    netip.Addr
}

// A CIDR is a prefix that stands for a service.
type CIDR struct {
	Network string
	Prefix  netip.Prefix
}

// A WeightedWaypoint is one of several waypoints of a service.
type WeightedWaypoint struct {
	Gateway Gateway
	Weight  uint32
}

// Families restricts the addresses of endpoints that a service uses.
type Families uint8

const (
	AnyFamily Families = iota
	IPv4Only
	IPv6Only
	DualStack
)

// String is the form of config dumps.
func (f Families) String() string {
	switch f {
	case AnyFamily:
		return ""
	case IPv4Only:
		return "IPv4"
	case IPv6Only:
		return "IPv6"
	case DualStack:
		return "Dual"
	}
	return fmt.Sprintf("Families(%d)", uint8(f))
}

func (f Families) allows(a netip.Addr) bool {
	return f == AnyFamily || f == DualStack || (f == IPv4Only) == a.Is4()
}

// A LoadBalancer chooses among endpoints by where they are.
type LoadBalancer struct {
	Preferences    []Scope
	Mode           Mode
	AllowUnhealthy bool
}

// Scope is one way in which an endpoint can be near.
type Scope uint8

const (
	ScopeRegion Scope = iota
	ScopeZone
	ScopeSubzone
	ScopeNode
	ScopeCluster
	ScopeNetwork
)

// String is the form of config dumps.
func (s Scope) String() string {
	names := [...]string{"Region", "Zone", "Subzone", "Node", "Cluster", "Network"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("Scope(%d)", uint8(s))
}

// Mode is how a LoadBalancer uses its preferences.
type Mode uint8

const (
	ModeStandard    Mode = iota // Not at all.
	ModeStrict                  // Only endpoints that match them all.
	ModeFailover                // Those that match the most of them, from the left.
	ModePassthrough             // No endpoint: the original destination.
)

// String is the form of config dumps.
func (m Mode) String() string {
	names := [...]string{"Standard", "Strict", "Failover", "Passthrough"}
	if int(m) < len(names) {
		return names[m]
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

func (s *Service) mode() Mode {
	if s.LoadBalancer == nil {
		return ModeStandard
	}
	return s.LoadBalancer.Mode
}

// accepts tells whether w, which names s, is an endpoint that s would use.
func (s *Service) accepts(w *Workload) bool {
	return w.Healthy || s.LoadBalancer != nil && s.LoadBalancer.AllowUnhealthy
}

func (s *Service) visible(namespace string) bool {
	return !s.NamespaceOnly || namespace == "" || namespace == s.Namespace
}

// TargetPort returns the port of w behind the service's port: the endpoint's
// own mapping, then the service's, then, for a workload whose application
// tunnel has a port, the service port itself.
func (s *Service) TargetPort(w *Workload, port uint16) (uint16, bool) {
	if own, ok := w.Member(s.ServiceKey); ok {
		if target := own.Get(port); target != 0 {
			return target, true
		}
	}
	if target := s.Ports.Get(port); target != 0 {
		return target, true
	}
	if w.AppTunnel != nil && w.AppTunnel.Port != 0 {
		return port, true
	}
	return 0, false
}

// A PortMap maps service ports to target ports, sorted by service port.
type PortMap []PortPair

// A PortPair is a service's port and where it leads.
type PortPair struct{ Service, Target uint16 }

// Get returns the target of a service port, 0 when there is none.
func (m PortMap) Get(service uint16) uint16 {
	target, _ := m.find(service)
	return target
}

// Has tells whether the service port is declared, even if its target is 0.
func (m PortMap) Has(service uint16) bool {
	_, ok := m.find(service)
	return ok
}

func (m PortMap) find(service uint16) (uint16, bool) {
	lo, hi := 0, len(m)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		switch {
		case m[mid].Service == service:
			return m[mid].Target, true
		case m[mid].Service < service:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return 0, false
}
