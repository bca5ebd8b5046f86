package tunnel

import (
	"github.com/ztun/ztun/xds/authz"
)

// recheckTurn is how many live connections are checked, or reported, before
// others get their turn on the loop.
const recheckTurn = 512

// recheck is the check of live connections after a change.
type recheck struct {
	snapshot uint64 // version of the policies that were last begun with
	subject  any    // the workload that they were begun for
	queue    []*conn
}

// allowed asks the policies of s about c, which must be registered already, so
// that no change can slip between the check and the watch. again: it was allowed
// before.
func (c *conn) allowed(s *self, again bool) (Reason, error) {
	c.pod.stats.Checks.Add(1)
	v := authz.Check(*c.check, s.policies, s.missing)
	c.pod.logDecision(c.check, &v, again)
	switch {
	case v.Allowed:
		return OK, nil
	case v.Reason == authz.NotDelivered:
		return PolicyMissing, verdictError(v.String())
	}
	return Denied, verdictError(v.String())
}

// verdictError is a policy's verdict as the detail of a Reason.
type verdictError string

func (e verdictError) Error() string { return string(e) }

// checkLive begins to check every inbound connection against the current
// policies, if they or the workload have changed.
func (p *Pod) checkLive() {
	s := p.self
	r := &p.recheck
	if r.subject == s.workload && r.snapshot == s.version {
		return
	}
	r.subject, r.snapshot = s.workload, s.version
	idle := len(r.queue) == 0
	r.queue = r.queue[:0]
	for c := range p.conns {
		if c.check != nil {
			r.queue = append(r.queue, c)
		}
	}
	if idle {
		p.checkSome()
	}
}

// checkSome checks one turn's worth and comes again for the rest.
func (p *Pod) checkSome() {
	r := &p.recheck
	for range min(recheckTurn, len(r.queue)) {
		last := len(r.queue) - 1
		c := r.queue[last]
		r.queue[last] = nil
		r.queue = r.queue[:last]
		if c.over {
			continue
		}
		s := p.refresh()
		if s.workload == nil {
			// onMesh is about to cut everything.
			r.queue = nil
			return
		}
		if why, err := c.allowed(s, true); why != OK {
			p.stats.Cut.Add(1)
			c.cut(PolicyChange, err)
		}
	}
	if len(r.queue) > 0 {
		p.loop.Post(p.checkSome)
		return
	}
	r.queue = nil
}

// cutAll ends everything that lives.
func (p *Pod) cutAll(why Reason) {
	for c := range p.conns {
		if c.opened {
			p.stats.Cut.Add(1)
			c.cut(why, nil)
		}
	}
}
