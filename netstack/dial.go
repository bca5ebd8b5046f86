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

// bindTries bounds how often a free port is asked for again.
const bindTries = 8

// open makes and binds the endpoint, and completes the flow's key.
func (f *Flow) open(src, dst netip.AddrPort) error {
	for range bindTries {
		own, err := f.bind(src, dst)
		if err != nil {
			return err
		}
		f.key = tupleOf(dst, own)
		old := f.stack.flows[f.key]
		if old == nil {
			return nil
		}
		// gVisor gives a port back as soon as its connection is over, which we
		// may not have been told yet.
		if old.isOver() {
			old.drop()
			return nil
		}
		f.ep.Close()
		if src.Port() != 0 {
			break
		}
	}
	return syscall.EADDRINUSE
}

// bind makes the endpoint and returns the address that it was bound to.
func (f *Flow) bind(src, dst netip.AddrPort) (own netip.AddrPort, _ error) {
	ep, err := f.stack.gv.NewEndpoint(tcp.ProtocolNumber, networkProtocol(dst.Addr()), &f.wq)
	if err != nil {
		return own, flowError("dial", err)
	}
	f.ep = ep.(*tcp.Endpoint)
	// One client may talk to two ports of the pod from one port of its own.
	f.ep.SocketOptions().SetReuseAddress(src.Port() != 0)
	err = f.ep.Bind(fullAddress(src))
	if err == nil {
		var local tcpip.FullAddress
		if local, err = f.ep.GetLocalAddress(); err == nil {
			return netip.AddrPortFrom(src.Addr(), local.Port), nil
		}
	}
	f.ep.Close()
	return own, flowError("bind", err)
}

// isOver says that the endpoint sends and receives nothing any more.
func (f *Flow) isOver() bool {
	switch f.ep.EndpointState() {
	case tcp.StateClose, tcp.StateError, tcp.StateTimeWait:
		return true
	}
	return false
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
