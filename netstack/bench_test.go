package netstack

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
	"github.com/ztun/ztun/tunnel/splice"
)

// benchPair is a flow between two stacks, each on a reader of its own: every
// packet crosses a socket pair, a gVisor stack and a reader on either side.
func benchPair(b *testing.B, accept func(splice.End)) (*Stack, splice.End) {
	b.Helper()
	x, y := tuntest.Pair(b, tun.Options{MTU: 1500, Offload: true})
	e, err := New(Config{Readers: 2})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(e.Close)
	server := &hooks{tcp: func(q *Request) {
		q.Accept(func(end splice.End, err error) {
			if err == nil {
				accept(end)
			}
		})
	}}
	if _, err := e.Add(x, StackConfig{Addrs: []netip.Addr{pod}}, server.serve); err != nil {
		b.Fatal(err)
	}
	client, err := e.Add(y, StackConfig{Addrs: []netip.Addr{pod}}, (&hooks{}).serve)
	if err != nil {
		b.Fatal(err)
	}
	ends := make(chan splice.End, 1)
	client.Loop().Post(func() {
		client.Dial(netip.AddrPortFrom(pod, 0), service, patience, func(end splice.End, err error) {
			if err != nil {
				b.Error(err)
			}
			ends <- end
		})
	})
	return client, <-ends
}

// BenchmarkRoundTrip is one 64-byte message there and back, run to completion
// on both readers. Per operation: two packets on each side with data, and what
// pure ACKs remain.
func BenchmarkRoundTrip(b *testing.B) {
	client, end := benchPair(b, echo)
	msg, buf := make([]byte, 64), make([]byte, 64)
	done := make(chan struct{})
	b.ReportAllocs()
	b.ResetTimer()
	client.Loop().Post(func() {
		left := b.N
		end.Write(msg)
		got := 0
		end.Notify(func() {
			for {
				n, err := end.Read(buf)
				if err != nil {
					return
				}
				if got += n; got < len(msg) {
					continue
				}
				got = 0
				if left--; left == 0 {
					close(done)
					return
				}
				end.Write(msg)
			}
		})
	})
	<-done
	b.StopTimer()
	s := client.Stats()
	b.ReportMetric(float64(s.PacketsIn+s.PacketsOut)/float64(b.N), "packets/op")
}

// BenchmarkBulk moves 64 KiB an operation in one direction.
func BenchmarkBulk(b *testing.B) {
	const chunk = 64 << 10
	total := b.N * chunk
	done := make(chan struct{})
	client, end := benchPair(b, func(end splice.End) {
		buf, got := make([]byte, chunk), 0
		end.Notify(func() {
			for {
				n, err := end.Read(buf)
				if errors.Is(err, splice.ErrAgain) {
					return
				}
				if got += n; got >= total || err != nil {
					close(done)
					end.Notify(nil)
					return
				}
			}
		})
	})
	buf := make([]byte, chunk)
	b.SetBytes(chunk)
	b.ReportAllocs()
	b.ResetTimer()
	client.Loop().Post(func() {
		left := total
		end.Notify(func() {
			for left > 0 {
				n, err := end.Write(buf[:min(len(buf), left)])
				left -= n
				if err != nil {
					return
				}
			}
		})
	})
	<-done
}

// BenchmarkConnect opens and resets a connection an operation.
func BenchmarkConnect(b *testing.B) {
	client, _ := benchPair(b, echo)
	b.ReportAllocs()
	for b.Loop() {
		done := make(chan error, 1)
		client.Loop().Post(func() {
			client.Dial(netip.AddrPortFrom(pod, 0), service, patience, func(end splice.End, err error) {
				if err == nil {
					end.Reset(nil)
				}
				done <- err
			})
		})
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	}
}
