package netstack

import (
	"math/rand/v2"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tunnel/splice"
)

// An opening is a connection whose handshake is under way, whoever began it.
type opening struct {
	op   string // for errors
	flow *Flow
	done func(splice.End, error)
	stop func()
}

// begin waits for the handshake of f, whose endpoint has begun it. done is
// called on the loop, once, with f or the error that ended the handshake.
func (f *Flow) begin(op string, timeout time.Duration, done func(splice.End, error)) *opening {
	o := &opening{op: op, flow: f, done: done}
	f.opening = o
	f.stack.flows[f.key] = f
	f.queue.EventRegister(&f.entry)
	o.stop = f.stack.reader.AfterFunc(timeout, func() { o.fail(syscall.ETIMEDOUT) })
	return o
}

// Dial opens a connection from any address: the pod's, towards the network,
// or a client's, towards the app. Port 0 takes a free one. done is called on
// the loop, once: with the flow, or with an error that matches, by errors.Is,
// ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT (after timeout) or
// EADDRINUSE (the source port is taken). After cancel, which also runs on the
// loop, it is not called.
func (s *Stack) Dial(src, dst netip.AddrPort, timeout time.Duration, done func(splice.End, error)) (cancel func()) {
	cancelled := false
	fail := func(err error) func() {
		s.reader.Post(func() {
			if !cancelled {
				done(nil, err)
			}
		})
		return func() { cancelled = true }
	}
	smallest := int64(minBuffer)
	if dst.Port() == TunnelPort {
		smallest = firstBuffer // as at its other end, see listener.take
	}
	size := s.newSize(smallest)
	if size == 0 {
		return fail(errLimit)
	}
	f := s.newFlow(dst, src, size)
	if err := f.open(src, dst); err != nil {
		f.release()
		return fail(err)
	}
	o := f.begin("connect", timeout, done)
	if err := f.ep.Connect(fullAddress(dst)); err != nil {
		if _, started := err.(*tcpip.ErrConnectStarted); !started {
			e := flowError("connect", err)
			s.reader.Post(func() { o.fail(e) })
		}
	}
	return o.cancel
}

// The ports that a dial without one takes, as gVisor's own.
const (
	firstPort = 16000
	lastPort  = 65535
	// portTries bounds how many are looked at.
	portTries = 1024
	// portStep is how far from the last port the next one is at most: "the
	// random-increments port selection algorithm". A port is not the last one's
	// again, whose RST the peer may not have seen.
	// https://www.rfc-editor.org/rfc/rfc6056#section-3.3.5
	portStep = 500
	// PortParts is how many parts the ports have, each with every so many-th one.
	PortParts = 4
)

// open makes the endpoint and completes the flow's key with a port that is free.
func (f *Flow) open(src, dst netip.AddrPort) error {
	own, err := f.stack.freePort(src, dst)
	if err != nil {
		return err
	}
	ep, e := f.stack.gv.NewEndpoint(tcp.ProtocolNumber, networkProtocol(dst.Addr()), &f.wq)
	if e != nil {
		return flowError("dial", e)
	}
	f.key = tupleOf(dst, own)
	f.ep = ep.(*tcp.Endpoint)
	// Not Bind: that would reserve the port for all destinations and take 1.5 KiB
	// of maps. Nobody else sees the endpoint yet.
	f.ep.TransportEndpointInfo.ID.LocalAddress = tcpip.AddrFromSlice(own.Addr().AsSlice())
	f.ep.TransportEndpointInfo.ID.LocalPort = own.Port()
	f.ep.SocketOptions().SetReceiveBufferSize(f.size, false)
	return nil
}

// freePort completes src with a port from which dst has no connection, or says
// whether src's own is free.
func (s *Stack) freePort(src, dst netip.AddrPort) (netip.AddrPort, error) {
	if src.Port() != 0 {
		if !s.isFree(tupleOf(dst, src)) {
			return src, syscall.EADDRINUSE
		}
		return src, nil
	}
	const ports = lastPort - firstPort + 1
	s.port = (s.port + 1 + rand.N(uint32(portStep))) % ports
	if part := uint32(s.cfg.PortPart); part > 0 {
		s.port = (s.port + (part+PortParts-s.port%PortParts)%PortParts) % ports // A multiple of PortParts.
		if own, ok := s.firstFree(src.Addr(), dst, PortParts); ok {
			return own, nil
		}
	}
	if own, ok := s.firstFree(src.Addr(), dst, 1); ok {
		return own, nil
	}
	return src, syscall.EADDRINUSE
}

// firstFree looks at every step-th port from the last one on.
func (s *Stack) firstFree(src netip.Addr, dst netip.AddrPort, step uint32) (own netip.AddrPort, ok bool) {
	for range portTries {
		own = netip.AddrPortFrom(src, uint16(firstPort+s.port))
		if s.isFree(tupleOf(dst, own)) {
			return own, true
		}
		s.port = (s.port + step) % (lastPort - firstPort + 1)
	}
	return own, false
}

// isFree says that a connection may be made whose peer's packets show key.
func (s *Stack) isFree(key tuple) bool {
	if s.pending[key] != nil || s.bypass.flows[key] != nil || s.bypass.flows[key.reverse()] != nil {
		return false
	}
	old := s.flows[key]
	if old == nil {
		return true
	}
	switch old.ep.EndpointState() {
	case tcp.StateClose, tcp.StateError:
		// gVisor has forgotten the connection, of which we may not have been
		// told yet. One in TIME_WAIT it still knows.
		old.drop()
		return true
	}
	return false
}

// progress looks at the endpoint after it changed.
func (o *opening) progress() {
	f := o.flow
	switch state := f.ep.EndpointState(); {
	case isConnected(state):
		o.stop()
		f.opening = nil
		forgetHandshake(f.ep)
		f.establish()
		o.done(f, nil)
	case state == tcp.StateError || state == tcp.StateClose:
		err := f.ep.LastError()
		if err == nil {
			err = &tcpip.ErrConnectionAborted{}
		}
		o.fail(flowError(o.op, err))
	}
}

func (o *opening) fail(err error) {
	if o.end() {
		o.done(nil, err)
	}
}

func (o *opening) cancel() { o.end() }

// end gives the endpoint up, unless the handshake is over already.
func (o *opening) end() bool {
	f := o.flow
	if f.opening != o {
		return false
	}
	o.stop()
	f.opening = nil
	f.over = true
	f.ep.Abort()
	f.drop()
	return true
}
