package meshtest

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/podnet"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/xds/securityapi"
)

// unreachable makes the fabric answer for a prefix with an ICMP error.
func (m *Mesh) unreachable(prefix string, typ int) {
	m.T.Helper()
	m.Fabric.SetSysctl("net/ipv4/ip_forward", "1")
	m.Fabric.SetSysctl("net/ipv6/conf/all/forwarding", "1")
	dst, err := netlink.ParseIPNet(prefix)
	if err != nil {
		m.T.Fatal(err)
	}
	if err := m.Fabric.Netlink().RouteAdd(&netlink.Route{Dst: dst, Type: typ}); err != nil {
		m.T.Fatalf("route %s: %v", prefix, err)
	}
}

func TestUnreachableIsTruthful(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		const unreachable = 7 // RTN_UNREACHABLE
		w.unreachable("10.9.0.0/16", unreachable)
		w.unreachable("fd00:9::/64", unreachable)
		w.server.Workload.Addresses = append(w.server.Workload.Addresses, netip.MustParseAddr("10.9.0.2").AsSlice())
		w.Tell(w.server.Workload)
		for _, c := range []struct{ name, to string }{
			{"plaintext v4", "10.9.0.1:80"},
			{"plaintext v6", "[fd00:9::1]:80"},
			{"tunnel", "10.9.0.2:80"},
		} {
			t.Run(c.name, func(t *testing.T) {
				if _, err := w.client.ask(t, c.to, "x"); !errors.Is(err, syscall.EHOSTUNREACH) {
					t.Errorf("%v, want EHOSTUNREACH", err)
				}
			})
		}
		if n := w.client.Stack().Stats().ICMP; n < 3 {
			t.Errorf("%d ICMP errors were read, want 3", n)
		}
	})
}

func TestNoAnswerIsATimeout(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		const blackhole = 6 // RTN_BLACKHOLE
		w.unreachable("10.9.0.0/16", blackhole)
		_, err := w.client.NS.Dial("tcp", "10.9.0.1:80", 2*time.Second)
		if err == nil || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("%v, want a timeout", err)
		}
	})
}

// A device that nobody reads fills up and drops; nothing leaves another way,
// and the next reader serves again.
func TestFullDeviceBlackholesAndRecovers(t *testing.T) {
	m := New(t)
	na, nb := m.Node("na"), m.Node("nb")
	server := m.Pod("server", nb)
	server.serve(t, ":8080", hello)
	client := m.Bare("client", na)
	client.Workload.TunnelProtocol = server.Workload.TunnelProtocol
	m.Tell(client.Workload)
	client.Attach(podnet.Config{})
	wire := m.Fabric.Capture("p-client")
	for range 6000 {
		c, err := client.NS.Dial("tcp", addr(server.Addr, 8080), time.Microsecond)
		if err == nil {
			c.Close()
			t.Fatal("connected without a proxy")
		}
	}
	if leaks := wire.Packets(func(p []byte) bool { return p[0]>>4 == 4 && p[9] == 6 }); len(leaks) > 0 {
		t.Fatalf("%d TCP packets left the pod", len(leaks))
	}
	client.StartProxy()
	if n := client.Stack().Stats().Drained; n == 0 {
		t.Error("nothing was drained")
	}
	client.mustAsk(t, addr(server.Addr, 8080))
}

// What a proxied flow sends after its proxy died gets a RST from the next
// proxy, never a way out.
func TestNothingLeavesAfterTheProxyDied(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		w.server.serve(t, ":8080", hello)
		c := dial(t, w.client, addr(w.server.Addr, 8080))
		mustRead(t, c, "hello ")
		wire := w.Fabric.Capture("p-client")
		w.client.Crash()
		io.WriteString(c, "after the crash")
		w.client.StartProxy()
		io.WriteString(c, "after the restart")
		c.SetDeadline(time.Now().Add(patience))
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v, want ECONNRESET", err)
		}
		if leaks := wire.Packets(func(p []byte) bool { return strings.Contains(string(p), "after the") }); len(leaks) > 0 {
			t.Errorf("%d plaintext packets left", len(leaks))
		}
		w.client.mustAsk(t, addr(w.server.Addr, 8080))
	})
}

func TestRecordsEndOnce(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		w.server.serve(t, ":8080", hello)
		for range 20 {
			w.client.mustAsk(t, addr(w.server.Addr, 8080))
		}
		want := 20
		if w.joined() {
			want *= 2
		}
		for _, n := range []*Node{w.na, w.nb} {
			netnstest.Eventually(t, "records", func() bool { o, c := n.Records.Counts(); return o == want && c == want })
		}
		rec := w.na.Records.Wait(t, "bytes", func(r *tunnel.Record) bool { return r.Direction == tunnel.Outbound && r.Reason == tunnel.OK })
		if rec.Sent != uint64(len("secret payload")) || rec.Received <= rec.Sent {
			t.Errorf("sent %d, received %d", rec.Sent, rec.Received)
		}
	})
}

// Row 11 of facts/istio.md 3.3: the tunnel port is the proxy's.
func TestAppOnTheTunnelPortIsNotReached(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		outside := w.Bare("outside", nil)
		heard := make(chan string, 8)
		w.server.serve(t, ":15008", func(c net.Conn) {
			b, _ := io.ReadAll(c)
			heard <- string(b)
			c.Close()
		})
		for _, from := range []*Pod{outside, w.client} {
			if got, err := from.ask(t, addr(w.server.Addr, 15008), "hello app"); err == nil && strings.Contains(got, "hello") {
				t.Errorf("%s got %q", from.Name, got)
			}
		}
		select {
		case got := <-heard:
			t.Errorf("the app heard %q", got)
		default:
		}
	})
}

// Row 24: link-local addresses of the network are captured like any other.
func TestMetadataAddressIsPassedThrough(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		outside := w.Bare("metadata", nil)
		outside.NS.Addr("eth0", "169.254.169.254/32")
		w.client.NS.Route("169.254.169.254/32", "", "eth0")
		outside.serve(t, ":80", hello)
		if got := w.client.mustAsk(t, "169.254.169.254:80").Addr(); got != w.client.Addr {
			t.Errorf("the server saw %v, want %v", got, w.client.Addr)
		}
		w.na.Records.Wait(t, "captured connection", func(r *tunnel.Record) bool { return r.Dst.Port() == 80 })
	})
}

func TestPolicyChangeCutsLiveConnections(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		outside := w.Bare("outside", nil)
		for _, client := range []*Pod{w.client, outside} {
			c, s := pair(t, client, w.server)
			io.WriteString(c, "x")
			mustRead(t, s, "x")
			w.Tell(&securityapi.Authorization{
				Name: "deny-all", Namespace: Namespace, Scope: securityapi.Scope_NAMESPACE, Action: securityapi.Action_DENY,
				Rules: []*securityapi.Rule{{}},
			})
			for _, end := range []*net.TCPConn{c, s} {
				if _, err := io.ReadAll(end); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s: %v, want ECONNRESET", client.Name, err)
				}
			}
			if _, err := client.ask(t, addr(w.server.Addr, 9000), "x"); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: new connection: %v, want ECONNREFUSED", client.Name, err)
			}
			w.ForgetPolicy(Namespace + "/deny-all")
		}
	})
}

func TestPolicyNotDeliveredYetIsNotOpen(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		w.server.serve(t, ":8080", hello)
		w.server.Workload.AuthorizationPolicies = []string{Namespace + "/later"}
		w.Tell(w.server.Workload)
		if _, err := w.client.ask(t, addr(w.server.Addr, 8080), "x"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want ECONNREFUSED", err)
		}
		w.Tell(&securityapi.Authorization{
			Name: "later", Namespace: Namespace, Scope: securityapi.Scope_WORKLOAD_SELECTOR,
			Rules: []*securityapi.Rule{{}},
		})
		w.client.mustAsk(t, addr(w.server.Addr, 8080))
	})
}
