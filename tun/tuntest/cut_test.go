package tuntest

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/ztun/ztun/tun"
)

// super is a super-segment of n bytes of payload, with options in its headers.
func super(v6 bool, n int) packet {
	ip := make([]byte, 24) // with an option
	ip[0], ip[9] = 4<<4|6, 6
	binary.BigEndian.PutUint16(ip[2:], uint16(24+32+n))
	binary.BigEndian.PutUint16(ip[4:], 0xfffe)
	copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	kind := uint8(tun.GSOTCPv4)
	if v6 {
		ip = make([]byte, 40)
		ip[0], ip[6], kind = 6<<4, 6, tun.GSOTCPv6
		binary.BigEndian.PutUint16(ip[4:], uint16(32+n))
		ip[8], ip[24], ip[39] = 0xfd, 0xfd, 1
	}
	tcp := make([]byte, 32)
	binary.BigEndian.PutUint32(tcp[4:], 0xffffff00) // wraps on the way
	tcp[12], tcp[13] = 8<<4, tcpFIN|tcpPSH|tcpCWR|0x10
	b := slices.Concat(ip, tcp, make([]byte, n))
	for i := range n {
		b[len(ip)+32+i] = byte(i * 7)
	}
	setLength(b, len(ip), 0)
	return packet{tun.Header{Flags: tun.NeedsChecksum, GSOType: kind, GSOSize: 1000, HdrLen: uint16(len(ip) + 32), CsumStart: uint16(len(ip)), CsumOffset: 16}, b}
}

// finish fills the checksum in as the receiver's kernel would.
func finish(p packet) {
	at := int(p.h.CsumStart)
	b := p.b[at:]
	if len(b)%2 == 1 {
		b = append(slices.Clone(b), 0)
	}
	binary.BigEndian.PutUint16(p.b[at+16:], ^sum(0, b))
}

// checksumOK verifies a finished segment from nothing but its addresses.
func checksumOK(b []byte, l4 int) bool {
	addrs := b[8:40]
	if b[0]>>4 == 4 {
		addrs = b[12:20]
	}
	tcp := slices.Clone(b[l4:])
	pseudo := binary.BigEndian.AppendUint32(slices.Clone(addrs), uint32(len(tcp)))
	pseudo = binary.BigEndian.AppendUint32(pseudo, 6)
	if len(tcp)%2 == 1 {
		tcp = append(tcp, 0)
	}
	return sum(0, slices.Concat(pseudo, tcp)) == 0xffff
}

func TestCutMakesTheSegmentsOfAKernel(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, n := range []int{1, 999, 1000, 1001, 2000, 2501, 60_000} {
			p := super(v6, n)
			l4, head, _ := headers(p.b, v6)
			var got []byte
			count := 0
			if !cut(p, nil, func(s packet) {
				last := count == (n-1)/1000
				if s.h.GSOType != tun.GSONone || s.h.Flags != tun.NeedsChecksum || s.h.CsumStart != uint16(l4) {
					t.Fatalf("header %+v", s.h)
				}
				finish(s)
				if !checksumOK(s.b, l4) {
					t.Errorf("v6 %v, %d bytes: wrong TCP checksum", v6, n)
				}
				if seq := binary.BigEndian.Uint32(s.b[l4+4:]); seq != 0xffffff00+uint32(count*1000) {
					t.Errorf("segment %d has sequence number %#x", count, seq)
				}
				if flags := s.b[l4+13]; flags&0x10 == 0 || (flags&(tcpFIN|tcpPSH) == tcpFIN|tcpPSH) != last || (flags&tcpCWR != 0) != (count == 0) {
					t.Errorf("segment %d of %d bytes has flags %#x", count, n, flags)
				}
				if v6 {
					if size := int(binary.BigEndian.Uint16(s.b[4:])); size+40 != len(s.b) {
						t.Errorf("payload length %d of a packet of %d", size, len(s.b))
					}
				} else if size, id := int(binary.BigEndian.Uint16(s.b[2:])), binary.BigEndian.Uint16(s.b[4:]); size != len(s.b) || id != 0xfffe+uint16(count) || sum(0, s.b[:24]) != 0xffff {
					t.Errorf("length %d of a packet of %d, id %#x", size, len(s.b), id)
				}
				got = append(got, s.b[head:]...)
				count++
			}) {
				t.Fatal("not cut")
			}
			if !bytes.Equal(got, p.b[head:]) || count != (n+999)/1000 {
				t.Errorf("v6 %v: %d bytes in %d segments of %d", v6, len(got), count, n)
			}
		}
	}
}

func TestCutLeavesOthersAlone(t *testing.T) {
	p := packet{tun.Header{Flags: tun.DataValid}, []byte("anything")}
	n := 0
	if !cut(p, nil, func(s packet) {
		n++
		if s.h != p.h || !bytes.Equal(s.b, p.b) {
			t.Errorf("%+v", s)
		}
	}) || n != 1 {
		t.Errorf("%d packets", n)
	}
}

func TestCutRefusesNonsense(t *testing.T) {
	good := super(false, 3000)
	for name, spoil := range map[string]func(*packet){
		"UDP":              func(p *packet) { p.b[9] = 17 },
		"other family":     func(p *packet) { p.h.GSOType = tun.GSOTCPv6 },
		"short IP header":  func(p *packet) { p.b[0] = 4<<4 | 4 },
		"long IP header":   func(p *packet) { p.b = p.b[:40] },
		"short TCP header": func(p *packet) { p.b[24+12] = 4 << 4 },
		"long TCP header":  func(p *packet) { p.b = p.b[:24+31] },
		"no size":          func(p *packet) { p.h.GSOSize = 0 },
		"nothing":          func(p *packet) { p.b = nil },
	} {
		p := packet{good.h, slices.Clone(good.b)}
		spoil(&p)
		if cut(p, nil, func(packet) { t.Errorf("%s: a segment came out", name) }) {
			t.Errorf("%s: taken", name)
		}
	}
}
