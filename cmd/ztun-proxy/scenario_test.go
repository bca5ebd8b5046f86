package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/xds/control"
)

const patience = 20 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

const objects = `
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: pa, namespace: default}
spec: {nodeName: n, serviceAccountName: pa, containers: [{name: c, image: i}]}
status: {podIPs: [{ip: 10.1.0.11}]}
---
apiVersion: v1
kind: Pod
metadata: {name: pb, namespace: default}
spec: {nodeName: n, serviceAccountName: pb, containers: [{name: c, image: i}]}
status: {podIPs: [{ip: 10.1.0.12}]}
`

// node is one node with two pods, whose control plane, agent and proxy can die
// and come back one by one.
type node struct {
	*testing.T
	dir    string
	ns     *netnstest.NS // The node itself: control plane and first proxy.
	home   *netnstest.NS // Of the latest proxy.
	fabric *netnstest.NS // The pods' router.
	pa, pb *netnstest.NS

	stopControl, stopAgent func()
	agent                  *agent.Agent
	proxy                  *exec.Cmd
	exited                 chan struct{}
	log                    *lockedBuffer
	joined                 bool // The proxy hands streams from pod to pod over in memory.
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newNode(t *testing.T) *node {
	netnstest.Require(t)
	n := &node{T: t, dir: t.TempDir(), ns: netnstest.New(t, "node")}
	n.home = n.ns
	fabric := netnstest.New(t, "fabric")
	n.fabric = fabric
	fabric.Bridge("br0")
	fabric.Addr("br0", "10.1.0.1/24")
	for i, pod := range []**netnstest.NS{&n.pa, &n.pb} {
		name := string(rune('a' + i))
		*pod = netnstest.New(t, "p"+name)
		netnstest.Veth(t, fabric, "p-"+name, *pod, "eth0")
		fabric.Port("br0", "p-"+name)
		(*pod).Addr("eth0", fmt.Sprintf("10.1.0.1%d/24", i+1))
		(*pod).Route("0.0.0.0/0", "10.1.0.1", "eth0")
	}
	n.startControl()
	n.startAgent()
	t.Cleanup(func() {
		n.kill()
		n.stopAgent()
		n.stopControl()
		if t.Failed() {
			t.Logf("proxy:\n%s", n.log.String())
		}
	})
	n.log = &lockedBuffer{}
	go serveEcho(n.pb.Listen("tcp", "10.1.0.12:8080"))
	for _, p := range []struct {
		name string
		ns   *netnstest.NS
	}{{"pa", n.pa}, {"pb", n.pb}} {
		pod := agent.Pod{UID: p.name, Name: p.name, Namespace: "default", ServiceAccount: p.name, Netns: p.ns.Path()}
		if err := n.agent.Set(pod); err != nil {
			t.Fatal(err)
		}
	}
	// A proxy that comes before would be ready without them.
	eventually(t, "both pods are attached", func() bool {
		return !slices.ContainsFunc(n.agent.Status(), func(s agent.Status) bool { return s.Phase == agent.Attaching })
	})
	return n
}

// bothPaths runs f with pods that are joined in memory, and with tunnels.
func bothPaths(t *testing.T, f func(t *testing.T, n *node)) {
	for name, joined := range map[string]bool{"joined": true, "wire": false} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.joined = joined
			f(t, n)
		})
	}
}

func serveEcho(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
	}
}

func (n *node) startControl() {
	n.Helper()
	srv, err := control.New(control.Config{
		Static: control.NewStatic(map[string]string{"mesh.yaml": objects}), State: filepath.Join(n.dir, "control"),
	})
	if err != nil {
		n.Fatal(err)
	}
	token, err := srv.Token("n", time.Hour)
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "token"), []byte(token), 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "root.pem"), srv.RootPEM(), 0o600)
	}
	if err != nil {
		n.Fatal(err)
	}
	l := n.ns.Listen("tcp", "127.0.0.1:15012")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ctx, l) }()
	n.stopControl = sync.OnceFunc(func() { cancel(); <-done })
}

func (n *node) startAgent(more ...func(*agent.Config)) {
	n.Helper()
	cfg := agent.Config{
		StateDir: filepath.Join(n.dir, "agent"), Socket: filepath.Join(n.dir, "agent.sock"), Log: slog.New(slog.DiscardHandler),
	}
	for _, f := range more {
		f(&cfg)
	}
	a, err := agent.New(cfg)
	if err != nil {
		n.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = a.Run(ctx) }()
	n.agent = a
	n.stopAgent = sync.OnceFunc(func() { cancel(); <-done })
}

func (n *node) startProxy(env ...string) {
	n.Helper()
	self, err := os.Executable()
	if err != nil {
		n.Fatal(err)
	}
	cmd := n.home.Command(self, childArg, "proxy", "proxy", "ztunnel")
	cmd.Env = append([]string{
		"XDS_ADDRESS=127.0.0.1:15012", "CA_ADDRESS=127.0.0.1:15012", "NODE_NAME=n", "INSTANCE_IP=127.0.0.1",
		"XDS_ROOT_CA=" + filepath.Join(n.dir, "root.pem"), "CA_ROOT_CA=" + filepath.Join(n.dir, "root.pem"),
		"AUTH_TOKEN=" + filepath.Join(n.dir, "token"), "INPOD_UDS=" + filepath.Join(n.dir, "agent.sock"),
		"POD_NAME=ztunnel-n", "POD_NAMESPACE=istio-system",
	}, env...)
	if !n.joined {
		cmd.Env = append(cmd.Env, "ZTUN_SAME_NODE_JOIN=false")
	}
	cmd.Stdout, cmd.Stderr = n.log, n.log
	if err := cmd.Start(); err != nil {
		n.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { defer close(exited); _ = cmd.Wait() }()
	n.proxy, n.exited = cmd, exited
	eventually(n.T, "the proxy is ready", func() bool { return n.readiness() == "ready\n" })
}

func (n *node) kill() {
	if n.proxy != nil {
		_ = n.proxy.Process.Kill()
		<-n.exited
	}
}

func (n *node) signal(s os.Signal) {
	n.Helper()
	if err := n.proxy.Process.Signal(s); err != nil {
		n.Fatal(err)
	}
}

// wantExit waits for the proxy's end.
func (n *node) wantExit(why string) {
	n.Helper()
	select {
	case <-n.exited:
	case <-time.After(patience):
		n.Fatalf("%s: the proxy does not end", why)
	}
	if code := n.proxy.ProcessState.ExitCode(); code != 0 {
		n.Errorf("%s: exit code %d", why, code)
	}
}

func (n *node) http(method, port, path string) (int, string, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return n.home.Dial("tcp", "127.0.0.1:"+port, time.Second)
		},
	}, Timeout: patience}
	req, err := http.NewRequest(method, "http://localhost:"+port+path, nil)
	if err != nil {
		return 0, "", err
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

func (n *node) readiness() string {
	_, text, err := n.http("GET", "15021", "/healthz/ready")
	if err != nil {
		return err.Error()
	}
	return text
}

// wantAgent waits until the proxy knows whether there is an agent. It stays ready
// without one.
func (n *node) wantAgent(connected bool) {
	n.Helper()
	want := "\nztun_agent_connected 0.0\n"
	if connected {
		want = "\nztun_agent_connected 1.0\n"
	}
	eventually(n.T, "metrics with"+want, func() bool {
		_, text, _ := n.http("GET", "15020", "/metrics")
		return strings.Contains(text, want)
	})
	if text := n.readiness(); text != "ready\n" {
		n.Errorf("agent connected: %v, readiness: %q", connected, text)
	}
}

// connect opens a connection from pa to pb.
func (n *node) connect() net.Conn {
	n.Helper()
	c, err := n.pa.Dial("tcp", "10.1.0.12:8080", patience)
	if err != nil {
		n.Fatalf("connect: %v", err)
	}
	n.Cleanup(func() { _ = c.Close() })
	return c
}

func echo(c net.Conn, text string) error {
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("echoed %q of %q", got, text)
	}
	return nil
}

func (n *node) wantEcho(why string, c net.Conn) {
	n.Helper()
	if err := echo(c, why); err != nil {
		n.Fatalf("%s: %v", why, err)
	}
}

func (n *node) wantNewConnection(why string) {
	n.Helper()
	c := n.connect()
	n.wantEcho(why, c)
	_ = c.Close()
}

func TestProxyLife(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *node) {
		n.startProxy("CONNECTION_TERMINATION_DEADLINE=60s", "AUTHZ_POLICY_INFO_LOGGING=true")
		// Without both at hand the first connection takes the wire, which waits.
		eventually(t, "both certificates are there", func() bool { return strings.Count(n.log.String(), "certificate fetched") == 2 })
		live := n.connect()
		n.wantEcho("a connection", live)
		line := "\tinfo\tstate\tno allow policies, allow\twl=\"default/pb\" src.addr=10.1.0.11:"
		eventually(t, "a decision of the policies is logged as "+line, func() bool { return strings.Contains(n.log.String(), line) })

		t.Run("no privileges", func(t *testing.T) {
			if err := verifyPrivileges(fmt.Sprintf("/proc/%d/task", n.proxy.Process.Pid)); err != nil {
				t.Error(err)
			}
		})
		t.Run("dump", n.checkDump)
		t.Run("metrics", n.checkMetrics)

		n.stopControl()
		n.wantEcho("without a control plane", live)
		n.wantNewConnection("a new one without a control plane")
		n.startControl()
		n.wantEcho("with a control plane again", live)

		n.stopAgent()
		n.wantAgent(false)
		n.wantEcho("without an agent", live)
		n.wantNewConnection("a new one without an agent")
		n.startAgent()
		n.wantAgent(true)
		n.wantEcho("with an agent again", live)
		n.wantNewConnection("a new one with an agent again")

		n.agent.SetNodeAddresses([]netip.Addr{netip.MustParseAddr("10.1.0.1")})
		eventually(t, "both pods are told", func() bool { return strings.Count(n.log.String(), "pod has changed") == 2 })
		n.wantEcho("with another address of the node", live)

		n.signal(syscall.SIGTERM)
		eventually(t, "readiness stops", func() bool { return strings.Contains(n.readiness(), "refused") })
		n.wantEcho("while it drains", live)
		_ = live.Close()
		n.wantExit("its last connection has ended")

		n.startProxy()
		n.wantNewConnection("of the next proxy")
	})
}

// TestProxyThatEndsAlone takes new connections until another one does: from a pod
// to a pod, and from outside of the mesh. Those that come when it has ended are the
// next one's.
func TestProxyThatEndsAlone(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *node) {
		n.startProxy("CONNECTION_TERMINATION_DEADLINE=60s")
		live := n.connect()
		n.wantEcho("a connection", live)
		n.signal(syscall.SIGTERM)
		eventually(t, "it drains", func() bool { return strings.Contains(n.log.String(), "the next proxy takes over") })
		n.wantNewConnection("of a proxy that drains alone")
		n.wantEcho("while it drains", live)
		_ = live.Close()
		n.wantExit("its last connection has ended")
		var late []chan error
		for _, from := range []*netnstest.NS{n.pa, n.fabric} {
			done := make(chan error, 1)
			late = append(late, done)
			go func() {
				c, err := from.Dial("tcp", "10.1.0.12:8080", patience)
				if err == nil {
					err = echo(c, "late")
					_ = c.Close()
				}
				done <- err
			}()
		}
		wire := n.fabric.Capture("br0") // Sees what the second one sends.
		eventually(t, "a SYN was repeated", func() bool { return len(wire.Packets(isSYN)) > 0 })
		for _, done := range late {
			select {
			case err := <-done:
				t.Errorf("answered without a proxy: %v", err)
			default:
			}
		}
		n.startProxy()
		for _, done := range late {
			if err := <-done; err != nil {
				t.Errorf("a connect without a proxy: %v", err)
			}
		}
	})
}

// TestKeepaliveProbesSilentPeers: as often as the environment says.
func TestKeepaliveProbesSilentPeers(t *testing.T) {
	n := newNode(t)
	n.startProxy("KEEPALIVE_TIME=1s", "KEEPALIVE_INTERVAL=1s")
	c, err := n.fabric.Dial("tcp", "10.1.0.12:8080", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n.wantEcho("from outside", c)
	wire := n.fabric.Capture("br0")
	probe := func(p []byte) bool { // A bare ACK of the pod: nobody has said anything.
		return isTCP(p) && [4]byte(p[12:16]) == [4]byte{10, 1, 0, 12} && p[int(p[0]&15)*4+13] == 0x10
	}
	eventually(t, "probes of a silent peer", func() bool { return len(wire.Packets(probe)) >= 3 })
	n.wantEcho("still there", c)
}

// isSYN tells of an IPv4 packet that opens a connection.
func isSYN(p []byte) bool {
	return isTCP(p) && p[int(p[0]&15)*4+13]&0x12 == 0x02
}

// isTCP tells of an IPv4 packet with a whole TCP header.
func isTCP(p []byte) bool {
	return len(p) >= 40 && p[0]>>4 == 4 && p[9] == unix.IPPROTO_TCP && len(p) >= int(p[0]&15)*4+20
}

// unreachable makes the router answer for a prefix with an ICMP error.
func (n *node) unreachable(prefix string) {
	n.Helper()
	n.fabric.SetSysctl("net/ipv4/ip_forward", "1")
	dst, err := netlink.ParseIPNet(prefix)
	if err == nil {
		err = n.fabric.Netlink().RouteAdd(&netlink.Route{Dst: dst, Type: unix.RTN_UNREACHABLE})
	}
	if err != nil {
		n.Fatalf("route %s: %v", prefix, err)
	}
}

// TestUnreachableIsTruthful: what the pod's router says reaches the app through
// the sockets that agent and proxy hand on, and survives a restart of either.
func TestUnreachableIsTruthful(t *testing.T) {
	n := newNode(t)
	n.unreachable("10.9.0.0/16")
	n.startProxy()
	check := func(why string) {
		t.Helper()
		c, err := n.pa.Dial("tcp", "10.9.0.1:80", patience)
		if !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("%s: connect = %v, want EHOSTUNREACH", why, err)
		}
		if err == nil {
			_ = c.Close()
		}
	}
	check("first")
	n.stopAgent()
	n.wantAgent(false)
	n.startAgent()
	n.wantAgent(true)
	check("after a restart of the agent")
	n.kill()
	n.startProxy()
	check("after a restart of the proxy")
}

func (n *node) checkDump(t *testing.T) {
	code, text, err := n.http("GET", "15000", "/config_dump")
	if err != nil || code != 200 {
		t.Fatalf("%d, %v: %s", code, err, text)
	}
	var dump struct {
		Workloads     []struct{ Name string }
		Certificates  []struct{ Identity, State string }
		WorkloadState map[string]struct {
			State       string
			Connections struct {
				Outbound []struct{ ActualDst, Protocol, Path string }
			}
		}
	}
	if err := json.Unmarshal([]byte(text), &dump); err != nil {
		t.Fatal(err)
	}
	path := ""
	if n.joined {
		path = "same-node"
	}
	pa := dump.WorkloadState["pa"]
	if len(dump.Workloads) != 2 || len(dump.Certificates) != 2 || dump.Certificates[0].State != "Available" || pa.State != "Up" ||
		len(pa.Connections.Outbound) != 1 || pa.Connections.Outbound[0].Protocol != "HBONE" || pa.Connections.Outbound[0].Path != path {
		t.Errorf("dump = %+v", dump)
	}
	if token, err := os.ReadFile(filepath.Join(n.dir, "token")); err != nil || strings.Contains(text, string(token)) {
		t.Errorf("the dump holds the token: %v", err)
	}
	if strings.Contains(text, "PRIVATE KEY") {
		t.Error("the dump holds a key")
	}
}

func (n *node) checkMetrics(t *testing.T) {
	code, text, err := n.http("GET", "15020", "/metrics")
	if err != nil || code != 200 {
		t.Fatalf("%d, %v", code, err)
	}
	for _, want := range []string{
		"istio_tcp_connections_opened_total{", `connection_security_policy="mutual_tls"`,
		"workload_manager_active_proxy_count 2.0", `istio_xds_message_total{url="type.googleapis.com/istio.workload.Address"}`,
		"istio_build{", "ztun_xds_connected 1.0",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s", want)
		}
	}
	if got := strings.Contains(text, `ztun_pod_events_total{event="same_node"} 1.0`); got != n.joined {
		t.Errorf("a connection handed over in memory is counted: %v, want %v", got, n.joined)
	}
	for _, name := range []string{"received", "sent"} { // By the connection that lives.
		if !regexp.MustCompile(`(?m)^istio_tcp_` + name + `_bytes_total\{.*\} 12\.0$`).MatchString(text) {
			t.Errorf("12 bytes %s are not counted", name)
		}
	}
}

func TestDrainDeadlineCuts(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *node) {
		n.startProxy("CONNECTION_TERMINATION_DEADLINE=100ms")
		live := n.connect()
		n.wantEcho("a connection", live)
		if code, text, err := n.http("POST", "15000", "/quitquitquit"); err != nil || code != 200 || text != "shutdown now\n" {
			t.Fatalf("quit: %d %q, %v", code, text, err)
		}
		n.wantExit("the deadline has passed")
		if err := echo(live, "x"); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("after the deadline the connection says %v, want a reset", err)
		}
	})
}

func TestSecondInterruptEndsAtOnce(t *testing.T) {
	n := newNode(t)
	n.startProxy("CONNECTION_TERMINATION_DEADLINE=1h")
	live := n.connect()
	n.wantEcho("a connection", live)
	n.signal(syscall.SIGINT)
	eventually(t, "readiness stops", func() bool { return strings.Contains(n.readiness(), "refused") })
	n.signal(syscall.SIGINT)
	n.wantExit("a second interrupt")
}
