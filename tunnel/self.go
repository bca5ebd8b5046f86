package tunnel

import (
	"crypto/tls"
	"slices"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/mesh"
)

// self is what the pod knows of itself, as of one snapshot. It is immutable.
type self struct {
	snap     *mesh.Snapshot
	workload *mesh.Workload // nil until the control plane has told
	baggage  string
	policies []*authz.Policy
	missing  []string
	version  uint64 // PolicyVersion of policies
}

// refresh reads the current snapshot, which is where every decision starts.
func (p *Pod) refresh() *self {
	old := p.self
	snap := p.cfg.Mesh.Snapshot()
	if snap == old.snap {
		return old
	}
	key := p.cfg.Workload
	s := &self{snap: snap, workload: snap.Local(key.Name, key.Namespace, key.ServiceAccount), version: snap.PolicyVersion}
	switch {
	case s.workload == nil:
	case s.workload == old.workload && s.version == old.version:
		s.baggage, s.policies, s.missing = old.baggage, old.policies, old.missing
	default:
		s.baggage = baggageOf(s.workload).String()
		s.policies, s.missing = snap.Policies(s.workload)
	}
	p.self = s
	p.publish()
	return s
}

// baggageOf describes w to a peer.
func baggageOf(w *mesh.Workload) hbone.Baggage {
	return hbone.Baggage{
		Cluster:      w.Cluster,
		Namespace:    w.Namespace,
		WorkloadType: w.WorkloadType,
		Workload:     w.WorkloadName,
		Service:      w.CanonicalName,
		Revision:     w.CanonicalRevision,
		Region:       w.Region,
		Zone:         w.Zone,
	}
}

// An await is someone who waits for the pod's workload to be known.
type await struct {
	done func(*self)
	stop func() // of the deadline
}

// withSelf calls done with what the pod knows of itself: at once if it is
// known, else when it becomes known, or with a nil workload after a while. The
// returned function, nil if done has run, prevents the call.
func (p *Pod) withSelf(done func(*self)) (cancel func()) {
	if s := p.refresh(); s.workload != nil {
		done(s)
		return nil
	}
	a := &await{done: done}
	p.awaiting[a] = struct{}{}
	a.stop = p.loop.AfterFunc(p.cfg.Timeouts.Workload, func() {
		delete(p.awaiting, a)
		a.done(p.refresh())
	})
	return func() {
		a.stop()
		delete(p.awaiting, a)
	}
}

// release goes on with those who waited for the workload.
func (p *Pod) release() {
	for a := range p.awaiting {
		delete(p.awaiting, a)
		a.stop()
		a.done(p.refresh())
	}
}

// serverTLS finds the configuration to accept peers with.
func (p *Pod) serverTLS(done func(*tls.Config, error)) (cancel func()) {
	var stop func()
	cancelled := false
	stop = p.withSelf(func(s *self) {
		stop = nil
		if s.workload == nil {
			done(nil, &ReasonError{Reason: UnknownWorkload})
			return
		}
		id := s.workload.Identity
		if cert, ok := p.certs.Current(id); ok {
			done(cert.ServerTLS(), nil)
			return
		}
		stop = p.certs.Await(id, func(cert *certs.Certificate, err error) {
			stop = nil
			if cancelled {
				return
			}
			if err != nil {
				done(nil, &ReasonError{NoCertificate, err})
				return
			}
			done(cert.ServerTLS(), nil)
		})
	})
	return func() {
		cancelled = true
		if stop != nil {
			stop()
		}
	}
}

// meshChanged has the loop look at the mesh. A pod has no goroutine of its own
// to wait for that.
func (p *Pod) meshChanged() {
	if !p.changed.Swap(true) {
		p.loop.Post(p.onMesh)
	}
}

// onMesh looks again at everything that lives, since the mesh has changed.
func (p *Pod) onMesh() {
	p.changed.Store(false)
	if p.closed {
		return
	}
	s := p.refresh()
	if s.workload == nil {
		p.cutAll(WorkloadGone)
	} else {
		if pre, ok := p.cfg.Certs.(Prefetcher); ok && !s.workload.Identity.IsZero() {
			if _, have := p.certs.Current(s.workload.Identity); !have {
				pre.Prefetch(s.workload.Identity)
			}
		}
		p.release()
		p.checkLive()
	}
	p.pool.Retire(func(t hbone.Target) bool {
		w := s.snap.Workload(t.Peer)
		return w == nil || !slices.Contains(w.Addrs, t.Dst.Addr())
	})
}
