package meshtest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/podnet"
	"github.com/ztun/ztun/tunnel"
)

// paths runs f for the ways a connection takes: from pod to pod in each
// layout, and in plaintext out of and into the mesh.
func paths(t *testing.T, f func(t *testing.T, client, server *Pod)) {
	eachLayout(t, func(t *testing.T, w *two) { f(t, w.client, w.server) })
	for _, name := range []string{"plaintext out", "plaintext in"} {
		t.Run(name, func(t *testing.T) {
			m := New(t)
			n := m.Node("na")
			if name == "plaintext out" {
				f(t, m.Pod("client", n), m.Bare("server", nil))
			} else {
				f(t, m.Bare("client", nil), m.Pod("server", n))
			}
		})
	}
}

func dial(t testing.TB, p *Pod, to string) *net.TCPConn {
	t.Helper()
	c, err := p.NS.Dial("tcp", to, patience)
	if err != nil {
		t.Fatalf("%s -> %s: %v", p.Name, to, err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	return c.(*net.TCPConn)
}

// pair is both ends of one connection.
func pair(t testing.TB, client, server *Pod) (c, s *net.TCPConn) {
	t.Helper()
	return pairTo(t, client, server, server.Addr)
}

// pairTo is pair to one of the server's addresses.
func pairTo(t testing.TB, client, server *Pod, to netip.Addr) (c, s *net.TCPConn) {
	t.Helper()
	l := server.NS.Listen("tcp", ":9000")
	defer l.Close()
	accepted := make(chan *net.TCPConn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			close(accepted)
			return
		}
		accepted <- c.(*net.TCPConn)
	}()
	c = dial(t, client, addr(to, 9000))
	s = <-accepted
	if s == nil {
		t.Fatal("not accepted")
	}
	t.Cleanup(func() { s.Close() })
	s.SetDeadline(time.Now().Add(2 * time.Minute))
	return c, s
}

func mustRead(t *testing.T, c net.Conn, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

func TestHalfCloseBothWays(t *testing.T) { paths(t, halfCloseBothWays) }

func halfCloseBothWays(t *testing.T, client, server *Pod) {
	t.Helper()
	for _, clientFirst := range []bool{true, false} {
		c, s := pair(t, client, server)
		first, second := c, s
		if !clientFirst {
			first, second = s, c
		}
		io.WriteString(first, "last words")
		first.CloseWrite()
		b, err := io.ReadAll(second)
		if string(b) != "last words" || err != nil {
			t.Fatalf("read %q, %v", b, err)
		}
		io.WriteString(second, "still here")
		mustRead(t, first, "still here")
		second.CloseWrite()
		if _, err := first.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("client first %v: %v, want EOF", clientFirst, err)
		}
	}
}

func TestResetBothWays(t *testing.T) { paths(t, resetBothWays) }

func resetBothWays(t *testing.T, client, server *Pod) {
	t.Helper()
	for _, clientFirst := range []bool{true, false} {
		for _, halfClosed := range []bool{false, true} {
			c, s := pair(t, client, server)
			first, second := c, s
			if !clientFirst {
				first, second = s, c
			}
			io.WriteString(first, "x")
			mustRead(t, second, "x")
			if halfClosed {
				second.CloseWrite()
				if _, err := first.Read(make([]byte, 1)); err != io.EOF {
					t.Fatal(err)
				}
			}
			first.SetLinger(0)
			first.Close()
			if _, err := io.ReadAll(second); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("client first %v, half-closed %v: %v, want ECONNRESET", clientFirst, halfClosed, err)
			}
		}
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	paths(t, func(t *testing.T, client, server *Pod) {
		server.serve(t, ":25", func(c net.Conn) {
			io.WriteString(c, "220 ready\r\n")
			io.Copy(io.Discard, c)
			c.Close()
		})
		mustRead(t, dial(t, client, addr(server.Addr, 25)), "220 ready\r\n")
	})
}

// bulkSize is bytes in each direction; ZTUN_TEST_BULK=full moves the whole GiB.
func bulkSize() int64 {
	if os.Getenv("CI") != "" {
		return 1 << 30
	}
	return 64 << 20
}

func TestBulkBothWaysByHash(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		c, s := pair(t, w.client, w.server)
		bulkBothWays(t, c, s, bulkSize())
	})
}

// bulkBothWays sends size bytes each way at once and compares hashes.
func bulkBothWays(t *testing.T, c, s *net.TCPConn, size int64) {
	t.Helper()
	c.SetDeadline(time.Now().Add(5 * time.Minute))
	s.SetDeadline(time.Now().Add(5 * time.Minute))
	var wg sync.WaitGroup
	for i, way := range []struct{ from, to *net.TCPConn }{{c, s}, {s, c}} {
		seed := [32]byte{byte(i)}
		wg.Go(func() {
			if _, err := io.CopyN(struct{ io.Writer }{way.from}, rand.NewChaCha8(seed), size); err != nil {
				t.Errorf("write: %v", err)
			}
			way.from.CloseWrite()
		})
		wg.Go(func() {
			got, want := sha256.New(), sha256.New()
			n, err := io.CopyBuffer(got, struct{ io.Reader }{way.to}, make([]byte, 256<<10))
			if n != size || err != nil {
				t.Errorf("read %d bytes, %v; want %d", n, err, size)
			}
			io.CopyN(want, rand.NewChaCha8(seed), size)
			if string(got.Sum(nil)) != string(want.Sum(nil)) {
				t.Error("bytes differ")
			}
		})
	}
	wg.Wait()
}

func TestThousandStreamsAtOnce(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		w.server.serve(t, ":8080", func(c net.Conn) { defer c.Close(); io.Copy(c, c) })
		const n = 1000
		defer w.explain()
		conns := make([]*net.TCPConn, n)
		for i := range conns {
			conns[i] = dial(t, w.client, addr(w.server.Addr, 8080))
		}
		var wg sync.WaitGroup
		for i, c := range conns {
			wg.Go(func() {
				msg := strings.Repeat(fmt.Sprintf("stream %d ", i), 500)
				go io.WriteString(c, msg)
				b := make([]byte, len(msg))
				if _, err := io.ReadFull(c, b); err != nil || string(b) != msg {
					t.Errorf("stream %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if s := w.client.Stack().Stats(); s.Flows > n+20 {
			t.Errorf("%d flows for %d connections: streams are not pooled", s.Flows, n)
		}
	})
}

func TestTenThousandConnectionsLeaveNothing(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		defer w.explain()
		w.server.serve(t, ":8080", func(c net.Conn) {
			defer c.Close()
			// Hidden from splice(2), whose pipes live until the next collection.
			io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		})
		n := 10_000
		if os.Getenv("CI") == "" {
			n = 1000
		}
		// open is called on a thread in the client's namespace.
		open := func(i int) {
			c, err := net.DialTimeout("tcp", addr(w.server.Addr, 8080), patience)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			io.WriteString(c, "ping")
			b := make([]byte, 4)
			if _, err := io.ReadFull(c, b); err != nil {
				t.Error(err)
			}
			if i%4 == 0 {
				c.(*net.TCPConn).SetLinger(0)
			}
		}
		const workers = 8
		load := func(each int) {
			var wg sync.WaitGroup
			for range workers {
				wg.Go(func() {
					w.client.NS.Do(func() {
						for i := range each {
							open(i)
						}
					})
				})
			}
			wg.Wait()
		}
		load(10) // the pool and its goroutines come to be
		goroutines, fds := runtime.NumGoroutine(), openFiles(t)
		load(n / workers)
		netnstest.Eventually(t, "flows to end", func() bool {
			return w.client.Stack().Stats().Flows <= 2 && w.server.Stack().Stats().Flows <= 2
		})
		netnstest.Eventually(t, "records to be closed", func() bool {
			o, c := w.na.Records.Counts()
			return o == c && o >= n
		})
		netnstest.Eventually(t, "goroutines and descriptors to go", func() bool {
			return runtime.NumGoroutine() <= goroutines+16 && openFiles(t) <= fds+4
		})
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

func TestUDPAndICMPAreUntouched(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		pc := w.server.NS.ListenPacket("udp", ":5353")
		go func() {
			b := make([]byte, 1500)
			for {
				n, from, err := pc.ReadFrom(b)
				if err != nil {
					return
				}
				pc.WriteTo(b[:n], from)
			}
		}()
		before := w.client.Stack().Stats().PacketsIn
		c, err := w.client.NS.Dial("udp", addr(w.server.Addr, 5353), patience)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, "datagram")
		mustRead(t, c, "datagram")
		// A UDP port that is closed answers with ICMP, which reaches the app.
		c, err = w.client.NS.Dial("udp", addr(w.server.Addr, 9), patience)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, "x")
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("closed UDP port: %v, want ECONNREFUSED", err)
		}
		if s := w.client.Stack().Stats(); s.PacketsIn != before {
			t.Errorf("%d packets crossed the device", s.PacketsIn-before)
		}
	})
}

func TestNetworkSeesOnlyPodAddresses(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		wire := w.Fabric.Capture("p-server")
		w.server.serve(t, ":8080", hello)
		w.client.mustAsk(t, addr(w.server.Addr, 8080))
		// The gateway's own IGMP goes to all ports of the bridge.
		for _, p := range wire.Packets(func(p []byte) bool { return p[0]>>4 == 4 && p[9] != syscall.IPPROTO_IGMP }) {
			src, dst := net.IP(p[12:16]).String(), net.IP(p[16:20]).String()
			for _, a := range []string{src, dst} {
				if a != w.client.Addr.String() && a != w.server.Addr.String() {
					t.Errorf("%s -> %s on the wire", src, dst)
				}
			}
		}
	})
}

func TestBypassInboundReachesTheAppDirectly(t *testing.T) {
	m := New(t)
	n := m.Node("na")
	server := m.Bare("server", n)
	server.Join(podnet.Config{BypassInbound: true})
	strict(m, server)
	outside := m.Bare("outside", nil)
	outside.serve(t, ":8081", hello)
	server.serve(t, ":8080", hello)
	if got := outside.mustAsk(t, addr(server.Addr, 8080)).Addr(); got != outside.Addr {
		t.Errorf("server saw %v, want %v", got, outside.Addr)
	}
	if s := server.Stack().Stats(); s.Forwarded == 0 || s.Flows != 0 {
		t.Errorf("forwarded %d, flows %d", s.Forwarded, s.Flows)
	}
	// What the pod itself opens is still captured.
	server.mustAsk(t, addr(outside.Addr, 8081))
	n.Records.Wait(t, "outbound record", func(r *tunnel.Record) bool { return r.Direction == tunnel.Outbound })
}

func TestVirtualInterfaceIsOutbound(t *testing.T) {
	m := New(t)
	na, nb := m.Node("na"), m.Node("nb")
	host := m.Bare("host", na)
	vm := netnstest.New(t, "vm")
	netnstest.Veth(t, host.NS, "virbr0", vm, "eth0")
	host.NS.Addr("virbr0", "192.168.122.1/24")
	vm.Addr("eth0", "192.168.122.5/24")
	vm.Route("0.0.0.0/0", "192.168.122.1", "eth0")
	host.Join(podnet.Config{VirtualInterfaces: []string{"virbr0"}})
	server := m.Pod("server", nb)
	server.serve(t, ":8080", hello)
	c, err := vm.Dial("tcp", addr(server.Addr, 8080), patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	mustRead(t, c, "hello "+host.Addr.String())
	c.Close()
	na.Records.Wait(t, "outbound record", func(r *tunnel.Record) bool { return r.Direction == tunnel.Outbound })
}

func TestAttachKeepsEstablishedConnections(t *testing.T) {
	m := New(t)
	na, nb := m.Node("na"), m.Node("nb")
	client, server := m.Bare("client", na), m.Bare("server", nb)
	c, s := pair(t, client, server)
	const exchanges = 50
	talk := func() {
		t.Helper()
		for i := range exchanges {
			msg := fmt.Sprintf("message %d\n", i)
			io.WriteString(c, msg)
			mustRead(t, s, msg)
			io.WriteString(s, msg)
			mustRead(t, c, msg)
		}
	}
	talk()
	done := make(chan struct{})
	go func() {
		defer close(done)
		client.Join(podnet.Config{})
		server.Join(podnet.Config{})
	}()
	for running := true; running; {
		talk()
		select {
		case <-done:
			running = false
		default:
		}
	}
	talk()
	if n := client.Stack().Stats().Forwarded; n == 0 {
		t.Error("the old connection does not cross the device")
	}
	// New ones are captured.
	server.serve(t, ":8080", hello)
	client.mustAsk(t, addr(server.Addr, 8080))
	nb.Records.Wait(t, "tunnelled connection", func(r *tunnel.Record) bool { return r.MutualTLS() })
	c.CloseWrite()
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("end of the old connection: %v", err)
	}
}

func TestHairpinThroughTheService(t *testing.T) {
	m := New(t)
	p := m.Pod("server", m.Node("na"))
	vip := m.Service("server", 80, 8080, p)
	p.serve(t, ":8080", hello)
	if got := p.mustAsk(t, vip.String()).Addr(); got != vip.Addr() {
		t.Errorf("the app saw %v, want the service's %v", got, vip.Addr())
	}
}
