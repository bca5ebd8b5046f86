package hbone

import (
	"errors"
	"net/netip"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/splice"
)

// A dial makes one connection for an entry: certificate, TCP, TLS, HTTP/2.
type dial struct {
	entry  *entry
	stage  Stage
	cert   *certs.Certificate
	cancel func() // of the present stage
}

func (e *entry) startDial() {
	p := e.pool
	p.dials++
	p.stats.Dials.Add(1)
	d := &dial{entry: e, stage: StageCertificate}
	e.dial = d
	if cert, ok := p.cfg.Certificates.Current(e.target.Local); ok {
		d.connect(cert)
		return
	}
	d.cancel = p.cfg.Certificates.Await(e.target.Local, func(cert *certs.Certificate, err error) {
		if err != nil {
			d.fail(err)
			return
		}
		d.connect(cert)
	})
}

func (d *dial) connect(cert *certs.Certificate) {
	t := &d.entry.target
	d.stage, d.cert = StageDial, cert
	d.cancel = d.entry.pool.cfg.Dialer.Dial(netip.AddrPortFrom(t.Src, 0), t.Dst, d.entry.pool.cfg.DialTimeout, func(end splice.End, err error) {
		if err != nil {
			d.fail(err)
			return
		}
		d.handshake(end)
	})
}

func (d *dial) handshake(end splice.End) {
	p, t := d.entry.pool, &d.entry.target
	d.stage = StageHandshake
	local := netip.AddrPortFrom(t.Src, 0)
	d.cancel = p.cfg.Handshakes.Start(p.cfg.Loop, end, AsClient, d.cert.ClientTLS(t.Want), local, t.Dst, func(conn *TLS, err error) {
		if err != nil {
			d.fail(err)
			return
		}
		d.ready(conn)
	})
}

// ready puts the connection into the pool and serves those who wait.
func (d *dial) ready(t *TLS) {
	e := d.entry
	p := e.pool
	peer, err := certs.PeerID(t.State())
	proof := proofOf(p.cfg.Revocations, t, d.cert)
	if err == nil {
		// Between the handshake and now the lists may have changed unseen by CutRevoked.
		err = p.cfg.Revocations.Check(proof)
	}
	if err != nil {
		t.Reset(err)
		t.Close()
		d.fail(err)
		return
	}
	d.done()
	c := &conn{entry: e, cert: d.cert, peer: peer, proof: proof, used: time.Now()}
	cfg := p.cfg.H2
	cfg.Client = true
	cfg.OnStream = nil
	cfg.OnGoAway = c.retire
	cfg.OnClose = func(error) { c.closed() }
	c.h2 = h2.New(p.cfg.Loop, t, &cfg)
	e.conns = append(e.conns, c)
	p.conns++
	p.stats.Conns.Store(int64(p.conns))
	p.scheduleSweep()
	if p.drain {
		// Those who waited before the drain are served still.
		defer c.retire()
	}
	e.serve()
	e.ensure()
}

// fail answers all who wait for this connection with the cause. There is no
// other attempt before somebody asks again.
func (d *dial) fail(err error) {
	stage := d.stage
	if revoked(err) {
		d.entry.pool.cfg.Revocations.Rejected(certs.Source)
	}
	d.done()
	d.entry.pool.stats.DialFails.Add(1)
	d.entry.fail(&ConnectError{stage, err})
	d.entry.release()
}

// proofOf keeps what the peer of t has shown, if that can matter later.
func proofOf(r *certs.Revocations, t *TLS, own *certs.Certificate) *certs.Proof {
	if r == nil {
		return nil
	}
	return certs.NewProof(t.State(), own, time.Now())
}

func revoked(err error) bool {
	_, ok := errors.AsType[*certs.RevokedError](err)
	return ok
}

// done makes room for the next dial.
func (d *dial) done() {
	e := d.entry
	p := e.pool
	e.dial = nil
	p.dials--
	if len(p.queue) > 0 {
		next := p.queue[0]
		p.queue = p.queue[1:]
		next.queued = false
		p.cfg.Loop.Post(next.ensure)
	}
}
