package netstack

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// gVisor tells what has come behind a hole in ESTABLISHED only. A peer that
// goes on sending after our FIN takes an ACK without news for none (RFC 6675
// section 2): each loss then costs it a timeout. So such ACKs are completed here.

const (
	optNOP  = 1
	optSACK = 5
	// maxTCPHeader bounds a header with its options, in bytes.
	maxTCPHeader = 60
)

// untold returns the blocks that an ACK should tell of and does not.
func (l *link) untold(pkt *stack.PacketBuffer) []header.SACKBlock {
	f := l.handling.Load()
	if f == nil {
		return nil
	}
	switch f.ep.EndpointState() {
	case tcp.StateFinWait1, tcp.StateFinWait2:
	default:
		return nil
	}
	h := header.TCP(pkt.TransportHeader().Slice())
	// gVisor's own goroutines send for other flows meanwhile.
	if len(h) < tcpHeaderMin || h.Flags() != header.TCPFlagAck || pkt.Data().Size() > 0 || !f.sends(pkt.NetworkHeader().Slice(), h) || !f.ep.SACKPermitted {
		return nil
	}
	blocks := sackOf(f.ep)
	return blocks[:min(len(blocks), (maxTCPHeader-len(h)-4)/8)]
}

// appendSACK appends the packet of a segment without data, with the SACK option
// (RFC 2018 section 3) behind its other options.
func appendSACK(b, ip, segment []byte, blocks []header.SACKBlock) []byte {
	b = append(append(b, ip...), segment...)
	b = append(b, optNOP, optNOP, optSACK, byte(2+8*len(blocks)))
	for _, s := range blocks {
		b = binary.BigEndian.AppendUint32(b, uint32(s.Start))
		b = binary.BigEndian.AppendUint32(b, uint32(s.End))
	}
	h := header.TCP(b[len(ip):])
	h.SetDataOffset(uint8(len(h)))
	if b[0]>>4 == 4 {
		ip := header.IPv4(b)
		ip.SetTotalLength(uint16(len(b)))
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
	} else {
		header.IPv6(b).SetPayloadLength(uint16(len(h)))
	}
	p := parsePacket(b, len(b))
	h.SetChecksum(0)
	h.SetChecksum(^fold(sum(h, pseudo(p.tuple.source().Addr(), p.tuple.destination().Addr(), protoTCP, len(h)))))
	return b
}
