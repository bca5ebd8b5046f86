package tunnel

import (
	"errors"
	"net/netip"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/authz"
)

// A conn is one connection, from the question of an edge to its record. Its
// life: begin, then opened, then join or fail, and finish once.
type conn struct {
	pod *Pod
	rec Record
	// refuse answers the edge that asked; nil once it was answered.
	refuse func(Reason)
	// step undoes what is under way: a wait, a dial, a CONNECT.
	step func()
	// upstream is the server's side while the client's is being accepted.
	upstream splice.End
	join     *splice.Join
	twin     *conn // the other half of a hairpin
	// own and peer are the certificates under which a stream was handed over in
	// memory; on the wire the tunnel has them. Nil: none.
	own, peer *certs.Certificate
	check     *authz.Input // inbound: what the policies judge
	opened    bool         // the Recorder knows of it
	over      bool
}

// begin takes a question. It reports false if it was refused for a limit.
func (p *Pod) begin(dir Direction, src, dst netip.AddrPort, refuse func(Reason)) (*conn, bool) {
	c := &conn{pod: p, refuse: refuse}
	c.rec = Record{Direction: dir, Start: time.Now(), Src: canonical(src), Dst: canonical(dst)}
	full := len(p.conns) >= p.cfg.Limits.Conns || p.pending >= p.cfg.Limits.Pending
	p.conns[c] = struct{}{}
	p.count(1)
	switch {
	case p.closed:
		c.fail(Closed, nil)
	case full:
		p.stats.Limited.Add(1)
		c.fail(Limit, nil)
	}
	return c, !c.over
}

func (p *Pod) count(pending int) {
	p.pending += pending
	p.stats.Pending.Store(int64(p.pending))
	p.stats.Live.Store(int64(len(p.conns)))
}

// open tells the Recorder of the connection.
func (c *conn) open() {
	c.opened = true
	c.pod.cfg.Recorder.Opened(&c.rec)
}

// fail refuses a connection that has not been accepted.
func (c *conn) fail(why Reason, err error) {
	if c.over {
		return
	}
	if c.step != nil {
		c.step()
		c.step = nil
	}
	if c.upstream != nil {
		c.upstream.Reset(&ReasonError{why, err})
		c.upstream.Close()
		c.upstream = nil
	}
	if c.refuse != nil {
		refuse := c.refuse
		c.refuse = nil
		refuse(why)
	}
	c.finish(why, err)
	if c.twin != nil {
		c.twin.fail(why, err)
	}
}

// cut ends the connection whatever state it is in.
func (c *conn) cut(why Reason, err error) {
	if c.join != nil {
		c.join.Cut(&ReasonError{why, err})
		return
	}
	c.fail(why, err)
}

// run joins the client's end and the server's.
func (c *conn) run(client, server splice.End) {
	c.upstream = nil
	c.pod.count(-1)
	join := splice.Start(c.pod.loop, client, server, splice.Options{}, c.joined)
	c.join = join
	if c.twin != nil {
		c.twin.join = join
		c.pod.count(-1)
	}
}

// joined records a connection whose both directions have ended.
func (c *conn) joined(r splice.Result) {
	why, err := c.verdict(r)
	c.finish(why, err)
	if c.twin != nil {
		c.twin.finish(why, err)
	}
}

// verdict says why a join ended.
func (c *conn) verdict(r splice.Result) (Reason, error) {
	if r.Err == nil {
		return OK, nil
	}
	if ours, ok := errors.AsType[*ReasonError](r.Err); ok {
		return ours.Reason, ours.Err
	}
	switch {
	case revoked(r.Err):
		return CertRevoked, r.Err
	case errors.Is(r.Err, h2.ErrConnLost):
		return TunnelLost, r.Err
	case r.From == splice.SideA:
		return ClientReset, r.Err
	case r.From == splice.SideB:
		return ServerReset, r.Err
	}
	return Failed, r.Err
}

// finish hands out the record, once, and forgets the connection.
func (c *conn) finish(why Reason, err error) {
	if c.over {
		return
	}
	c.over = true
	p := c.pod
	delete(p.conns, c)
	if c.join == nil {
		p.count(-1)
	} else {
		p.count(0)
		c.rec.setBytes(c.join.Counts())
	}
	c.rec.Duration = time.Since(c.rec.Start)
	c.rec.Reason, c.rec.Err = why, err
	if c.opened {
		p.cfg.Recorder.Closed(&c.rec)
	} else {
		p.cfg.Recorder.Failed(&c.rec)
	}
	p.checkDrained()
}

// setBytes takes what went from the client to the server and back.
func (r *Record) setBytes(request, response uint64) {
	if r.Direction == Outbound {
		r.Sent, r.Received = request, response
	} else {
		r.Received, r.Sent = request, response
	}
}
