package netstack

import (
	"net/netip"
	"testing"
)

func FuzzParsePacket(f *testing.F) {
	v6 := netip.MustParseAddrPort("[fd00::9]:443")
	f.Add(segment(podPort, service, flagSYN, 1, 2, []byte("payload")))
	f.Add(segment(podPort6, v6, flagACK, 1, 2, nil))
	f.Add(appendUDP(nil, podPort, service, []byte("query")))
	f.Add([]byte{0x60, 0, 0, 0, 0, 16, 0, 64})
	hop := segment(podPort6, v6, flagACK, 1, 2, nil)
	hop[6] = 44
	f.Add(hop)
	f.Fuzz(func(t *testing.T, b []byte) {
		n := len(b)
		p := parsePacket(b[:min(n, headRoom)], n)
		if p.class == classDrop {
			return
		}
		if p.total > n || p.l4 > p.total {
			t.Fatalf("%+v reaches beyond %d bytes", p, n)
		}
		if p.class == classTCP || p.class == classUDP {
			if p.payload > p.total || p.payload < p.l4 {
				t.Fatalf("payload at %d of %d", p.payload, p.total)
			}
			transportChecksumOK(&p, b, protoTCP)
			if p.tuple.reverse().reverse() != p.tuple {
				t.Fatal("reverse is not its own inverse")
			}
			_, _ = p.tuple.source(), p.tuple.destination()
		}
	})
}

func TestParsePacketClasses(t *testing.T) {
	v6dst := netip.MustParseAddrPort("[fd00::9]:443")
	options := segment(podPort, service, flagACK, 1, 1, nil)
	options[0] = 0x46
	fragment := segment(podPort, service, flagACK, 1, 1, nil)
	fragment[6] = 0x20
	hop := segment(podPort6, v6dst, flagACK, 1, 1, nil)
	hop = append(append(append([]byte{}, hop[:40]...), protoTCP, 0, 1, 4, 0, 0, 0, 0), hop[40:]...)
	hop[6], hop[5] = 0, hop[5]+8
	short := segment(podPort, service, flagACK, 1, 1, nil)
	short[32] = 0xf0 // data offset beyond the packet
	for _, c := range []struct {
		name string
		b    []byte
		want class
	}{
		{"plain v4", segment(podPort, service, flagACK, 1, 1, nil), classTCP},
		{"plain v6", segment(podPort6, v6dst, flagACK, 1, 1, nil), classTCP},
		{"fragment", fragment, classOddly},
		{"hop-by-hop", hop, classOddly},
		{"udp", appendUDP(nil, podPort, service, nil), classUDP},
		{"icmp", appendIP(nil, pod, service.Addr(), protoICMP, 0), classDrop},
		{"data offset", short, classDrop},
		{"empty", nil, classDrop},
	} {
		if got := parsePacket(c.b, len(c.b)); got.class != c.want {
			t.Errorf("%s: class %d, want %d", c.name, got.class, c.want)
		}
	}
}

func BenchmarkParsePacket(b *testing.B) {
	p := segment(podPort, service, flagACK, 1, 1, []byte("payload"))
	b.ReportAllocs()
	for b.Loop() {
		if q := parsePacket(p, len(p)); q.class != classTCP {
			b.Fatal(q.class)
		}
	}
}
