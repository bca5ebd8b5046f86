package tunnel

import (
	"crypto/tls"

	"github.com/ztun/ztun/tunnel/certs"
)

// listsChanged has the loop look at all peers again.
func (p *Pod) listsChanged() {
	if !p.relisted.Swap(true) {
		p.loop.Post(p.onLists)
	}
}

// onLists ends what lives with a peer that has been revoked.
func (p *Pod) onLists() {
	p.relisted.Store(false)
	if p.closed {
		return
	}
	p.pool.CutRevoked()
	p.peers.CutRevoked()
	type pair [2]*certs.Certificate
	found := make(map[pair]error) // Many streams have the same two certificates.
	for c := range p.conns {
		if c.peer == nil {
			continue
		}
		key := pair{c.own, c.peer}
		err, known := found[key]
		if !known {
			proof := certs.NewProof(tls.ConnectionState{PeerCertificates: c.peer.Chain}, c.own, c.rec.Start)
			err = p.cfg.Revocations.Check(proof)
			found[key] = err
		}
		if err != nil {
			p.stats.Cut.Add(1)
			p.cfg.Revocations.Rejected(reporter(c.rec.Direction))
			c.cut(CertRevoked, err)
		}
	}
}

// reporter is who, as metrics say it, refuses the peer of a connection.
func reporter(d Direction) certs.Reporter {
	if d == Inbound {
		return certs.Destination
	}
	return certs.Source
}
