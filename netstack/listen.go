package netstack

import (
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// backlog is how many tunnels may wait to be taken; beyond it gVisor answers
// SYNs with cookies.
const backlog = 256

// A listener accepts HBONE connections on one address of the pod. It is a
// real listener, since that has SYN cookies: the port is open to the network.
type listener struct {
	stack  *Stack
	addr   netip.AddrPort
	ep     tcpip.Endpoint
	wq     waiter.Queue
	entry  waiter.Entry
	queued atomic.Bool
}

// listen opens the TunnelPort of the addresses that have none open, or of none of
// them after an error. It runs on the loop.
func (s *Stack) listen(addrs []netip.Addr) error {
	before := len(s.listeners)
	for _, a := range addrs {
		l := &listener{stack: s, addr: netip.AddrPortFrom(a, TunnelPort)}
		if slices.ContainsFunc(s.listeners, func(o *listener) bool { return o.addr == l.addr }) {
			continue
		}
		if err := l.open(); err != nil {
			for _, l := range s.listeners[before:] {
				l.close()
			}
			s.listeners = s.listeners[:before]
			return err
		}
		s.listeners = append(s.listeners, l)
	}
	return nil
}

func (l *listener) open() error {
	ep, err := l.stack.gv.NewEndpoint(tcp.ProtocolNumber, networkProtocol(l.addr.Addr()), &l.wq)
	if err != nil {
		return fmt.Errorf("netstack: listen on %v: %s", l.addr, err)
	}
	l.ep = ep
	if err := ep.Bind(fullAddress(l.addr)); err != nil {
		ep.Close()
		return fmt.Errorf("netstack: listen on %v: %s", l.addr, err)
	}
	l.entry = waiter.NewFunctionEntry(waiter.ReadableEvents, func(waiter.EventMask) {
		if !l.queued.Swap(true) {
			l.stack.reader.ready(l)
		}
	})
	l.wq.EventRegister(&l.entry)
	if err := ep.Listen(backlog); err != nil {
		ep.Close()
		return fmt.Errorf("netstack: listen on %v: %s", l.addr, err)
	}
	return nil
}

// woken takes the connections that were accepted.
func (l *listener) woken() {
	l.queued.Store(false)
	s := l.stack
	for !s.closed {
		var peer tcpip.FullAddress
		ep, wq, err := l.ep.Accept(&peer)
		if err != nil {
			return
		}
		l.take(ep.(*tcp.Endpoint), wq, addrPortOf(peer.Addr, peer.Port))
	}
}

func (l *listener) take(ep *tcp.Endpoint, wq *waiter.Queue, remote netip.AddrPort) {
	s := l.stack
	size := s.newSize(firstBuffer) // what the SYN-ACK's window was for
	if size == 0 {
		ep.Abort()
		return
	}
	f := s.newFlow(remote, l.addr, size)
	f.ep, f.queue = ep, wq
	s.enter(f)
	s.handler.HandleTunnel(f, remote, l.addr)
}

func (l *listener) close() { l.ep.Close() }
