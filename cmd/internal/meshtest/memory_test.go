package meshtest

import (
	"fmt"
	"net"

	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/podnet"
	"github.com/ztun/ztun/xds/workloadapi"
)

// What an idle connection costs, in bytes of live heap over both nodes, one byte
// having gone each way. By the profile of 2,000; each line stands for both nodes,
// that is two of a thing. What is gVisor's comes first.
//
//	3,730  tcp.Endpoint: 1,560 each, in a size class of 1,792
//	3,030  its sender: SACK scoreboard, write list, congestion control
//	1,070  its place in the demultiplexer: two maps for each 4-tuple
//	  400  its route
//	  190  its receiver
//	  380  timers: a keepalive that waits, and five functions
//	  970  splice.Join: two directions, and what it is called by
//	  770  tunnel's conn: record and state
//	  540  h2.Stream
//	  460  netstack.Flow
//	  330  places in maps: flows, connections, streams
//	  400  the hundredth part of a tunnel: two endpoints, TLS, HTTP/2
//
// The resident size is a fifth more: spans that are not full, the heap's books.
const maxIdleConn = 14 << 10 // 12.3 KB measured

// What an idle pod with two addresses and a certificate of its own costs, in bytes
// of live heap: gVisor's stack 30 KB, of it 9 for two listeners and 8 for the second
// IP version; certificate and key 5 KB; what is ours 3 KB.
const maxIdlePod = 48 << 10 // 37 KB measured

// live is the size of the live heap, in bytes.
func live() int64 {
	for range 3 { // pools and finalizers want more than one
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestIdleConnectionIsSmall(t *testing.T) {
	const n = 1000
	eachLayout(t, func(t *testing.T, w *two) {
		idle := &idlers{listener: w.server.NS.Listen("tcp", ":8080")}
		t.Cleanup(idle.close)
		to := addr(w.server.Addr, 8080)
		idle.open(t, w.client, to, 100) // tables, pools, the first tunnels
		before := live()
		idle.open(t, w.client, to, n)
		// What was under way when the last byte arrived.
		netnstest.Eventually(t, "nothing is pending", func() bool {
			stats, _, _ := w.client.Tunnel().Stats()
			return stats.Pending.Load() == 0
		})
		each := (live() - before) / n
		t.Logf("%d bytes for each idle connection", each)
		if each > maxIdleConn {
			t.Errorf("an idle connection costs %d bytes of heap, want at most %d", each, maxIdleConn)
		}
	})
}

func TestIdlePodIsSmall(t *testing.T) {
	const warm, n = 4, 40
	m := New(t)
	node := m.Node("na")
	var pods []*Pod
	for i := range warm + n {
		p := m.Bare(fmt.Sprintf("pod-%d", i), node)
		p.Attach(podnet.Config{})
		p.Workload.TunnelProtocol = workloadapi.TunnelProtocol_HBONE
		m.Tell(p.Workload)
		pods = append(pods, p)
	}
	start := func(pods []*Pod) {
		for _, p := range pods {
			p.StartProxy()
		}
		netnstest.Eventually(t, "every pod has its certificate", func() bool {
			have := 0
			for _, s := range node.certs.Dump() {
				if s.Cert != nil {
					have++
				}
			}
			return have == len(pods) || have == warm+n
		})
	}
	start(pods[:warm])
	before, goroutines := live(), runtime.NumGoroutine()
	start(pods[warm:])
	each := (live() - before) / n
	t.Logf("%d bytes for each idle pod", each)
	if each > maxIdlePod {
		t.Errorf("an idle pod costs %d bytes of heap, want at most %d", each, maxIdlePod)
	}
	// Those that made the certificates end soon; one of gVisor's stays.
	netnstest.Eventually(t, "a goroutine for each pod, and no more", func() bool {
		return runtime.NumGoroutine()-goroutines <= n
	})
}

// idlers holds connections as bare descriptors: what Go keeps for a net.Conn
// would be measured too.
type idlers struct {
	listener net.Listener
	held     []int
}

// open opens connections one after another, and sends a byte each way on each.
func (s *idlers) open(t *testing.T, from *Pod, to string, n int) {
	t.Helper()
	for range n {
		client, err := from.NS.Dial("tcp", to, patience)
		if err != nil {
			t.Fatal(err)
		}
		server, err := s.listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
			b := []byte{'i'}
			way[1].SetDeadline(time.Now().Add(patience))
			if _, err := way[0].Write(b); err != nil {
				t.Fatal(err)
			}
			if _, err := way[1].Read(b); err != nil {
				t.Fatal(err)
			}
		}
		s.hold(t, client)
		s.hold(t, server)
	}
}

func (s *idlers) hold(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var fd int
	if cerr := raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	s.held = append(s.held, fd)
	c.Close()
}

func (s *idlers) close() {
	s.listener.Close()
	for _, fd := range s.held {
		unix.Close(fd)
	}
}
