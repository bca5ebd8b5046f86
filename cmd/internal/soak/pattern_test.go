package soak

import (
	"bytes"
	"strings"
	"testing"
)

func TestPatternIsTheSameInPieces(t *testing.T) {
	whole := make([]byte, 1000)
	fill(whole, 7, 1, 100)
	for at := range whole {
		for _, n := range []int{1, 3, 8, 21} {
			b := make([]byte, min(n, len(whole)-at))
			fill(b, 7, 1, int64(100+at))
			if !bytes.Equal(b, whole[at:at+len(b)]) {
				t.Fatalf("%d bytes at %d are %x, want %x", n, 100+at, b, whole[at:at+len(b)])
			}
			if err := check(b, 7, 1, int64(100+at)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestCheckFindsEveryWrongByte(t *testing.T) {
	b := make([]byte, 40)
	fill(b, 7, 0, 3)
	for i := range b {
		b[i] ^= 1
		if check(b, 7, 0, 3) == nil {
			t.Errorf("byte %d is wrong and was not found", i)
		}
		b[i] ^= 1
	}
}

func TestCheckTellsWhereBytesBelong(t *testing.T) {
	b := make([]byte, 64)
	for _, c := range []struct {
		why  string
		id   uint64
		dir  int
		pos  int64
		want string
	}{
		{"swapped", 8, 0, 160, "byte 160 of what the client of connection 8 sends"},
		{"mirrored", 7, 1, 160, "byte 160 of what the server of connection 7 sends"},
		{"lost", 7, 0, 168, "byte 168 of what the client of connection 7 sends"},
		{"doubled", 7, 0, 80, "byte 80 of what the client of connection 7 sends"},
		{"shifted", 7, 0, 163, "5 bytes on comes byte 168"},
	} {
		fill(b, c.id, c.dir, c.pos)
		if err := check(b, 7, 0, 160); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.why, err, c.want)
		}
	}
	if err := check(make([]byte, 64), 7, 0, 160); err == nil || !strings.Contains(err.Error(), "no pattern") {
		t.Errorf("zeros: %v", err)
	}
}

func BenchmarkCheck(b *testing.B) {
	p := make([]byte, 64<<10)
	fill(p, 7, 0, 0)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		if err := check(p, 7, 0, 0); err != nil {
			b.Fatal(err)
		}
	}
}
