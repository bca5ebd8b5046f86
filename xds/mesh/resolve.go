package mesh

import (
	"fmt"
	"net/netip"

	"github.com/ztun/ztun/tunnel/identity"
)

// HBONEPort is where workloads accept HBONE.
const HBONEPort = 15008

// Resolve says where a connection from the local workload src to dst goes. Its
// errors match ErrNoHealthyUpstream, ErrNoPort, ErrNoDestination,
// ErrNoIdentity or ErrUnsupported.
func (s *Snapshot) Resolve(src *Workload, dst netip.AddrPort) (Route, error) {
	dst = netip.AddrPortFrom(canonical(dst.Addr()), dst.Port())
	route, err := s.resolve(src, dst)
	if err != nil {
		return Route{}, fmt.Errorf("mesh: resolve %v: %w", dst, err)
	}
	return route, nil
}

// resolve looks for a service before a workload. ztunnel does so to choose the
// endpoint, but to find the waypoint it asks for a workload first, and so goes
// around the waypoint of a service that shares its address with a workload.
func (s *Snapshot) resolve(src *Workload, dst netip.AddrPort) (Route, error) {
	if svc := s.ServiceByVIP(src.Network, dst.Addr(), src.Namespace); svc != nil {
		return s.resolveService(src, svc, dst)
	}
	peer := s.WorkloadByIP(src.Network, dst.Addr())
	if peer == nil {
		return Route{Kind: Passthrough, Dial: dst, Target: dst}, nil
	}
	if peer.Waypoint != nil && !s.isBehind(src, peer.Waypoint) {
		return Route{}, &UnsupportedError{Waypoint, peer.Waypoint.String()}
	}
	return routeTo(peer, nil, dst)
}

func (s *Snapshot) resolveService(src *Workload, svc *Service, dst netip.AddrPort) (Route, error) {
	if waypoint := svc.waypoint(); waypoint != nil {
		return Route{}, &UnsupportedError{Waypoint, waypoint.String()}
	}
	if svc.mode() == ModePassthrough {
		return Route{Kind: Passthrough, Dial: dst, Target: dst}, nil
	}
	if !svc.Ports.Has(dst.Port()) {
		return Route{}, ErrNoPort
	}
	peer := s.choose(src, svc, dst.Port())
	if peer == nil {
		return Route{}, ErrNoHealthyUpstream
	}
	if peer.Network != src.Network {
		if peer.NetworkGateway == nil {
			return Route{}, ErrNoDestination
		}
		return Route{}, &UnsupportedError{NetworkGateway, peer.NetworkGateway.String()}
	}
	port, ok := svc.TargetPort(peer, dst.Port())
	if !ok {
		return Route{}, ErrNoHealthyUpstream
	}
	ip, err := peer.pick(svc, dst.Addr())
	if err != nil {
		return Route{}, err
	}
	return routeTo(peer, svc, netip.AddrPortFrom(ip, port))
}

// waypoint returns one of the service's waypoints, or nil when it has none.
func (s *Service) waypoint() *Gateway {
	if s.Waypoint != nil {
		return s.Waypoint
	}
	for i := range s.WeightedWaypoints {
		if s.WeightedWaypoints[i].Weight > 0 {
			return &s.WeightedWaypoints[i].Gateway
		}
	}
	return nil
}

// isBehind tells whether src is one of the workloads that the waypoint stands
// for: traffic from a workload's own waypoint goes on to the workload.
func (s *Snapshot) isBehind(src *Workload, waypoint *Gateway) bool {
	key := waypoint.Service
	if waypoint.Addr.IsValid() {
		svc := s.ServiceByVIP(waypoint.Network, waypoint.Addr, "")
		if svc == nil {
			return src.Network == waypoint.Network && src.Has(waypoint.Addr)
		}
		key = svc.ServiceKey
	}
	if m, ok := s.members.get(key); ok {
		_, ok := m.byUID.get(src.UID)
		return ok
	}
	return src.Hostname != "" && key == ServiceKey{src.Namespace, src.Hostname}
}

// pick chooses the address of a service's endpoint: the one that was asked for,
// else the first of its family that the service allows, else the first allowed.
func (w *Workload) pick(svc *Service, asked netip.Addr) (netip.Addr, error) {
	if w.Has(asked) {
		return asked, nil
	}
	var first netip.Addr
	for _, ip := range w.Addrs {
		if !svc.Families.allows(ip) {
			continue
		}
		if ip.Is4() == asked.Is4() {
			return ip, nil
		}
		if !first.IsValid() {
			first = ip
		}
	}
	switch {
	case first.IsValid():
		return first, nil
	case w.Hostname != "":
		return netip.Addr{}, &UnsupportedError{Hostname, w.Hostname}
	}
	return netip.Addr{}, ErrNoDestination
}

func routeTo(peer *Workload, svc *Service, target netip.AddrPort) (Route, error) {
	route := Route{Kind: TCP, Dial: target, Target: target, Peer: peer, Service: svc}
	if peer.Protocol != ProtocolHBONE {
		return route, nil
	}
	if peer.Identity.IsZero() {
		return Route{}, ErrNoIdentity
	}
	route.Kind = HBONE
	route.Dial = netip.AddrPortFrom(target.Addr(), HBONEPort)
	route.Authority = target.String()
	route.Identities = peer.identities
	if svc != nil && len(svc.Identities) > 0 {
		route.Identities = append(append(make([]identity.ID, 0, len(svc.Identities)+1), svc.Identities...), peer.Identity)
	}
	return route, nil
}
