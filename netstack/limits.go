package netstack

import (
	"sync/atomic"
	"time"
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
	// Memory is the buffer capacity of all flows of the pod, in bytes. Default 512 MiB.
	Memory int64
	// Withheld is how long a SYN may wait for its answer. Default 30 s.
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
		l.Memory = 512 << 20
	}
	if l.Withheld == 0 {
		l.Withheld = 30 * time.Second
	}
	return l
}

const (
	// maxBuffer is each direction's buffer of a flow at most, in bytes: as fast
	// as 4 MiB on this kind of wire, while 256 KiB halves bulk.
	maxBuffer = 1 << 20
	// minBuffer is what a flow gets when the pod's budget is nearly used up.
	minBuffer = 16 << 10
	// firstBuffer is what a flow starts with; it grows while it is drained.
	firstBuffer = 128 << 10
)

// reserve takes the buffer capacity of one more flow out of the pod's and the
// process's budget. Each flow may take a 64th of what is left for each
// direction, so that the last one still gets something and the sum never
// exceeds the budget. It returns the bytes for one direction, or 0.
func (s *Stack) reserve() int64 {
	left := min(s.limits.Memory-s.reserved, s.reader.engine.cfg.Memory-s.reader.engine.reserved.Load())
	size := min(max(left/64, minBuffer), maxBuffer)
	if 2*size > left {
		return 0
	}
	s.reserved += 2 * size
	s.reader.engine.reserved.Add(2 * size)
	return size
}

func (s *Stack) unreserve(size int64) {
	s.reserved -= 2 * size
	s.reader.engine.reserved.Add(-2 * size)
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
	stray, writeFailed, limitConnections, limitPending, expired            atomic.Uint64
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
		Forwarded: c.forwarded.Load(), Stray: c.stray.Load(), WriteFailed: c.writeFailed.Load(),
		LimitConnections: c.limitConnections.Load(), LimitPending: c.limitPending.Load(), Expired: c.expired.Load(),
		Flows: c.flows.Load(), Pending: c.pending.Load(),
	}
}
