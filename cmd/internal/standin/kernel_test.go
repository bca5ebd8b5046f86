package standin

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/procs"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/podnet"
)

// body is large, so that the app answers in super-segments.
var body = strings.Repeat("I am well. ", 1<<16)

// captured is a pod under capture, with an HTTP server, on a node that asks its
// own kernel whose a connection is.
type captured struct {
	t         *testing.T
	pod, node *netnstest.NS
	wire      *netnstest.Capture
	a         *podnet.Attachment
	s         *Standin
}

func newCaptured(t *testing.T) *captured {
	t.Helper()
	c := &captured{t: t, pod: netnstest.New(t, "pod"), node: netnstest.New(t, "node")}
	netnstest.Veth(t, c.pod, "eth0", c.node, "p0")
	c.pod.Addr("eth0", "10.1.0.2/24", "fd01::2/64")
	c.node.Addr("p0", "10.1.0.1/24", "fd01::1/64")
	c.node.Addr("lo", "198.51.100.1/32", "2001:db8::1/128")
	c.pod.Route("0.0.0.0/0", "10.1.0.1", "eth0")
	c.pod.Route("::/0", "fd01::1", "eth0")
	c.pod.Settled()
	c.node.Settled()
	c.wire = c.node.Capture("p0")
	for _, at := range []string{"10.1.0.2:8080", "[fd01::2]:8080"} {
		c.serve(c.pod.Listen("tcp", at))
	}
	var err error
	if c.a, err = podnet.Attach(t.Context(), c.pod.File(), podnet.Config{}, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.a.Close(), c.a.File.Close() })
	owners, err := procs.NewOwners(c.node.File(), "/proc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(owners.Close)
	c.s = newStandin(t, func(src, dst netip.AddrPort) bool {
		o, err := owners.Of(src, dst)
		if err != nil {
			t.Error(err)
		}
		return o.MayProbe()
	})
	return c
}

func (c *captured) serve(l net.Listener) {
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	c.t.Cleanup(func() { _ = server.Close(); <-done })
}

// file is a duplicate of the device.
func (c *captured) file() *os.File {
	c.t.Helper()
	rc, err := c.a.File.SyscallConn()
	if err != nil {
		c.t.Fatal(err)
	}
	fd := -1
	_ = rc.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		c.t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "ztun0")
}

func (c *captured) flags() int {
	c.t.Helper()
	rc, err := c.a.File.SyscallConn()
	if err != nil {
		c.t.Fatal(err)
	}
	var flags int
	_ = rc.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, unix.F_GETFL, 0) })
	if err != nil {
		c.t.Fatal(err)
	}
	return flags
}

func (c *captured) start() {
	w := zds.Workload{UID: "u", Name: "pod", Namespace: "ns", Device: &zds.Device{
		MTU: 1500, Offload: c.a.Offload, Addresses: []netip.Addr{pod4, pod6}, NodeAddresses: []netip.Addr{node4, node6},
	}}
	c.s.Start("u", w, c.file())
}

// probe asks the pod's server from an address of the node.
func (c *captured) probe(from netip.Addr, within time.Duration) error {
	ctx, cancel := context.WithTimeout(c.t.Context(), within)
	defer cancel()
	to := app
	if from.Is6() {
		to = app6
	}
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: within}
	var conn net.Conn
	var err error
	c.node.Do(func() { conn, err = d.Dial("tcp", to.String()) })
	if err != nil {
		return err
	}
	defer conn.Close()
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+to.String()+"/healthz", nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err == nil && string(got) != body {
		err = fmt.Errorf("%d bytes came, %d were sent", len(got), len(body))
	}
	return err
}

// fromPod are the packets that the pod sent to an address.
func (c *captured) fromPod(to netip.Addr) int {
	return len(c.wire.Packets(func(b []byte) bool {
		p, ok := parsePacket(b)
		return ok && (p.src.Addr() == pod4 || p.src.Addr() == pod6) && p.dst.Addr() == to
	}))
}

// forge puts a packet on the wire to the pod that no socket sent.
func (c *captured) forge(b []byte) {
	c.t.Helper()
	proto := uint16(unix.ETH_P_IP)
	if b[0]>>4 == 6 {
		proto = unix.ETH_P_IPV6
	}
	sa := &unix.SockaddrLinklayer{
		Protocol: binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, proto)), Ifindex: c.node.Link("p0").Attrs().Index, Halen: 6,
	}
	copy(sa.Addr[:], c.pod.Link("eth0").Attrs().HardwareAddr)
	c.node.Do(func() {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Sendto(fd, b, 0, sa)
			_ = unix.Close(fd)
		}
		if err != nil {
			c.t.Fatal(err)
		}
	})
}

const (
	// patience is for what must come, moment for what must not: whether it came
	// is seen on the wire, however short the wait.
	patience = 20 * time.Second
	moment   = 300 * time.Millisecond
)

func TestProbesOfAPodWithoutAProxy(t *testing.T) {
	c := newCaptured(t)
	before := c.flags()
	c.start()
	for _, from := range []netip.Addr{node4, node6, node4} {
		if err := c.probe(from, patience); err != nil {
			t.Errorf("probe from %v: %v", from, err)
		}
	}
	if c.a.Offload && c.s.Stats().Forwarded > 2000 {
		t.Errorf("%d packets for 3 answers of %d bytes: super-segments were cut", c.s.Stats().Forwarded, len(body))
	}
	for _, from := range []netip.Addr{far4, far6} {
		if err := c.probe(from, moment); err == nil {
			t.Errorf("a connection from %v was made", from)
		}
		if n := c.fromPod(from); n != 0 {
			t.Errorf("the pod answered %v with %d packets", from, n)
		}
	}
	if st := c.s.Stats(); st.Asked != 3 || st.Probes != 3 {
		t.Errorf("strangers were asked about: %+v", st)
	}
	// The pod's own connections go nowhere.
	l := c.node.Listen("tcp", "10.1.0.1:0")
	if conn, err := c.pod.Dial("tcp", l.Addr().String(), moment); err == nil {
		_ = conn.Close()
		t.Error("the pod reached the node")
	}
	if after := c.flags(); after != before {
		t.Errorf("the file's flags are %#x, were %#x", after, before)
	}
}

// Traffic under the node's address that none of its processes sent, as
// kube-proxy's masquerading makes it.
func TestForgedProbesOfAPodWithoutAProxy(t *testing.T) {
	c := newCaptured(t)
	c.start()
	forged, forged6 := netip.AddrPortFrom(node4, 5555), netip.AddrPortFrom(node6, 5555)
	for i, b := range [][]byte{
		segment(forged, app, flagSYN, ""), segment(forged6, app6, flagSYN, ""),
		segment(forged, app, flagACK, "x"), segment(forged6, app6, flagACK, "x"), segment(forged, app, flagRST, ""),
	} {
		before := c.s.Stats().Dropped
		c.forge(b)
		netnstest.Eventually(t, "it is dropped", func() bool { return c.s.Stats().Dropped > before })
		if i == 1 && c.s.Stats().Asked != 2 {
			t.Errorf("%+v, want both SYNs asked about", c.s.Stats())
		}
	}
	if st := c.s.Stats(); st.Forwarded != 0 {
		t.Errorf("forwarded: %+v", st)
	}
	if err := c.probe(node4, patience); err != nil {
		t.Error(err)
	}
	if n := len(c.wire.Packets(func(b []byte) bool {
		p, ok := parsePacket(b)
		return ok && (p.dst == forged || p.dst == forged6)
	})); n != 0 {
		t.Errorf("the pod answered with %d packets", n)
	}
}

func TestOnlyTheKubeletProbesWhereItCanBeTold(t *testing.T) {
	c := newCaptured(t)
	c.start()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "kubelet")
	if err := os.Symlink(sleep, path); err != nil {
		t.Fatal(err)
	}
	cmd := c.node.Command(path, "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	netnstest.Eventually(t, "a kubelet runs", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
		return err == nil && string(b) == "kubelet\n"
	})
	if err := c.probe(node4, moment); err == nil || c.fromPod(node4) != 0 {
		t.Errorf("a process of the node that is not its kubelet: %v, %d packets", err, c.fromPod(node4))
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err := c.probe(node4, patience); err != nil {
		t.Errorf("without a kubelet to be told apart: %v", err)
	}
}

// A proxy that comes finds what was sent to it.
func TestNextReaderOfAPodLosesNothing(t *testing.T) {
	c := newCaptured(t)
	next, err := tun.New(c.file(), tun.Options{Offload: c.a.Offload})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	const n = 50
	for range 5 {
		before := c.s.Stats().Dropped
		c.start()
		for i := range n {
			if i == n/2 {
				c.s.Stop("u")
				if left := int(c.s.Stats().Dropped - before); left > n/2 {
					t.Fatalf("%d of %d packets were read", left, n/2)
				}
			}
			c.forge(segment(netip.AddrPortFrom(far4, uint16(i+1)), app, flagSYN, ""))
		}
		var got [][]byte
		want := n - int(c.s.Stats().Dropped-before)
		netnstest.Eventually(t, "all that was sent is read", func() bool {
			got = append(got, drain(t, next)...)
			return len(got) >= want
		})
		if len(got) != want || c.s.Stats().Dropped-before != uint64(n-want) {
			t.Fatalf("the next reader found %d packets, want %d", len(got), want)
		}
	}
	// And it is a reader like any: nobody takes a probe from it.
	if err := c.probe(node4, moment); err == nil {
		t.Error("a probe was forwarded after Stop")
	}
	if len(drain(t, next)) == 0 {
		t.Error("the probe did not reach the next reader")
	}
	c.start()
	if err := c.probe(node4, patience); err != nil {
		t.Errorf("after that reader: %v", err)
	}
}
