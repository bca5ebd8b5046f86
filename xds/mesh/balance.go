package mesh

import (
	"slices"
	"strings"
	"sync/atomic"
)

// A table is what choose draws from: the endpoints of a service that are best
// for one place, each with the sum of the capacities up to and with its own.
type table struct {
	svc   *Service
	place Place
	port  uint16 // 0 when the choice does not depend on it.

	endpoints []*Workload
	sums      []uint64
}

// maxTables bounds the tables that are kept per service, which is one for each
// place that a local workload is in; they go when the service's members change.
const maxTables = 8

// Up to this many endpoints are sorted, so that one Rand gives one choice. The
// time to sort more would be felt by whoever waits for the first choice.
const sortUpTo = 64

// A tableCache is replaced as a whole, so it needs no lock. Losing a table to a
// race costs its making again.
type tableCache = atomic.Pointer[[]*table]

// choose draws an endpoint of the service for a client at src, by capacity. It
// returns nil when there is none.
func (s *Snapshot) choose(src *Workload, svc *Service, port uint16) *Workload {
	m, ok := s.members.get(svc.ServiceKey)
	if !ok {
		return nil
	}
	t := m.table(src.Place, svc, port)
	if len(t.sums) == 0 {
		return nil
	}
	total := t.sums[len(t.sums)-1]
	if total == 0 {
		return nil
	}
	// The first sum above the drawn number; an endpoint of capacity 0 has none.
	n := s.config.Rand(total)
	i, found := slices.BinarySearch(t.sums, n)
	if found {
		for i < len(t.sums) && t.sums[i] == n {
			i++
		}
	}
	return t.endpoints[i]
}

func (m *members) table(place Place, svc *Service, port uint16) *table {
	if svc.Ports.Get(port) != 0 {
		port = 0
	}
	if svc.LoadBalancer == nil {
		place = Place{Network: place.Network}
	}
	var kept []*table
	if p := m.tables.Load(); p != nil {
		kept = *p
	}
	for _, t := range kept {
		if t.svc == svc && t.port == port && t.place == place {
			return t
		}
	}
	t := m.newTable(place, svc, port)
	next := append(make([]*table, 0, len(kept)+1), t)
	next = append(next, kept[:min(len(kept), maxTables-1)]...)
	m.tables.Store(&next)
	return t
}

// newTable keeps the endpoints of the highest rank. port is 0 when the service
// itself says where its port leads.
func (m *members) newTable(place Place, svc *Service, port uint16) *table {
	t := &table{svc: svc, place: place, port: port}
	best := 0
	for _, w := range m.byUID.all() {
		if !svc.accepts(w) || !w.reachable(place.Network) {
			continue
		}
		if port != 0 {
			if own, _ := w.Member(svc.ServiceKey); own.Get(port) == 0 {
				continue
			}
		}
		rank, ok := svc.rank(&place, &w.Place)
		if !ok || rank < best {
			continue
		}
		if rank > best {
			best, t.endpoints = rank, t.endpoints[:0]
		}
		t.endpoints = append(t.endpoints, w)
	}
	t.endpoints = slices.Clip(t.endpoints)
	if len(t.endpoints) <= sortUpTo {
		slices.SortFunc(t.endpoints, func(a, b *Workload) int {
			return strings.Compare(a.UID, b.UID)
		})
	}
	t.sums = make([]uint64, len(t.endpoints))
	var sum uint64
	for i, w := range t.endpoints {
		sum += uint64(w.Capacity)
		t.sums[i] = sum
	}
	return t
}

// reachable is false for a workload without address and host name, unless a
// network gateway leads to it.
func (w *Workload) reachable(network string) bool {
	return len(w.Addrs) > 0 || w.Hostname != "" || w.Network != network && w.NetworkGateway != nil
}

// rank says how well an endpoint fits the service's preferences for a client:
// how many match from the left. A first preference of NETWORK that matches
// outweighs all others together, and one that does not still lets them count.
func (s *Service) rank(src, dst *Place) (rank int, ok bool) {
	lb := s.LoadBalancer
	if lb == nil || lb.Mode == ModeStandard {
		return 0, true
	}
	matched := 0
	for i, scope := range lb.Preferences {
		same := scope.get(src) == scope.get(dst)
		first := i == 0 && scope == ScopeNetwork
		if !same && !first {
			break
		}
		if same {
			matched++
			rank++
			if first {
				rank += len(lb.Preferences) - 1
			}
		}
	}
	return rank, lb.Mode != ModeStrict || matched == len(lb.Preferences)
}

func (s Scope) get(p *Place) string {
	switch s {
	case ScopeRegion:
		return p.Region
	case ScopeZone:
		return p.Zone
	case ScopeSubzone:
		return p.Subzone
	case ScopeNode:
		return p.Node
	case ScopeCluster:
		return p.Cluster
	default:
		return p.Network
	}
}
