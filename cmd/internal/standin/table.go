package standin

import (
	"net/netip"
	"slices"
	"time"
)

const (
	// maxFlows bounds the probes of one pod that are under way.
	maxFlows = 1024
	// linger is how long a connection is remembered after both FINs, for the
	// last ACK and repeated FINs.
	linger = 60 * time.Second
	// idle is how long one may be silent.
	idle = 5 * time.Minute
	// tunnelPort is where pods accept HBONE, which no kubelet speaks.
	tunnelPort = 15008
)

// key names a connection that the node opens to a pod.
type key struct{ node, pod netip.AddrPort }

// verdict is what becomes of a packet.
type verdict int

const (
	drop verdict = iota
	pass         // Written back.
	ask          // Held until it is known whether it is a probe's.
)

// A table knows the probes of one pod that are under way.
type table struct {
	pod, node []netip.Addr
	flows     map[key]*flow
	asked     map[key]struct{} // SYNs that are held.
}

type flow struct {
	finPod, finNode bool
	ended, seen     time.Time // Zero: not yet.
}

func newTable(pod, node []netip.Addr) *table {
	return &table{pod: unmapped(pod), node: unmapped(node), flows: map[key]*flow{}, asked: map[key]struct{}{}}
}

func unmapped(list []netip.Addr) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, a.Unmap())
	}
	return out
}

// decide says what becomes of a segment.
func (t *table) decide(p *packet, now time.Time) (verdict, key) {
	toPod := slices.Contains(t.pod, p.dst.Addr()) && slices.Contains(t.node, p.src.Addr())
	toNode := slices.Contains(t.pod, p.src.Addr()) && slices.Contains(t.node, p.dst.Addr())
	switch {
	case toPod == toNode:
		return drop, key{}
	case toPod && p.isSYN():
		k := key{p.src, p.dst}
		delete(t.flows, k) // It is a new connection.
		if _, ok := t.asked[k]; ok || p.dst.Port() == tunnelPort {
			return drop, k
		}
		return ask, k
	case p.isSYN():
		return drop, key{} // The pod's own connection.
	}
	k := key{p.src, p.dst}
	if toNode {
		k = key{p.dst, p.src}
	}
	f := t.flows[k]
	if f == nil || f.isOver(now) {
		delete(t.flows, k)
		return drop, k
	}
	if p.flags&flagRST != 0 {
		delete(t.flows, k)
		return pass, k
	}
	f.follow(p, toNode, now)
	return pass, k
}

func (f *flow) follow(p *packet, fromPod bool, now time.Time) {
	f.seen = now
	if p.flags&flagFIN != 0 {
		if fromPod {
			f.finPod = true
		} else {
			f.finNode = true
		}
	}
	if f.finPod && f.finNode && f.ended.IsZero() {
		f.ended = now
	}
}

func (f *flow) isOver(now time.Time) bool {
	return now.Sub(f.seen) > idle || !f.ended.IsZero() && now.Sub(f.ended) > linger
}

// answered notes the answer to a question, and reports whether the connection
// is forwarded from now on.
func (t *table) answered(k key, yes bool, now time.Time) bool {
	delete(t.asked, k)
	if !yes {
		return false
	}
	if len(t.flows) >= maxFlows {
		t.sweep(now)
	}
	if len(t.flows) >= maxFlows {
		return false
	}
	t.flows[k] = &flow{seen: now}
	return true
}

// sweep forgets connections that are over.
func (t *table) sweep(now time.Time) {
	for k, f := range t.flows {
		if f.isOver(now) {
			delete(t.flows, k)
		}
	}
}
