package netstack

import (
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Limits bound what one pod can make the node hold.
type Limits struct {
	// Connections is the number of flows. Default 20,000; each connection
	// through the mesh is one flow, and each tunnel another.
	Connections int
	// PendingInbound and PendingOutbound are the numbers of SYNs not yet
	// accepted or refused. Default 1,024 each.
	PendingInbound, PendingOutbound int
	// PendingPerSource is the number of inbound ones of one address. Default 256.
	PendingPerSource int
	// Memory is the buffer capacity of all flows of the pod, in bytes. Default 1 GiB.
	Memory int64
	// Withheld is how long a SYN may wait for its answer. Default 40 s: longer
	// than whoever decides may take to fail.
	Withheld time.Duration
}

func (l Limits) withDefaults() Limits {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set(&l.Connections, 20_000)
	set(&l.PendingInbound, 1024)
	set(&l.PendingOutbound, 1024)
	set(&l.PendingPerSource, 256)
	if l.Memory == 0 {
		l.Memory = 1 << 30
	}
	if l.Withheld == 0 {
		l.Withheld = 40 * time.Second
	}
	return l
}

const (
	// maxBuffer is each direction's buffer of a flow at most, in bytes: as fast
	// as 4 MiB on this kind of wire, while 256 KiB halves bulk. Half of a receive
	// buffer is window, so that a tunnel, whose streams have windows of their
	// own, may receive into twice as much: what one end sends the other takes.
	maxBuffer       = 1 << 20
	maxTunnelBuffer = 2 << 20
	// firstBuffer is what a flow starts with while memory is plenty, and
	// minBuffer what it gets at least. So the default budgets are enough for
	// 20,480 flows of a pod and 81,920 of a node.
	firstBuffer = 64 << 10
	minBuffer   = 8 << 10
)

// left is what the pod may still reserve, in bytes.
func (s *Stack) left() int64 {
	e := s.reader.engine
	return min(s.limits.Memory-s.reserved, e.cfg.Memory-e.reserved.Load())
}

// reserve takes the buffer capacity of one more flow out of the pod's and the
// process's budget: the less is left, the less a flow starts with, down to
// smallest. It returns the bytes for one direction, or 0 when there is no room.
func (s *Stack) reserve(smallest int64) int64 {
	e := s.reader.engine
	for size := int64(firstBuffer); size >= smallest; size /= 2 {
		last := size == smallest
		if affords(s.limits.Memory, s.reserved, size, last) && affords(e.cfg.Memory, e.reserved.Load(), size, last) {
			s.take(2 * size)
			return size
		}
	}
	return 0
}

// affords says that a flow may start with size: while half of the budget is
// left with firstBuffer, while a quarter is with half as much, and so on to the
// last.
func affords(budget, reserved, size int64, last bool) bool {
	left := budget - reserved
	return left >= 2*size && (last || left >= budget/(2*firstBuffer)*size)
}

// forwarder returns the gVisor forwarder that answers SYNs for flows of that size.
// The window of the SYN-ACK must be the buffer's already: one that shrinks
// afterwards makes the peer's segments, and the ACKs in them, unacceptable, and
// two stacks that do it to each other never get on.
func (s *Stack) forwarder(size int64) *tcp.Forwarder {
	i := 0
	for n := int64(firstBuffer); n > size; n /= 2 {
		i++
	}
	if s.fwds[i] == nil {
		s.fwds[i] = tcp.NewForwarder(s.gv, int(size), 1, nil)
	}
	return s.fwds[i]
}

// take moves n bytes, which may be negative, out of the budgets.
func (s *Stack) take(n int64) {
	s.reserved += n
	s.reader.engine.reserved.Add(n)
}

// grow doubles the flow's buffers, if an eighth of the budget stays free for
// new ones, and if enough has moved since they last grew. It reports whether it did.
func (f *Flow) grow() bool {
	s := f.stack
	if f.moved < f.proof() || f.size >= f.maxBuffer() || f.released || s.left()-2*f.size < s.limits.Memory/8 {
		return false
	}
	s.take(2 * f.size)
	f.size *= 2
	f.moved = 0
	f.resize()
	return true
}

// proof is how many bytes must move before the buffers grow. A sender to a
// reader that stalls fills whatever there is between them, and in its own kernel
// as much as four times over: it counts what was acknowledged. So buffers are to
// have been emptied as they are: twice on the app's leg, which is fast. A tunnel
// is bounded by its streams' windows, and a round trip for nothing would hurt.
func (f *Flow) proof() int64 {
	switch {
	case f.isTunnel():
		return 0
	case f.local:
		return 2 * f.size
	}
	return f.size
}

// maxBuffer is how large the buffers of f may become.
func (f *Flow) maxBuffer() int64 {
	if f.isTunnel() {
		return maxTunnelBuffer
	}
	return maxBuffer
}

func (f *Flow) isTunnel() bool { return f.key.srcPort == TunnelPort || f.key.dstPort == TunnelPort }

// resize makes gVisor's buffers as large as what was reserved for them. Its
// own tuning, which knows no budget, is off from then on.
func (f *Flow) resize() {
	f.ep.SocketOptions().SetReceiveBufferSize(f.size, true)
	f.ep.SocketOptions().SetSendBufferSize(min(f.size, maxBuffer), true)
}

// Stats counts what happened at one pod's device since it was added. All
// values only grow, but for Flows and Pending.
type Stats struct {
	PacketsIn, PacketsOut uint64
	BytesIn, BytesOut     uint64

	BadHeader     uint64 // packets with an impossible virtio header
	Malformed     uint64 // packets that are not IP, or whose lengths lie
	NotTCP        uint64 // packets of other protocols
	ForeignSource uint64 // packets where neither address is the pod's
	BadChecksum   uint64 // datagrams and SYNs with a wrong checksum
	Drained       uint64 // packets found in the device when reading began
	Forwarded     uint64 // packets sent on at L3
	Stray         uint64 // segments of no connection, answered with a RST
	WriteFailed   uint64 // packets that the device did not take
	ICMP          uint64 // errors read from StackConfig.ICMP
	HandedOn      uint64 // packets given to StackConfig.Predecessor
	HandOnFailed  uint64 // packets that it did not take, which are lost

	LimitConnections uint64 // connections refused because of Limits.Connections or Memory
	LimitPending     uint64 // SYNs dropped because of the Limits of pending ones
	Expired          uint64 // SYNs nobody answered within Limits.Withheld

	Flows   int64
	Pending int64
}

// counters are written by the reader and, some, by gVisor's goroutines.
type counters struct {
	packetsIn, packetsOut, bytesIn, bytesOut                               atomic.Uint64
	badHeader, malformed, notTCP, foreign, badChecksum, drained, forwarded atomic.Uint64
	stray, writeFailed, limitConnections, limitPending, expired, icmp      atomic.Uint64
	handedOn, handOnFailed                                                 atomic.Uint64
	flows, pending                                                         atomic.Int64
}

// Stats may be called from anywhere.
func (s *Stack) Stats() Stats {
	c := &s.counters
	return Stats{
		PacketsIn: c.packetsIn.Load(), PacketsOut: c.packetsOut.Load(),
		BytesIn: c.bytesIn.Load(), BytesOut: c.bytesOut.Load(),
		BadHeader: c.badHeader.Load(), Malformed: c.malformed.Load(), NotTCP: c.notTCP.Load(),
		ForeignSource: c.foreign.Load(), BadChecksum: c.badChecksum.Load(), Drained: c.drained.Load(),
		Forwarded: c.forwarded.Load(), Stray: c.stray.Load(), WriteFailed: c.writeFailed.Load(), ICMP: c.icmp.Load(),
		LimitConnections: c.limitConnections.Load(), LimitPending: c.limitPending.Load(), Expired: c.expired.Load(),
		HandedOn: c.handedOn.Load(), HandOnFailed: c.handOnFailed.Load(),
		Flows: c.flows.Load(), Pending: c.pending.Load(),
	}
}
