package netstack

import (
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/ztun/ztun/tun"
)

// link is the stack's interface: what gVisor sends becomes one writev to the
// device. It claims no checksum offload: with it, SYN and SYN-ACK would leave
// without a checksum and the kernel would drop them. Segments that carry GSO
// options ask for a partial checksum instead.
type link struct {
	stack      *Stack
	dispatcher stack.NetworkDispatcher
	// vouched says that the kernel answers for the checksum of the packet that
	// is being delivered. gVisor asks for the capability with each packet; claimed
	// for all, it would take a packet with any checksum.
	vouched atomic.Bool
	// handling is the flow whose segments the reader handles, set with its
	// endpoint locked; writing the one that the reader writes to. See ack.go.
	handling, writing atomic.Pointer[Flow]
}

var _ stack.LinkEndpoint = (*link)(nil)
var _ stack.GSOEndpoint = (*link)(nil)
var _ stack.QueueingDiscipline = (*link)(nil)

func (l *link) MTU() uint32                             { return l.stack.dev.MTU() }
func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Attach(d stack.NetworkDispatcher)        { l.dispatcher = d }
func (l *link) IsAttached() bool                        { return l.dispatcher != nil }
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}

func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	if l.vouched.Load() {
		return stack.CapabilityRXChecksumOffload
	}
	return stack.CapabilityNone
}

// GSOMaxSize is the largest packet gVisor may send, in bytes.
func (l *link) GSOMaxSize() uint32 { return tun.MaxPacket }

func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.stack.dev.Offload() {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// A transmit is kept from packet to packet; WritePacket is called by the
// reader and by gVisor's timers.
type transmit struct {
	tun.Writer
	flat []byte // for a packet of more parts than a Writer takes
}

var transmits = sync.Pool{New: func() any { return new(transmit) }}

// WritePackets implements stack.LinkWriter; gVisor's own path is WritePacket.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for i, pkt := range pkts.AsSlice() {
		if err := l.WritePacket(pkt); err != nil {
			return i, err
		}
	}
	return pkts.Len(), nil
}

// WritePacket implements stack.QueueingDiscipline. gVisor's default one makes
// a list of every packet, which is an allocation each.
func (l *link) WritePacket(pkt *stack.PacketBuffer) tcpip.Error {
	if l.waits(pkt) {
		return nil
	}
	t := transmits.Get().(*transmit)
	defer transmits.Put(t)
	if blocks := l.untold(pkt); len(blocks) > 0 {
		t.flat = appendSACK(t.flat[:0], pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice(), blocks)
		t.Reset(noOffload)
		t.Append(t.flat)
	} else {
		t.Reset(virtioHeader(pkt))
		t.append(pkt)
	}
	c := &l.stack.counters
	if err := l.stack.dev.WriteVector(&t.Writer); err != nil {
		c.writeFailed.Add(1)
		return &tcpip.ErrNoBufferSpace{}
	}
	c.packetsOut.Add(1)
	c.bytesOut.Add(uint64(pkt.Size()))
	return nil
}

// append adds the packet's bytes in place, or a copy of them when the app
// wrote so little at a time that they lie in too many pieces.
func (t *transmit) append(pkt *stack.PacketBuffer) {
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		n := min(skip, len(b))
		skip -= n
		if !t.Append(b[n:]) {
			t.flatten(pkt)
			return
		}
	}
}

func (t *transmit) flatten(pkt *stack.PacketBuffer) {
	t.flat = t.flat[:0]
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		n := min(skip, len(b))
		skip -= n
		t.flat = append(t.flat, b[n:]...)
	}
	t.Reset(virtioHeader(pkt))
	t.Append(t.flat)
}

// virtioHeader says what is left to the kernel: the checksum, and cutting
// payload that exceeds one segment.
func virtioHeader(pkt *stack.PacketBuffer) (h tun.Header) {
	o := &pkt.GSOOptions
	if o.Type == stack.GSONone {
		return h
	}
	h.HdrLen = uint16(pkt.HeaderSize())
	if o.NeedsCsum {
		h.Flags = tun.NeedsChecksum
		h.CsumStart = o.L3HdrLen
		h.CsumOffset = o.CsumOffset
	}
	if pkt.Data().Size() > int(o.MSS) {
		h.GSOType = tun.GSOTCPv4
		if o.Type == stack.GSOTCPv6 {
			h.GSOType = tun.GSOTCPv6
		}
		h.GSOSize = o.MSS
	}
	return h
}
