package tunnel

import (
	"errors"
	"net/netip"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/mesh"
)

// A visit is a CONNECT to a neighbour, in memory. The source makes it on its
// loop and posts it to the host's, which answers as it answers a peer
// (Pod.connected) and posts the answer back. What the wire would have brought
// about before a CONNECT must hold already, on both sides, else the host
// declines and the source takes the wire, which finds the right error, or waits.
type visit struct {
	// Set by the source, read-only after.
	source, host *Pod
	cert         *certs.Certificate // of the source
	route        mesh.Route
	network      string         // the source's
	client       netip.AddrPort // the app, by the address that the wire would show
	trace        hbone.Trace
	baggage      string
	done         func(splice.End, error)

	// Owned by the source's loop.
	stop func() // of the deadline
	over bool   // done was called, or will not be

	// Owned by the host's loop.
	watch func(error) // hears that the source gave up; nil once answered

	// Set by the host before it answers.
	peer *certs.Certificate
}

// errDeclined is the answer of a host that does not want to be reached in
// memory.
var errDeclined = errors.New("tunnel: declined by the neighbour")

// errGone is what a host hears of a source that gave up.
var errGone = errors.New("tunnel: the neighbour gave up")

// start asks the host. done runs once on the source's loop, after start has
// returned, unless cancel is called before.
func (v *visit) start() {
	v.stop = v.source.loop.AfterFunc(v.source.cfg.Timeouts.Answer, func() {
		done := v.done
		v.cancel()
		done(nil, &hbone.ConnectError{Stage: hbone.StageAnswer, Err: hbone.ErrTimeout})
	})
	splice.Hand(v.source.loop, v.host.loop, func() { v.host.receive(v) })
}

// cancel gives up. It runs on the source's loop.
func (v *visit) cancel() {
	if v.over {
		return
	}
	v.over = true
	v.stop()
	splice.Hand(v.source.loop, v.host.loop, func() {
		if gone := v.watch; gone != nil {
			v.watch = nil
			gone(errGone)
		}
	})
}

// answer takes the host's answer to the source's loop.
func (v *visit) answer(end splice.End, err error) {
	v.watch = nil
	splice.Hand(v.host.loop, v.source.loop, func() {
		if v.over {
			if end != nil {
				end.Reset(errGone)
				end.Close()
			}
			return
		}
		v.over = true
		v.stop()
		v.done(end, err)
	})
}

// Watch, Accept and Refuse are what hbone.Incoming offers; on the host's loop.

func (v *visit) Watch(gone func(error)) { v.watch = gone }

func (v *visit) Accept(*string) (splice.End, error) {
	theirs, ours := splice.Pipe(v.source.loop, v.host.loop, v.source.memory, v.host.memory)
	v.answer(theirs, nil)
	return ours, nil
}

func (v *visit) Refuse(status int, why hbone.ProxyError) {
	v.answer(nil, &hbone.StatusError{Status: status, Proxy: why})
}

// receive takes a neighbour's visit. On the wire a TLS handshake would have
// come first: both sides have a live certificate, each trusts the other's, and
// the host's is one that the source may meet.
func (p *Pod) receive(v *visit) {
	s := p.refresh()
	if p.draining || p.closed || !v.means(s) {
		v.answer(nil, errDeclined)
		return
	}
	cert, ok := p.certs.Current(s.workload.Identity)
	if !ok || !p.proofs.hold(cert, v.cert, p.cfg.Revocations.Revision()) {
		v.answer(nil, errDeclined)
		return
	}
	v.peer = cert
	p.connected(&connect{
		answerer:  v,
		authority: v.route.Authority,
		peer:      v.cert.ID,
		certs:     [2]*certs.Certificate{cert, v.cert},
		remote:    v.client,
		local:     v.route.Dial,
		host:      v.hostname(),
		trace:     func() hbone.Trace { return v.trace },
		baggage:   v.describe,
		sameNode:  true,
	})
}

func (v *visit) hostname() string {
	if v.route.Service == nil {
		return ""
	}
	return v.route.Service.Hostname
}

// describe is the baggage as a peer would have read it.
func (v *visit) describe() hbone.Baggage {
	b, _ := hbone.ParseBaggage([]string{v.baggage})
	return b
}

// proofs remember which neighbours' certificates agree with the pod's own, since
// to verify a chain costs as much as a handshake.
type proofs struct {
	own      *certs.Certificate
	revision uint64 // of the revocation lists
	peers    map[*certs.Certificate]bool
}

// maxProofs bounds proofs; each rotation of a neighbour's certificate leaves one behind.
const maxProofs = 1024

// hold reports whether a handshake between client and own, as the server,
// would succeed. Both are live: what was proven of them stays so until the
// revocation lists change.
func (p *proofs) hold(own, client *certs.Certificate, revision uint64) bool {
	if p.own != own || p.revision != revision || len(p.peers) >= maxProofs {
		p.own, p.revision, p.peers = own, revision, make(map[*certs.Certificate]bool)
	}
	if !p.peers[client] && certs.Agree(client, own) == nil {
		p.peers[client] = true
	}
	return p.peers[client]
}
