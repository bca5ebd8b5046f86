package tun

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkPacket writes a packet of 64 bytes to one end of a socket pair,
// reads it from the other, and finds nothing more there: a batch of one, the
// least favourable. "poll first" is a kernel without RWF_NOWAIT.
func BenchmarkPacket(b *testing.B) {
	for _, c := range []struct {
		name      string
		skip      int
		pollFirst bool
	}{{"all features", 0, false}, {"poll first", 0, true}, {"no header", 1, false}} {
		b.Run(c.name, func(b *testing.B) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			var ends [2]*Device
			for i, fd := range fds {
				if ends[i], err = New(os.NewFile(uintptr(fd), "pair"), Options{Offload: true}); err != nil {
					b.Fatal(err)
				}
				defer ends[i].Close()
				ends[i].skip, ends[i].pollFirst = c.skip, c.pollFirst
			}
			var v Vector
			var w Writer
			packet, buf := make([]byte, 64), make([]byte, 2048)
			v.Set(0, buf)
			b.ReportAllocs()
			for b.Loop() {
				w.Reset(Header{})
				w.Append(packet)
				if err := ends[0].WriteVector(&w); err != nil {
					b.Fatal(err)
				}
				if n, _, err := ends[1].Read(&v); n != len(packet) || err != nil {
					b.Fatalf("read %d bytes, %v", n, err)
				}
				if _, _, err := ends[1].Read(&v); err != ErrEmpty {
					b.Fatalf("read after the packet: %v, want ErrEmpty", err)
				}
			}
		})
	}
}
