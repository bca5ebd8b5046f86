package cluster

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// packet is TCP of some bytes in IP, as the kernel sends it.
func packet(from, to netip.AddrPort, payload int) []byte {
	tcp := make([]byte, 20+payload)
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	tcp[12] = 5 << 4
	if from.Addr().Is4() {
		ip := make([]byte, 20)
		ip[0], ip[9] = 4<<4|5, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(tcp)))
		copy(ip[12:], from.Addr().AsSlice())
		copy(ip[16:], to.Addr().AsSlice())
		return append(ip, tcp...)
	}
	ip := make([]byte, 40)
	ip[0], ip[6] = 6<<4, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
	copy(ip[8:], from.Addr().AsSlice())
	copy(ip[24:], to.Addr().AsSlice())
	return append(ip, tcp...)
}

func TestSegments(t *testing.T) {
	for _, c := range [][2]string{{"10.0.0.1:1234", "10.0.0.2:15008"}, {"[fd00::1]:1234", "[fd00::2]:15008"}} {
		from, to := netip.MustParseAddrPort(c[0]), netip.MustParseAddrPort(c[1])
		for _, payload := range []int{0, 1, 1400} {
			p := packet(from, to, payload)
			want := Segment{From: from, To: to, Payload: payload}
			if got, ok := segment(append(p, 0, 0)); !ok || got != want { // Ethernet pads
				t.Errorf("segment of %v = %v, %t", want, got, ok)
			}
			for n := range len(p) {
				if got, ok := segment(p[:n]); ok {
					t.Fatalf("%d of %d bytes are %v", n, len(p), got)
				}
			}
		}
		udp := packet(from, to, 8)
		udp[map[bool]int{true: 9, false: 6}[from.Addr().Is4()]] = unix.IPPROTO_UDP
		if got, ok := segment(udp); ok {
			t.Errorf("UDP is %v", got)
		}
	}
}

func FuzzSegment(f *testing.F) {
	for _, text := range []string{"10.0.0.1:1", "[fd00::1]:1"} {
		a := netip.MustParseAddrPort(text)
		f.Add(packet(a, a, 3))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if s, ok := segment(p); ok && (s.Payload < 0 || s.Payload > len(p)) {
			t.Errorf("%x has a payload of %d bytes", p, s.Payload)
		}
	})
}
