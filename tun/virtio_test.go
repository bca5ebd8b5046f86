package tun

import (
	"errors"
	"testing"
)

func FuzzHeader(f *testing.F) {
	f.Add([]byte{1, 1, 40, 0, 0xa8, 5, 20, 0, 16, 0}, 3000)
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 40)
	f.Add([]byte{1, 4, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff}, 60)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if len(b) < HeaderSize || n < 0 || n > MaxPacket {
			return
		}
		raw := [HeaderSize]byte(b)
		h := decodeHeader(&raw)
		var back [HeaderSize]byte
		h.encode(&back)
		if back != raw {
			t.Fatalf("%x becomes %x", raw, back)
		}
		if h.validate(n) != nil {
			return
		}
		if h.Flags&NeedsChecksum != 0 && int(h.CsumStart)+int(h.CsumOffset)+2 > n {
			t.Fatalf("%+v: checksum lies outside of %d bytes", h, n)
		}
	})
}

func TestHeaderNamesTheImpossibleField(t *testing.T) {
	for _, c := range []struct {
		h     Header
		n     int
		field string
	}{
		{Header{}, 0, "packet length"},
		{Header{Flags: NeedsChecksum, CsumStart: 20, CsumOffset: 19}, 40, "csum_start+csum_offset"},
		{Header{GSOType: GSOUDP, GSOSize: 1}, 40, "gso_type"},
		{Header{GSOType: GSOTCPv4}, 40, "gso_size"},
		{Header{GSOType: GSOTCPv6, GSOSize: 1, HdrLen: 41}, 40, "hdr_len"},
	} {
		var bad *HeaderError
		if err := c.h.validate(c.n); !errors.As(err, &bad) || bad.Field != c.field {
			t.Errorf("%+v of %d bytes: %v, want %s", c.h, c.n, err, c.field)
		}
	}
	ok := Header{Flags: NeedsChecksum, GSOType: GSOTCPv4, GSOSize: 1448, HdrLen: 40, CsumStart: 20, CsumOffset: 16}
	if err := ok.validate(9000); err != nil {
		t.Errorf("%+v: %v", ok, err)
	}
}
