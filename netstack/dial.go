package netstack

import (
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tunnel/splice"
)

// A dial is a connection being opened from the pod's stack.
type dial struct {
	flow *Flow
	done func(splice.End, error)
	stop func()
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
	size := s.newSize()
	if size == 0 {
		return fail(errLimit)
	}
	f := s.newFlow(dst, src, size)
	if err := f.open(src, dst); err != nil {
		f.release()
		return fail(err)
	}
	d := &dial{flow: f, done: done}
	f.connect = d
	s.flows[f.key] = f
	f.queue.EventRegister(&f.entry)
	d.stop = s.reader.AfterFunc(timeout, func() { d.fail(syscall.ETIMEDOUT) })
	if err := f.ep.Connect(fullAddress(dst)); err != nil {
		if _, started := err.(*tcpip.ErrConnectStarted); !started {
			e := flowError("connect", err)
			s.reader.Post(func() { d.fail(e) })
		}
	}
	return d.cancel
}

// open makes and binds the endpoint, and completes the flow's key.
func (f *Flow) open(src, dst netip.AddrPort) error {
	ep, err := f.stack.gv.NewEndpoint(tcp.ProtocolNumber, networkProtocol(dst.Addr()), &f.wq)
	if err != nil {
		return flowError("dial", err)
	}
	f.ep = ep.(*tcp.Endpoint)
	// One client may talk to two ports of the pod from one port of its own.
	f.ep.SocketOptions().SetReuseAddress(src.Port() != 0)
	if err := f.ep.Bind(fullAddress(src)); err != nil {
		f.ep.Close()
		return flowError("bind", err)
	}
	own, err := f.ep.GetLocalAddress()
	if err != nil {
		f.ep.Close()
		return flowError("bind", err)
	}
	f.key = tupleOf(dst, netip.AddrPortFrom(src.Addr(), own.Port))
	if f.stack.flows[f.key] != nil {
		f.ep.Close()
		return syscall.EADDRINUSE
	}
	return nil
}

// progress looks at the endpoint after it changed.
func (d *dial) progress() {
	f := d.flow
	switch state := f.ep.EndpointState(); {
	case isConnected(state):
		d.stop()
		f.connect = nil
		f.establish()
		d.done(f, nil)
	case state == tcp.StateError || state == tcp.StateClose:
		err := f.ep.LastError()
		if err == nil {
			err = &tcpip.ErrConnectionAborted{}
		}
		d.fail(flowError("connect", err))
	}
}

func (d *dial) fail(err error) {
	if d.end() {
		d.done(nil, err)
	}
}

func (d *dial) cancel() { d.end() }

// end gives the endpoint up, unless the dial is over already.
func (d *dial) end() bool {
	f := d.flow
	if f.connect != d {
		return false
	}
	d.stop()
	f.connect = nil
	f.over = true
	f.ep.Abort()
	f.drop()
	return true
}
