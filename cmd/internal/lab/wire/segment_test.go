package wire

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// frame builds an Ethernet frame with a TCP segment.
func frame(src, dst string, payload string) []byte {
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	tcp := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(tcp[0:], s.Port())
	binary.BigEndian.PutUint16(tcp[2:], d.Port())
	tcp[12] = 5 << 4
	tcp = append(tcp, payload...)
	eth := make([]byte, 14)
	var ip []byte
	if s.Addr().Is4() {
		binary.BigEndian.PutUint16(eth[12:], etherIPv4)
		ip = make([]byte, 20)
		ip[0], ip[9] = 0x45, protoTCP
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(tcp)))
		copy(ip[12:], s.Addr().AsSlice())
		copy(ip[16:], d.Addr().AsSlice())
	} else {
		binary.BigEndian.PutUint16(eth[12:], etherIPv6)
		ip = make([]byte, 40)
		ip[0], ip[6] = 0x60, protoTCP
		binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
		copy(ip[8:], s.Addr().AsSlice())
		copy(ip[24:], d.Addr().AsSlice())
	}
	return append(append(eth, ip...), tcp...)
}

func TestTapTellsTunnelsFromClearText(t *testing.T) {
	const data = "\x17\x03\x03\x00\x10................"
	tests := []struct {
		name  string
		frame []byte
		want  Seen
	}{
		{"tunnel, hello", frame("10.0.0.1:4000", "10.0.0.2:15008", "\x16\x03\x01\x00\x05hello"), Seen{Segments: 1, Tunnel: 1, Handshakes: 1}},
		{"tunnel, data, IPv6", frame("[fd00::1]:15008", "[fd00::2]:4000", data), Seen{Segments: 1, Tunnel: 1, Records: 1}},
		{"tunnel, middle of a record", frame("10.0.0.1:4000", "10.0.0.2:15008", "zzzzzzzz"), Seen{Segments: 1, Tunnel: 1}},
		{"control plane", frame("10.0.0.1:4000", "10.0.0.2:15012", data), Seen{Segments: 1}},
		{"clear", frame("10.0.0.1:4000", "10.0.0.2:80", "GET /"), Seen{Segments: 1, Clear: 1, ClearExample: "10.0.0.1:4000 > 10.0.0.2:80"}},
		{"no payload", frame("10.0.0.1:4000", "10.0.0.2:80", ""), Seen{}},
		{"word in clear", frame("10.0.0.1:4000", "10.0.0.2:80", "the canary sings"), Seen{Segments: 1, Clear: 1, ClearExample: "10.0.0.1:4000 > 10.0.0.2:80", Words: map[string]int{"canary": 1}}},
		{"word in what is no TCP", append(make([]byte, 20), "canary"...), Seen{Words: map[string]int{"canary": 1}}},
		{"cut short", frame("10.0.0.1:4000", "10.0.0.2:80", "GET /")[:40], Seen{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.want.Words == nil {
				tt.want.Words = map[string]int{"canary": 0}
			}
			tap := newTap([]string{"canary"})
			tap.frame(tt.frame)
			if diff := cmp.Diff(tt.want, tap.seen); diff != "" {
				t.Errorf("frame: (-want +got)\n%s", diff)
			}
		})
	}
}

func FuzzFrame(f *testing.F) {
	f.Add(frame("10.0.0.1:4000", "10.0.0.2:80", "GET /"))
	f.Add(frame("[fd00::1]:15008", "[fd00::2]:4000", "\x16\x03\x03\x00\x01x"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		newTap([]string{"canary"}).frame(b)
		if s, ok := parseFrame(b); ok && len(s.payload) > len(b) {
			t.Fatalf("parseFrame(%x) found %d bytes of payload", b, len(s.payload))
		}
	})
}
