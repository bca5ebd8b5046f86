package netnstest_test

import (
	"context"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { netnstest.MainLeaks(m) }

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// threads lists the namespace of each thread of the process.
func threads(t *testing.T) map[uint64]int {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]int{}
	for _, task := range tasks {
		var st unix.Stat_t
		if unix.Stat("/proc/self/task/"+task.Name()+"/ns/net", &st) == nil {
			seen[st.Ino]++
		}
	}
	return seen
}

func TestNoThreadStaysInsideANamespace(t *testing.T) {
	a := netnstest.New(t, "a")
	for range 20 {
		a.Do(func() {
			if inode(t, "/proc/thread-self/ns/net") != inode(t, a.Path()) {
				t.Error("Do did not run inside the namespace")
			}
		})
	}
	netnstest.Eventually(t, "threads in the namespace end", func() bool { return threads(t)[inode(t, a.Path())] == 0 })
	if inode(t, "/proc/self/ns/net") == inode(t, a.Path()) {
		t.Error("the first thread is in the namespace of the test")
	}
}

func TestVethCarriesBothFamilies(t *testing.T) {
	a, b := netnstest.New(t, "a"), netnstest.New(t, "b")
	netnstest.Veth(t, a, "eth0", b, "eth0")
	a.Addr("eth0", "10.0.0.1/24", "fd00::1/64")
	b.Addr("eth0", "10.0.0.2/24", "fd00::2/64")
	wire := b.Capture("eth0")
	for _, at := range []string{"10.0.0.2:7000", "[fd00::2]:7000"} {
		l := b.Listen("tcp", at)
		go func() {
			if c, err := l.Accept(); err == nil {
				_, _ = io.WriteString(c, "hello")
				_ = c.Close()
			}
		}()
		c, err := a.Dial("tcp", at, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if err != nil || string(got) != "hello" {
			t.Errorf("read from %s = %q, %v", at, got, err)
		}
		_ = c.Close()
	}
	wire.Wait(t, "the payload on the wire", func(p []byte) bool { return strings.Contains(string(p), "hello") })
}

func TestCommandRunsInside(t *testing.T) {
	a := netnstest.New(t, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	out, err := a.CommandContext(ctx, "readlink", "/proc/self/ns/net").Output()
	if err != nil {
		t.Fatal(err)
	}
	var want string
	a.Do(func() { want, _ = os.Readlink("/proc/thread-self/ns/net") })
	if got := strings.TrimSpace(string(out)); got != want {
		t.Errorf("command ran in %s, want %s", got, want)
	}
}

func TestBridgeJoinsPorts(t *testing.T) {
	sw, a, b := netnstest.New(t, "switch"), netnstest.New(t, "a"), netnstest.New(t, "b")
	netnstest.Veth(t, sw, "a", a, "eth0")
	netnstest.Veth(t, sw, "b", b, "eth0")
	sw.Bridge("br0", "a", "b")
	a.Addr("eth0", "10.0.0.1/24")
	b.Addr("eth0", "10.0.0.2/24")
	in := b.ListenPacket("udp", "10.0.0.2:53")
	netnstest.Eventually(t, "a datagram crosses the bridge", func() bool {
		c, err := a.Dial("udp", "10.0.0.2:53", time.Second)
		if err != nil {
			return false
		}
		defer func() { _ = c.Close() }()
		_, _ = io.WriteString(c, "x")
		_ = in.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, from, err := in.ReadFrom(make([]byte, 10))
		return err == nil && from.(*net.UDPAddr).IP.String() == "10.0.0.1"
	})
}
