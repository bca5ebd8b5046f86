package mesh

import (
	"errors"
	"net/netip"

	"github.com/ztun/ztun/tunnel/identity"
)

// Kind is how a connection is carried.
type Kind uint8

const (
	// Passthrough goes in plain to where the app wanted: the destination is
	// unknown, or a service says that the original address is meant.
	Passthrough Kind = iota
	// TCP goes in plain to a known workload that does not speak HBONE.
	TCP
	// HBONE goes through a tunnel to the peer's port 15008.
	HBONE
)

// String names the kind.
func (k Kind) String() string {
	switch k {
	case TCP:
		return "TCP"
	case HBONE:
		return "HBONE"
	}
	return "PASSTHROUGH"
}

// A Route says where a connection goes.
type Route struct {
	Kind Kind
	// Dial is what to connect to: for HBONE the peer's port 15008.
	Dial netip.AddrPort
	// Target is the peer's real address and port; Dial unless Kind is HBONE.
	Target netip.AddrPort
	// Authority is Target as text, for CONNECT; empty unless Kind is HBONE.
	Authority string
	// Peer is the chosen workload, nil for Passthrough.
	Peer *Workload
	// Service is what the app addressed, if it did address one.
	Service *Service
	// Identities are those that the peer may have; read only.
	Identities []identity.ID
}

// Why Resolve refuses. The errors it returns match one of these.
var (
	// ErrNoHealthyUpstream: the service has no endpoint to use.
	ErrNoHealthyUpstream = errors.New("no healthy upstream")
	// ErrNoPort: the service does not have this port.
	ErrNoPort = errors.New("service has no such port")
	// ErrNoDestination: the workload has no address that can be dialled.
	ErrNoDestination = errors.New("no valid destination")
	// ErrNoIdentity: the workload speaks HBONE but has no valid identity.
	ErrNoIdentity = errors.New("workload has no valid identity")
	// ErrUnsupported is matched by every UnsupportedError.
	ErrUnsupported = errors.New("not supported yet")
)

// Feature is something that a route can need.
type Feature uint8

const (
	Waypoint Feature = iota
	NetworkGateway
	Hostname
)

// String names the feature.
func (f Feature) String() string {
	switch f {
	case Waypoint:
		return "waypoint"
	case NetworkGateway:
		return "network gateway"
	}
	return "workload host name"
}

// An UnsupportedError says that a route needs what this version does not do.
type UnsupportedError struct {
	Feature Feature
	Name    string // Of the waypoint or gateway, or the host name.
}

// Error reads "waypoint ns/host is not supported yet".
func (e *UnsupportedError) Error() string {
	return e.Feature.String() + " " + e.Name + " is not supported yet"
}

// Is makes every UnsupportedError match ErrUnsupported.
func (e *UnsupportedError) Is(target error) bool { return target == ErrUnsupported }
