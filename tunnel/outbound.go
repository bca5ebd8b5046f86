package tunnel

import (
	"net/netip"

	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/mesh"
)

// An outbound is a connection that an app of the pod opens.
type outbound struct {
	*conn
	req   Request
	asked netip.AddrPort // the destination that the app named
	self  *self
	route mesh.Route
}

// handleOutbound takes a SYN of the app: who is meant, as whom and how, then
// the SYN-ACK.
func (p *Pod) handleOutbound(r Request) {
	c, ok := p.begin(Outbound, r.Src(), r.Dst(), func(why Reason) { r.Refuse(why.Refusal()) })
	if !ok {
		return
	}
	o := &outbound{conn: c, req: r, asked: c.rec.Dst}
	if p.isProxyPort(o.asked.Port()) && (o.asked.Addr().IsLoopback() || p.isSelf(o.asked.Addr())) {
		c.fail(SelfCall, nil)
		return
	}
	if cancel := p.withSelf(o.resolve); cancel != nil {
		c.step = cancel
	}
}

// resolve finds out who is meant.
func (o *outbound) resolve(s *self) {
	o.step = nil
	if s.workload == nil {
		o.fail(UnknownWorkload, nil)
		return
	}
	o.self = s
	o.rec.SrcWorkload = s.workload
	route, err := s.snap.Resolve(s.workload, o.asked)
	if err != nil {
		o.fail(routeReason(err), err)
		return
	}
	o.route = route
	o.rec.Dst, o.rec.DstWorkload, o.rec.Service = route.Dial, route.Peer, route.Service
	if route.Kind == mesh.HBONE {
		o.rec.HBONEAddr = route.Authority
		o.rec.SrcIdentity, o.rec.DstIdentity = s.workload.Identity, route.Peer.Identity
		o.rec.Trace = hbone.NewTrace()
	}
	switch self := o.pod.isSelf(route.Target.Addr()); {
	case self && o.pod.isProxyPort(route.Target.Port()):
		o.fail(SelfCall, nil)
	case self:
		o.hairpin()
	case route.Kind == mesh.HBONE:
		o.open()
		o.tunnel()
	default:
		o.open()
		o.direct()
	}
}

// tunnel reaches the peer with both identities proven: in memory if it is a
// neighbour, else through the wire.
func (o *outbound) tunnel() {
	src, ok := o.pod.source(o.rec.Src.Addr(), o.route.Dial.Addr())
	if !ok {
		o.fail(ConnectUnreachable, nil)
		return
	}
	if o.self.workload.Identity.IsZero() {
		o.fail(NoCertificate, nil)
		return
	}
	if !o.visit(src) {
		o.wire(src)
	}
}

// visit asks the peer in memory, if it is a neighbour and the pod's own
// certificate is at hand. It reports false if the wire has to be taken.
func (o *outbound) visit(src netip.Addr) bool {
	p := o.pod
	host := p.cfg.Neighbours.find(&o.route)
	if host == nil || host == p || p.draining {
		return false
	}
	cert, ok := p.certs.Current(o.self.workload.Identity)
	if !ok {
		return false
	}
	v := &visit{
		source: p, host: host, cert: cert, route: o.route, network: o.self.workload.Network,
		client: netip.AddrPortFrom(src, o.rec.Src.Port()), trace: o.rec.Trace, baggage: o.self.baggage,
	}
	v.done = func(end splice.End, err error) {
		o.step = nil
		switch {
		case err == errDeclined:
			o.rec.SameNode = false
			o.wire(src)
		case err != nil:
			o.fail(connectReason(err), err)
		default:
			p.stats.SameNode.Add(1)
			o.rec.DstIdentity = v.peer.ID
			o.own, o.peer = cert, v.peer
			o.accept(end)
		}
	}
	o.rec.SameNode = true
	o.step = v.cancel
	v.start()
	return true
}

// wire asks the peer through the pool.
func (o *outbound) wire(src netip.Addr) {
	target := hbone.Target{
		Local: o.self.workload.Identity,
		Peer:  o.route.Peer.UID,
		Want:  o.route.Identities,
		Src:   src,
		Dst:   o.route.Dial,
	}
	connect := hbone.Connect{
		Authority: o.route.Authority,
		Baggage:   o.self.baggage,
		Client:    o.rec.Src,
		Trace:     o.rec.Trace,
	}
	if o.route.Service != nil {
		connect.Host = o.route.Service.Hostname
	}
	o.step = o.pod.pool.Connect(target, &connect, func(t *hbone.Tunnel, err error) {
		o.step = nil
		if err != nil {
			o.fail(connectReason(err), err)
			return
		}
		o.rec.DstIdentity = t.Peer
		o.accept(t.Stream)
	})
}

// direct dials the destination in plain.
func (o *outbound) direct() {
	src, ok := o.pod.source(o.rec.Src.Addr(), o.route.Dial.Addr())
	if !ok {
		o.fail(ConnectUnreachable, nil)
		return
	}
	o.dial(netip.AddrPortFrom(src, 0), o.route.Dial)
}

func (o *outbound) dial(src, dst netip.AddrPort) {
	o.step = o.pod.cfg.Stack.Dial(src, dst, o.pod.cfg.Timeouts.Connect, func(end splice.End, err error) {
		o.step = nil
		if err != nil {
			o.fail(dialReason(err), err)
			return
		}
		o.accept(end)
	})
}

// hairpin reaches the pod itself, in memory: no tunnel, but the same policies.
// The app is dialled from the service's address, since the pod's kernel would
// answer the pod's own address over lo and the answer never came back here.
func (o *outbound) hairpin() {
	p := o.pod
	o.rec.Hairpin = true
	o.open()
	if p.isSelf(o.asked.Addr()) || o.asked.Addr().Is4() != o.route.Target.Addr().Is4() {
		o.fail(NoDestination, nil)
		return
	}
	in, ok := p.begin(Inbound, o.rec.Src, o.rec.Dst, nil)
	if !ok {
		o.fail(in.rec.Reason, nil)
		return
	}
	o.twin, in.twin = in, o.conn
	in.rec.Hairpin, in.rec.HBONEAddr, in.rec.Trace = true, o.rec.HBONEAddr, o.rec.Trace
	in.rec.SrcWorkload, in.rec.DstWorkload, in.rec.Service = o.rec.SrcWorkload, o.rec.DstWorkload, o.rec.Service
	in.rec.SrcIdentity, in.rec.DstIdentity = o.rec.SrcIdentity, o.rec.DstIdentity
	in.check = &authz.Input{Src: o.rec.Src, Dst: o.route.Target, Peer: o.rec.SrcIdentity}
	in.open()
	if why, err := in.allowed(o.self, false); why != OK {
		in.fail(why, err)
		return
	}
	o.dial(netip.AddrPortFrom(o.asked.Addr(), 0), o.route.Target)
}

// accept completes the app's handshake, since the destination is there.
func (o *outbound) accept(server splice.End) {
	o.upstream = server
	o.refuse = nil
	o.req.Accept(func(client splice.End, err error) {
		switch {
		case err == nil && o.over:
			client.Reset(ErrClosed)
			client.Close()
		case err != nil:
			o.fail(ClientGone, err)
		default:
			o.run(client, server)
		}
	})
}
