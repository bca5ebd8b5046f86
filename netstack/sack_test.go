package netstack

import (
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/ztun/ztun/tun"
)

// Who has sent its FIN tells of holes as before: the other side may send for
// long, and takes an ACK without news for none.
func TestHolesAreToldAfterOurFIN(t *testing.T) {
	for name, ends := range map[string][2]netip.AddrPort{
		"IPv4":    {podPort, service},
		"IPv6":    {podPort6, netip.MustParseAddrPort("[fd00::9]:80")},
		"network": {client, netip.AddrPortFrom(pod, 80)},
	} {
		t.Run(name, func(t *testing.T) {
			src, dst := ends[0], ends[1]
			r := newRawRig(t, StackConfig{})
			accept, ch := accepting(t, r.stack)
			on(r.stack, r.handler, func(h *hooks) { h.tcp = accept })
			r.write(tun.Header{}, segmentWith(timestamps(true, 1, 0), src, dst, flagSYN, 100, 0, nil))
			b, _ := r.read()
			ack := seqOf(b) + 1
			r.write(tun.Header{}, segmentWith(timestamps(false, 1, 0), src, dst, flagACK, 101, ack, nil))
			c := <-ch
			send := func(seq uint32, want ...header.SACKBlock) {
				t.Helper()
				r.write(tun.Header{}, segmentWith(timestamps(false, 2, 0), src, dst, flagACK, seq, ack, make([]byte, 10)))
				b, h := r.read()
				p := parsePacket(b, len(b))
				got := optionsOf(b)
				if flagsOf(b) != flagACK || ackOf(b) != 101 || p.total != len(b) || p.payload != len(b) || !got.TS {
					t.Errorf("flags %#x, ack %d, %d bytes of %d, timestamps %v, want an ACK of 101", flagsOf(b), ackOf(b), p.total, len(b), got.TS)
				}
				if h.Flags&tun.NeedsChecksum == 0 && !transportChecksumOK(&p, b, protoTCP) || !p.v6 && fold(sum(b[:p.l4], 0)) != 0xffff {
					t.Error("a checksum is wrong")
				}
				for i, s := range want {
					if len(got.SACKBlocks) != len(want) || got.SACKBlocks[i] != s {
						t.Fatalf("SACK blocks %v, want %v", got.SACKBlocks, want)
					}
				}
			}
			send(201, header.SACKBlock{Start: 201, End: 211})
			c.CloseWrite()
			if b, _ = r.read(); flagsOf(b)&flagFIN == 0 {
				t.Fatalf("flags %#x, want FIN", flagsOf(b))
			}
			send(301, header.SACKBlock{Start: 301, End: 311}, header.SACKBlock{Start: 201, End: 211}) // FIN-WAIT-1
			ack++
			r.write(tun.Header{}, segmentWith(timestamps(false, 2, 0), src, dst, flagACK, 101, ack, nil))
			send(401, header.SACKBlock{Start: 401, End: 411}, header.SACKBlock{Start: 301, End: 311}, header.SACKBlock{Start: 201, End: 211}) // FIN-WAIT-2
			send(501, header.SACKBlock{Start: 501, End: 511}, header.SACKBlock{Start: 401, End: 411}, header.SACKBlock{Start: 301, End: 311})
		})
	}
}
