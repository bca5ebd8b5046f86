package tunnel

import (
	"errors"
	"net/netip"
	"strings"
	"syscall"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/mesh"
)

// An inbound is a connection to the pod, plain or through a tunnel.
type inbound struct {
	*conn
	self *self
	app  netip.AddrPort // where the app listens
	from netip.AddrPort // whom the app sees
	// accept completes the client's side; it calls run or fail.
	accept func(app splice.End)
}

// handlePlain takes a SYN from the network.
func (p *Pod) handlePlain(r Request) {
	c, ok := p.begin(Inbound, r.Src(), r.Dst(), func(why Reason) { r.Refuse(why.Refusal()) })
	if !ok {
		return
	}
	if p.isProxyPort(c.rec.Dst.Port()) {
		c.fail(SelfCall, nil)
		return
	}
	in := &inbound{conn: c, app: c.rec.Dst, from: c.rec.Src}
	in.accept = func(app splice.End) { in.acceptPlain(r, app) }
	cancel := p.withSelf(func(s *self) {
		in.step = nil
		if s.workload == nil {
			in.fail(UnknownWorkload, nil)
			return
		}
		in.self = s
		in.rec.DstWorkload = s.workload
		in.rec.SrcWorkload = s.snap.WorkloadByIP(s.workload.Network, in.rec.Src.Addr())
		in.rec.Service = in.guessService("")
		in.admit(authz.Input{Src: in.rec.Src, Dst: in.app})
	})
	if cancel != nil {
		c.step = cancel
	}
}

func (in *inbound) acceptPlain(r Request, app splice.End) {
	in.refuse = nil
	r.Accept(func(client splice.End, err error) {
		switch {
		case err == nil && in.over:
			client.Reset(ErrClosed)
			client.Close()
		case err != nil:
			in.fail(ClientGone, err)
		default:
			in.run(client, app)
		}
	})
}

// A connect is a CONNECT, of a peer or of a neighbour.
type connect struct {
	answerer
	authority     string      // as sent
	peer          identity.ID // proven
	remote, local netip.AddrPort
	host, network string // what the client says: the service it called, x-forwarded-network
	trace         func() hbone.Trace
	baggage       func() hbone.Baggage
	sameNode      bool                  // a neighbour's
	certs         [2]*certs.Certificate // a neighbour's: ours and its
}

// An answerer takes the answer to a CONNECT: exactly one of Accept and Refuse.
// *hbone.Incoming is one.
type answerer interface {
	Watch(gone func(error))
	Accept(baggage *string) (splice.End, error)
	Refuse(status int, why hbone.ProxyError)
}

// handleConnect takes a CONNECT of a peer.
func (p *Pod) handleConnect(in *hbone.Incoming) {
	p.connected(&connect{
		answerer: in, authority: in.Authority, peer: in.Peer, remote: in.Remote, local: in.Local,
		host: in.Host, network: in.Network, trace: in.Trace, baggage: in.Baggage,
	})
}

// connected takes a CONNECT, on whatever way it came.
func (p *Pod) connected(req *connect) {
	c, ok := p.begin(Inbound, req.remote, req.local, func(why Reason) { req.Refuse(why.Status(), why.ProxyError()) })
	c.rec.HBONEAddr, c.rec.SameNode = req.authority, req.sameNode
	if !ok {
		return
	}
	c.rec.SrcIdentity, c.rec.Trace = req.peer, req.trace()
	c.own, c.peer = req.certs[0], req.certs[1]
	authority, err := hbone.ParseAuthority(req.authority)
	if err != nil {
		c.fail(BadRequest, err)
		return
	}
	req.Watch(func(err error) { c.cut(ClientGone, err) })
	in := &inbound{conn: c, from: netip.AddrPortFrom(c.rec.Src.Addr(), 0)}
	in.accept = func(app splice.End) { in.acceptConnect(req, app) }
	cancel := p.withSelf(func(s *self) {
		in.step = nil
		if s.workload == nil {
			in.fail(UnknownWorkload, nil)
			return
		}
		in.self = s
		in.connect(req, authority)
	})
	if cancel != nil && !c.over {
		c.step = cancel
	}
}

// connect finds the app that a CONNECT means, then asks the policies.
func (in *inbound) connect(req *connect, to hbone.Authority) {
	w := in.self.workload
	in.rec.DstWorkload, in.rec.DstIdentity = w, w.Identity
	port, why, err := in.port(to)
	if why != OK {
		in.fail(why, err)
		return
	}
	in.app = netip.AddrPortFrom(in.rec.Dst.Addr(), port)
	if req.network == "" || strings.EqualFold(req.network, w.Network) {
		in.rec.SrcWorkload = in.self.snap.WorkloadByIP(w.Network, in.rec.Src.Addr())
	}
	if in.rec.SrcWorkload == nil && !in.pod.cfg.NoResponseBaggage {
		if says := req.baggage(); says != (hbone.Baggage{}) {
			in.rec.SrcBaggage = &says
		}
	}
	host := req.host
	if to.Host != "" {
		host = to.Host
	}
	in.rec.Service = in.guessService(host)
	in.admit(authz.Input{Src: in.rec.Src, Dst: in.app, Peer: req.peer})
}

// port returns the port of the app that an authority means, in the order of
// checks that peers see.
func (in *inbound) port(to hbone.Authority) (port uint16, why Reason, err error) {
	w := in.self.workload
	if to.Host == "" && to.Addr != in.rec.Dst.Addr() && w.AppTunnel == nil {
		return 0, IPMismatch, mismatch(in.rec.Dst.Addr(), to.Addr)
	}
	port = to.Port
	if to.Host != "" {
		svc := in.self.snap.ServiceByHostname(to.Host, w.Namespace, "")
		if svc == nil {
			return 0, UnknownService, nil
		}
		target, ok := svc.TargetPort(w, to.Port)
		if !ok {
			return 0, NoPort, nil
		}
		port = target
	}
	switch {
	case in.pod.isProxyPort(port):
		return 0, SelfCall, nil
	case w.AppTunnel == nil:
	case w.AppTunnel.Proxy:
		// The app expects a PROXY header, which would not be there.
		return 0, Unsupported, &mesh.UnsupportedError{Feature: mesh.Waypoint, Name: "application tunnel of " + w.UID}
	case w.AppTunnel.Port != 0:
		port = w.AppTunnel.Port
	}
	return port, OK, nil
}

// admit registers the connection, asks the policies and dials the app.
func (in *inbound) admit(check authz.Input) {
	in.check = &check
	in.open()
	if why, err := in.allowed(in.self, false); why != OK {
		in.fail(why, err)
		return
	}
	if in.pod.isSelf(in.from.Addr()) {
		// The pod's kernel answers its own address over lo.
		from, ok := in.serviceAddr()
		if !ok {
			in.fail(NoDestination, nil)
			return
		}
		in.from = netip.AddrPortFrom(from, 0)
	}
	in.dial()
}

// dial reaches the app as the client, from the client's own port where that is
// free.
func (in *inbound) dial() {
	in.step = in.pod.cfg.Stack.Dial(in.from, in.app, in.pod.cfg.Timeouts.Connect, func(app splice.End, err error) {
		in.step = nil
		switch {
		case err == nil:
			in.upstream = app
			in.accept(app)
		case errors.Is(err, syscall.EADDRINUSE) && in.from.Port() != 0:
			in.from = netip.AddrPortFrom(in.from.Addr(), 0)
			in.dial()
		default:
			in.fail(dialReason(err), err)
		}
	})
}

func (in *inbound) acceptConnect(req answerer, app splice.End) {
	in.refuse = nil
	baggage := &in.self.baggage
	if in.pod.cfg.NoResponseBaggage {
		baggage = nil
	}
	client, err := req.Accept(baggage)
	if err != nil {
		in.fail(ClientGone, err)
		return
	}
	in.run(client, app)
}

// serviceAddr returns an address of the connection's service, of the app's
// family.
func (in *inbound) serviceAddr() (addr netip.Addr, ok bool) {
	if in.rec.Service == nil {
		return addr, false
	}
	for _, vip := range in.rec.Service.VIPs {
		if vip.Network == in.self.workload.Network && vip.Addr.Is4() == in.app.Addr().Is4() {
			return vip.Addr, true
		}
	}
	return addr, false
}

// guessService returns the service of the workload that a client called by
// host, or else the first that leads to the app's port.
func (in *inbound) guessService(host string) *mesh.Service {
	services := in.self.snap.ServicesOf(in.self.workload)
	for _, svc := range services {
		if host != "" && svc.Hostname == host {
			return svc
		}
	}
	for _, svc := range services {
		for _, port := range svc.Ports {
			if target, ok := svc.TargetPort(in.self.workload, port.Service); ok && target == in.app.Port() {
				return svc
			}
		}
	}
	return nil
}

// tunnelFailed records a connection that never came to a CONNECT.
func (p *Pod) tunnelFailed(remote, local netip.AddrPort, err error) {
	c := &Record{Direction: Inbound, Src: remote, Dst: local, Reason: acceptReason(err), Err: err}
	p.cfg.Recorder.Failed(c)
}
