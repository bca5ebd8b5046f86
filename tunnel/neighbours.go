package tunnel

import (
	"slices"
	"sync"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/mesh"
)

// Neighbours are the pods that one process serves, by the UIDs of their
// workloads. What one of them opens to another is handed over in memory. Its
// methods may be called from anywhere.
type Neighbours struct {
	memory *splice.Budget // of all pods

	// mu guards the fields below.
	mu   sync.RWMutex
	pods map[string]*Pod
}

// What streams in memory may hold, in bytes: those of one pod and those of all.
const (
	podMemory = 128 << 20
	allMemory = 1 << 30
)

// NewNeighbours returns a registry without pods. A Pod that has it in its
// Config is in it while it takes connections and its workload is known.
func NewNeighbours() *Neighbours {
	return &Neighbours{memory: splice.NewBudget(allMemory, nil), pods: make(map[string]*Pod)}
}

// Memory returns the bytes of buffers that streams between neighbours hold now.
func (n *Neighbours) Memory() int64 { return n.memory.Used() }

// find returns the pod that a route leads to, if it does so directly and the
// pod is served here. The pod itself has the last word (visit.means): it knows
// what its workload is now.
func (n *Neighbours) find(r *mesh.Route) *Pod {
	if n == nil || r.Kind != mesh.HBONE || r.Peer.NativeTunnel || r.Dial.Port() != TunnelPort || r.Dial.Addr() != r.Target.Addr() {
		return nil
	}
	n.mu.RLock()
	p := n.pods[r.Peer.UID]
	n.mu.RUnlock()
	if p == nil || !p.isSelf(r.Target.Addr()) {
		return nil
	}
	return p
}

// move puts p where its workload is; "" is nowhere. Of two pods that claim to
// be one workload, as an old and a new one of the same name do for a while, the
// one that came last has it.
func (n *Neighbours) move(p *Pod, from, to string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pods[from] == p {
		delete(n.pods, from)
	}
	if to != "" {
		n.pods[to] = p
	}
}

// publish tells the neighbours which workload the pod is, while it takes
// connections.
func (p *Pod) publish() {
	uid := ""
	if w := p.self.workload; w != nil && !p.draining && !p.closed {
		uid = w.UID
	}
	if p.cfg.Neighbours != nil && uid != p.published {
		p.cfg.Neighbours.move(p, p.published, uid)
		p.published = uid
	}
}

// means reports whether v is for the pod as s knows it. The source had a
// snapshot of its own to go by.
func (v *visit) means(s *self) bool {
	w := s.workload
	return w != nil && w.UID == v.route.Peer.UID && w.Network == v.network && w.Protocol == mesh.ProtocolHBONE &&
		w.Has(v.route.Target.Addr()) && slices.Contains(v.route.Identities, w.Identity)
}
