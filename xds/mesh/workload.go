package mesh

import (
	"net/netip"
	"strings"

	"github.com/ztun/ztun/tunnel/identity"
)

// Protocol is how a workload wants to be reached.
type Protocol uint8

const (
	ProtocolTCP   Protocol = iota // Plain.
	ProtocolHBONE                 // Through port 15008.
)

// String is the form of config dumps.
func (p Protocol) String() string {
	if p == ProtocolHBONE {
		return "HBONE"
	}
	return "TCP"
}

// A Workload is one pod, VM or external endpoint. It is immutable.
type Workload struct {
	UID       string
	Name      string // Pod name.
	Namespace string
	// Addrs are canonical: no IPv4-mapped ones. They may be empty.
	Addrs    []netip.Addr
	Hostname string // For workloads that are to be looked up in DNS.

	// Identity is what the workload's certificate must say; zero when trust
	// domain, namespace and service account make no identity.
	Identity       identity.ID
	TrustDomain    string
	ServiceAccount string

	Place
	App
	Reach

	// Policies are the keys of the selector policies that apply.
	Policies []string
	// Services are the services that the workload is an endpoint of, sorted.
	Services []Membership
	// Capacity is the weight among the endpoints of a service; 0 gets nothing.
	Capacity uint32

	identities []identity.ID // Identity alone, for routes.
}

// Place is where a workload runs, as load balancing compares it.
type Place struct {
	Region  string
	Zone    string
	Subzone string
	Node    string
	Cluster string
	Network string
}

// App is what telemetry calls a workload.
type App struct {
	CanonicalName     string
	CanonicalRevision string
	WorkloadName      string
	WorkloadType      string // deployment, cronjob, pod or job.
}

// Reach is how a workload is reached.
type Reach struct {
	Protocol Protocol
	Healthy  bool
	// HostNetwork workloads share their address with their node and are never
	// found by it.
	HostNetwork    bool
	NativeTunnel   bool
	Waypoint       *Gateway
	NetworkGateway *Gateway
	AppTunnel      *AppTunnel
}

// An AppTunnel says how inbound connections are handed to the application.
type AppTunnel struct {
	Proxy bool   // With a PROXY protocol header.
	Port  uint16 // 0: the port that was asked for.
}

// A Membership makes a workload an endpoint of a service.
type Membership struct {
	Service ServiceKey
	Ports   PortMap
}

// Member returns the ports under which w is an endpoint of the service.
func (w *Workload) Member(key ServiceKey) (PortMap, bool) {
	for i := range w.Services {
		if w.Services[i].Service == key {
			return w.Services[i].Ports, true
		}
	}
	return nil, false
}

// Has tells whether ip, in canonical form, is one of the workload's addresses.
func (w *Workload) Has(ip netip.Addr) bool {
	for _, a := range w.Addrs {
		if a == ip {
			return true
		}
	}
	return false
}

// rank orders workloads that share an address.
func (w *Workload) rank() int {
	rank := 0
	if strings.Contains(w.UID, "//Pod/") {
		rank += 2
	}
	if w.Protocol == ProtocolHBONE {
		rank++
	}
	return rank
}

// A Gateway refers to a waypoint or a network gateway, by host name or address.
type Gateway struct {
	Service ServiceKey // Zero when referred to by address.
	Network string
	Addr    netip.Addr // Invalid when referred to by host name.
	Port    uint16     // Of HBONE.
}

// String is namespace/hostname or network/IP, as in config dumps.
func (g *Gateway) String() string {
	if g.Addr.IsValid() {
		return g.Network + "/" + g.Addr.String()
	}
	return g.Service.String()
}
