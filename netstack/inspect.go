package netstack

import (
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// FlowInfo is what is known of a flow at one moment.
type FlowInfo struct {
	Local, Remote netip.AddrPort
	Pod           bool   // the leg to the app; else to the network
	State         string // as RFC 9293 names it
	Buffer        int64  // bytes that one direction may hold
	Unread        int    // bytes that wait to be read
	RTT, RTO      time.Duration
	Congestion    int    // congestion window, in segments
	Retransmits   uint64 // segments sent again, and
	Timeouts      uint64 // how often because nothing came for an RTO
}

// Flows tells of every flow of the pod. Any goroutine but the loop's may call
// it; it waits for the loop.
func (s *Stack) Flows() (list []FlowInfo) {
	s.onLoop(func() {
		for _, f := range s.flows {
			list = append(list, f.info())
		}
	})
	return list
}

// info runs on the loop, outside of a batch.
func (f *Flow) info() FlowInfo {
	i := FlowInfo{
		Local: f.Local(), Remote: f.Remote(), Pod: f.local, State: f.ep.EndpointState().String(), Buffer: f.size,
	}
	i.Unread, _ = f.ep.GetSockOptInt(tcpip.ReceiveQueueSizeOption)
	var t tcpip.TCPInfoOption
	if f.ep.GetSockOpt(&t) == nil {
		i.RTT, i.RTO, i.Congestion = t.RTT, t.RTO, int(t.SndCwnd)
	}
	if s, ok := f.ep.Stats().(*tcp.Stats); ok {
		i.Retransmits, i.Timeouts = s.SendErrors.Retransmits.Value(), s.SendErrors.Timeouts.Value()
	}
	return i
}
