package meshtest

import (
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tun/tuntest"
)

// ways are what a connection is measured over: no proxy, tunnels between two
// nodes and within one, and streams in memory.
var ways = []struct {
	name   string
	layout layout
	meshed bool
	noJoin bool
}{
	{"direct", layout{nodes: 1, readers: 1}, false, false},
	{"two nodes", layout{nodes: 2, readers: 1}, true, false},
	{"one node, wire", layout{nodes: 1, readers: 1}, true, true},
	{"one node, wire, two readers", layout{nodes: 1, readers: 2}, true, true},
	{"one node, joined", layout{nodes: 1, readers: 1}, true, false},
	{"one node, joined, two readers", layout{nodes: 1, readers: 2}, true, false},
}

// onWays runs f with a connection over each way, and reports the CPU time of
// an operation: that of the apps, the proxies and the kernel together.
func onWays(b *testing.B, f func(b *testing.B, c, s *net.TCPConn)) {
	for _, way := range ways {
		b.Run(way.name, func(b *testing.B) {
			m := New(b)
			m.Readers, m.NoJoin = way.layout.readers, way.noJoin
			na := m.Node("na")
			nb := na
			if way.layout.nodes == 2 {
				nb = m.Node("nb")
			}
			start := m.Bare
			if way.meshed {
				start = m.Pod
			}
			client, server := start("client", na), start("server", nb)
			c, s := pair(b, client, server)
			deadline := time.Now().Add(5 * time.Minute)
			c.SetDeadline(deadline)
			s.SetDeadline(deadline)
			before := cpu()
			b.ResetTimer()
			f(b, c, s)
			b.StopTimer()
			b.ReportMetric(float64(cpu()-before)/float64(b.N)/1e3, "cpu-us/op")
		})
	}
}

// cpu is the CPU time of this process so far.
func cpu() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRequest sends 100 bytes there and back on one connection.
func BenchmarkRequest(b *testing.B) {
	onWays(b, func(b *testing.B, c, s *net.TCPConn) {
		go func() {
			buf := make([]byte, 100)
			for {
				if _, err := io.ReadFull(s, buf); err != nil {
					return
				}
				if _, err := s.Write(buf); err != nil {
					return
				}
			}
		}()
		buf := make([]byte, 100)
		for range b.N {
			if _, err := c.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, buf); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkBulk sends a MiB one way.
func BenchmarkBulk(b *testing.B) { onWays(b, sendMiBs) }

// sendMiBs sends b.N times a MiB from c to s.
func sendMiBs(b *testing.B, c, s *net.TCPConn) {
	const size = 1 << 20
	b.SetBytes(size)
	go func() {
		buf := make([]byte, 256<<10)
		for range b.N * (size / len(buf)) {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 256<<10)
	for got := 0; got < b.N*size; {
		n, err := s.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		got += n
	}
}

// BenchmarkTCP sends a MiB one way, from node to node over networks that lose,
// delay and reorder, with each choice of loss detection and congestion control.
// netstack.TCP says what was chosen on these figures.
func BenchmarkTCP(b *testing.B) {
	const ms = time.Millisecond
	networks := []struct {
		name string
		path tuntest.Path
	}{
		{"clear", tuntest.Path{Cut: true}},
		{"0.1 % lost", tuntest.Path{Cut: true, Loss: 0.001}},
		{"1 % lost, 1 ms", tuntest.Path{Cut: true, Loss: 0.01, Delay: ms / 2}},
		{"1 % lost, 20 ms", tuntest.Path{Cut: true, Loss: 0.01, Delay: 10 * ms}},
		{"3 % late, 1 ms", tuntest.Path{Cut: true, Reorder: 0.03, Delay: ms / 2}},
		{"20 ms, 30 MB/s, short queue", tuntest.Path{Cut: true, Delay: 10 * ms, Rate: 30 << 20, Queue: 128 << 10}},
	}
	choices := []struct {
		name string
		tcp  netstack.TCP
	}{
		{"as chosen", netstack.TCP{}},
		{"RACK", netstack.TCP{RACK: true}},
		{"no SACK", netstack.TCP{NoSACK: true}},
		{"cubic", netstack.TCP{Network: "cubic"}},
		{"RACK, cubic", netstack.TCP{RACK: true, Network: "cubic"}},
	}
	for _, network := range networks {
		for _, choice := range choices {
			b.Run(network.name+"/"+choice.name, func(b *testing.B) {
				m := New(b)
				m.TCP = choice.tcp
				na := m.Node("na")
				far, wire := m.Far(tuntest.Options{Seed: 1})
				nb := m.NodeOn(far, "nb")
				c, s := pair(b, m.Pod("client", na), m.Pod("server", nb))
				wire.Set(network.path, network.path)
				sendMiBs(b, c, s)
			})
		}
	}
}
