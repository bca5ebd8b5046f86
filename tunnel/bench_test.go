package tunnel_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/splice"
)

// discard is a Recorder that forgets.
type discard struct{}

func (discard) Opened(*tunnel.Record) {}
func (discard) Closed(*tunnel.Record) {}
func (discard) Failed(*tunnel.Record) {}

// A bench is two pods that know each other. Both apps run on the loops of their
// pods, so a figure is the sum of all that they cost.
type bench struct {
	*testing.B
	from, to       *pod
	dst            netip.AddrPort
	accepted       chan splice.End
	client, server splice.End // of the last connection opened
}

// onPaths runs f for each path.
func onPaths(b *testing.B, f func(b *bench)) {
	for _, p := range paths {
		b.Run(p.name, func(b *testing.B) {
			w := newWorld(b, p)
			w.edit = func(c *tunnel.Config) { c.Recorder = discard{} }
			v := &bench{B: b, from: w.start("a", "10.0.0.1"), to: w.start("b", "10.0.0.2"), accepted: make(chan splice.End, 1)}
			v.dst = netip.MustParseAddrPort("10.0.0.2:80")
			w.raw = map[netip.AddrPort]func(splice.End){v.dst: func(end splice.End) { v.accepted <- end }}
			w.put(v.from.workload, v.to.workload)
			// The first connection waits for the certificates.
			v.open()
			b.ReportAllocs()
			b.ResetTimer()
			f(v)
		})
	}
}

// open makes a connection.
func (b *bench) open() {
	got := make(chan splice.End, 1)
	r := &request{pod: b.from, from: b.from.loop, src: netip.AddrPortFrom(b.from.addr, 40000), dst: b.dst, answer: func(end splice.End, how netstack.Refusal) {
		if end == nil {
			b.Errorf("refused: %v", errnos[how])
		}
		got <- end
	}}
	b.from.loop.Post(func() { b.from.HandleTCP(r) })
	b.server = <-b.accepted
	b.client = <-got
}

// BenchmarkNewStream opens and closes a connection; on the wire it is a stream
// of a pooled tunnel.
func BenchmarkNewStream(b *testing.B) {
	onPaths(b, func(b *bench) {
		for b.Loop() {
			b.open()
			b.from.loop.Do(func() { _ = b.client.CloseWrite() })
			b.to.loop.Do(func() { _ = b.server.CloseWrite() })
		}
	})
}

// BenchmarkBulk moves 64 KiB at a time from an app through both pods to the
// other app.
func BenchmarkBulk(b *testing.B) {
	onPaths(b, func(b *bench) {
		const chunk = 64 << 10
		block, buf := make([]byte, chunk), make([]byte, chunk)
		done := make(chan struct{})
		total, sent, read := b.N*chunk, 0, 0
		b.SetBytes(chunk)
		b.to.loop.Do(func() {
			b.server.Notify(func() {
				for {
					n, err := b.server.Read(buf)
					if read += n; n > 0 && read == total {
						close(done)
					}
					if errors.Is(err, splice.ErrAgain) || err != nil {
						return
					}
				}
			})
		})
		b.from.loop.Do(func() {
			b.client.Notify(func() {
				for sent < total {
					n, err := b.client.Write(block[:min(chunk, total-sent)])
					if sent += n; err != nil {
						return
					}
				}
			})
		})
		<-done
	})
}

// BenchmarkRequest sends one byte there and one back on an open connection.
func BenchmarkRequest(b *testing.B) {
	onPaths(b, func(b *bench) {
		done := make(chan struct{})
		b.to.loop.Do(func() {
			buf := make([]byte, 16)
			b.server.Notify(func() {
				if n, _ := b.server.Read(buf); n > 0 {
					_, _ = b.server.Write(buf[:n])
				}
			})
		})
		b.from.loop.Do(func() {
			buf := make([]byte, 16)
			left := b.N
			b.client.Notify(func() {
				if n, _ := b.client.Read(buf); n == 0 {
					return
				}
				if left--; left == 0 {
					close(done)
					return
				}
				_, _ = b.client.Write([]byte("x"))
			})
			_, _ = b.client.Write([]byte("x"))
		})
		<-done
	})
}
