package netstack

import (
	"net/netip"
	"time"
)

// linger is how long a forwarded flow is remembered after both sides sent
// their FIN, for the last ACK and repeated FINs.
const linger = 60 * time.Second

// maxBypass bounds the forwarded flows that are learnt from traffic.
const maxBypass = 65536

// forwarded are the flows that are not terminated here but sent on at L3: those
// established before the pod was attached, plaintext inbound ones of a pod
// that bypasses capture, and the kubelet's probes. Keyed as the pod's app
// sends: src is the pod.
type forwarded struct {
	flows map[tuple]*forwardedFlow
}

type forwardedFlow struct {
	older           bool // established before the pod was attached
	answered        bool // the pod has sent a segment of it
	finApp, finPeer bool
	ended           time.Time // both FINs seen, or a RST
}

func (b *forwarded) init(older []Tuple) {
	b.flows = make(map[tuple]*forwardedFlow, len(older))
	for _, t := range older {
		b.flows[tupleOf(t.Local, t.Remote)] = &forwardedFlow{older: true}
	}
}

// takes says whether the segment, which belongs to no flow of the stack, is to
// be forwarded. A SYN ends what was known of its tuple: it is a new connection.
func (b *forwarded) takes(s *Stack, p *packet) bool {
	fromPod := s.isPod(p.tuple.src)
	key := p.tuple
	if !fromPod {
		key = key.reverse()
	}
	if p.isSYN() {
		delete(b.flows, key)
		if !fromPod && b.bypasses(s, p) {
			b.learn(key)
			return true
		}
		return false
	}
	f := b.flows[key]
	if f == nil {
		// The proxy may have been restarted under a bypassed connection: what
		// comes from the network is the app's in any case.
		if fromPod || !s.cfg.BypassInbound || p.tuple.dstPort == TunnelPort {
			return false
		}
		if s.before != nil {
			return false // That one knows.
		}
		if f = b.learn(key); f == nil {
			return false
		}
	}
	f.follow(p, fromPod)
	if !f.ended.IsZero() && time.Since(f.ended) > linger {
		delete(b.flows, key)
		return false
	}
	return true
}

// bypasses says whether an inbound connection goes past the proxy.
func (b *forwarded) bypasses(s *Stack, p *packet) bool {
	if p.tuple.dstPort == TunnelPort || !s.isPod(p.tuple.dst) {
		return false
	}
	return s.cfg.BypassInbound
}

// learn remembers a flow, or returns nil when there is no room for it.
func (b *forwarded) learn(key tuple) *forwardedFlow {
	if len(b.flows) >= maxBypass && !b.evict() {
		return nil
	}
	f := &forwardedFlow{}
	b.flows[key] = f
	return f
}

// evictTries bounds the work that one packet makes while the table is full.
const evictTries = 64

// evict makes room: a flow that ended goes, or one that the pod never answered,
// so that SYNs from addresses that do not exist keep nobody out. Which one is
// left to the map's random order.
func (b *forwarded) evict() bool {
	tries := 0
	for k, f := range b.flows {
		if !f.older && (!f.answered || !f.ended.IsZero()) {
			delete(b.flows, k)
			return true
		}
		if tries++; tries == evictTries {
			break
		}
	}
	return false
}

func (f *forwardedFlow) follow(p *packet, fromPod bool) {
	f.answered = f.answered || fromPod
	if p.flags&flagFIN != 0 {
		if fromPod {
			f.finApp = true
		} else {
			f.finPeer = true
		}
	}
	if f.ended.IsZero() && (p.flags&flagRST != 0 || f.finApp && f.finPeer) {
		f.ended = time.Now()
	}
}

// Older returns the flows of StackConfig.Older that are still forwarded. It
// runs on the loop.
func (s *Stack) Older() []Tuple {
	var list []Tuple
	for k, f := range s.bypass.flows {
		if f.ended.IsZero() {
			list = append(list, Tuple{Local: k.source(), Remote: k.destination()})
		}
	}
	return list
}

// CutOlder forgets a flow of StackConfig.Older: its next segment gets a RST.
// It runs on the loop.
func (s *Stack) CutOlder(local, remote netip.AddrPort) {
	delete(s.bypass.flows, tupleOf(local, remote))
}
