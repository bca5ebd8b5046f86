package tunnel_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// discard is a Recorder that forgets.
type discard struct{}

func (discard) Opened(*tunnel.Record) {}
func (discard) Closed(*tunnel.Record) {}
func (discard) Failed(*tunnel.Record) {}

// benchPair is two pods that know each other and have a tunnel; both ends and
// both apps run on one loop, so a figure is the sum of all they cost.
func benchPair(b *testing.B) (w *world, from *pod, dst netip.AddrPort, apps chan *splicetest.PipeEnd) {
	w = newWorld(b)
	w.edit = func(c *tunnel.Config) { c.Recorder = discard{} }
	from, to := w.start("a", "10.0.0.1"), w.start("b", "10.0.0.2")
	w.put(from.workload, to.workload)
	apps = make(chan *splicetest.PipeEnd, 1)
	w.loop.Do(func() {
		w.raw = map[netip.AddrPort]func(*splicetest.PipeEnd){netip.MustParseAddrPort("10.0.0.2:80"): func(end *splicetest.PipeEnd) { apps <- end }}
	})
	return w, from, netip.MustParseAddrPort("10.0.0.2:80"), apps
}

// open makes a connection and returns both of its ends.
func open(b *testing.B, w *world, from *pod, dst netip.AddrPort, apps chan *splicetest.PipeEnd) (client, server *splicetest.PipeEnd) {
	got := make(chan *splicetest.PipeEnd, 1)
	w.loop.Post(func() {
		from.HandleTCP(&request{w: w, src: netip.AddrPortFrom(from.addr, 40000), dst: dst, answer: func(end *splicetest.PipeEnd, how netstack.Refusal) {
			if end == nil {
				b.Errorf("refused: %v", errnos[how])
			}
			got <- end
		}})
	})
	server = <-apps
	return <-got, server
}

// BenchmarkNewStream opens and closes a connection over a pooled tunnel.
func BenchmarkNewStream(b *testing.B) {
	w, from, dst, apps := benchPair(b)
	b.ReportAllocs()
	for b.Loop() {
		client, server := open(b, w, from, dst, apps)
		w.loop.Do(func() {
			_ = client.CloseWrite()
			_ = server.CloseWrite()
		})
	}
}

// BenchmarkBulk moves 64 KiB at a time from an app through both pods to the
// other app.
func BenchmarkBulk(b *testing.B) {
	w, from, dst, apps := benchPair(b)
	client, server := open(b, w, from, dst, apps)
	const chunk = 64 << 10
	block := make([]byte, chunk)
	done := make(chan struct{})
	want, sent, read := 0, 0, 0
	write := func() {
		for sent < want {
			n, err := client.Write(block[:min(chunk, want-sent)])
			sent += n
			if err != nil {
				return
			}
		}
	}
	w.loop.Do(func() {
		client.Notify(write)
		buf := make([]byte, chunk)
		server.Notify(func() {
			for {
				n, err := server.Read(buf)
				if read += n; n > 0 && read == want {
					done <- struct{}{}
				}
				if errors.Is(err, splice.ErrAgain) || err != nil {
					return
				}
			}
		})
	})
	const batch = 64
	b.SetBytes(batch * chunk)
	b.ReportAllocs()
	for b.Loop() {
		w.loop.Post(func() { want += batch * chunk; write() })
		<-done
	}
}

// BenchmarkRequest sends one byte there and one back on an open connection.
func BenchmarkRequest(b *testing.B) {
	w, from, dst, apps := benchPair(b)
	client, server := open(b, w, from, dst, apps)
	done := make(chan struct{})
	w.loop.Do(func() {
		buf := make([]byte, 16)
		server.Notify(func() {
			if n, _ := server.Read(buf); n > 0 {
				_, _ = server.Write(buf[:n])
			}
		})
		got := make([]byte, 16)
		client.Notify(func() {
			if n, _ := client.Read(got); n > 0 {
				done <- struct{}{}
			}
		})
	})
	b.ReportAllocs()
	for b.Loop() {
		w.loop.Post(func() { _, _ = client.Write([]byte("x")) })
		<-done
	}
}
