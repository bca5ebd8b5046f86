package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/owner"
	"github.com/ztun/ztun/cmd/internal/procs"
	"github.com/ztun/ztun/cmd/internal/socket"
	"github.com/ztun/ztun/cmd/internal/standin"
	"github.com/ztun/ztun/tun/netnstest"
)

// The pods' router is their host here, from whose address the kubelet probes.
var hostAddr = netip.MustParseAddr("10.1.0.1")

// answerQuestions is the agent's side of the owner's socket.
func (n *node) answerQuestions(owners *procs.Owners) (stop func()) {
	n.Helper()
	l, err := socket.Listen("unixpacket", filepath.Join(n.dir, owner.SocketName), 0, 0)
	if err != nil {
		n.Fatal(err)
	}
	s := owner.NewServer(owner.ServerConfig{Of: owners.Of, Addresses: n.agent.Addresses, UID: os.Getuid()})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ctx, l) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	n.Cleanup(stop)
	return stop
}

// fromHost opens a connection from the host to a port of pb.
func (n *node) fromHost(port string, within time.Duration) (net.Conn, error) {
	return n.fabric.Dial("tcp", "10.1.0.12:"+port, within)
}

// wantFromHost checks that a connection from the host is forwarded as a probe, or
// proxied, and how it is counted.
func (n *node) wantFromHost(why, port string, probe bool, answer string) {
	n.Helper()
	before := n.log.String()
	counted := n.counted(answer)
	c, err := n.fromHost(port, patience)
	if err != nil {
		n.Fatalf("%s: %v", why, err)
	}
	n.wantEcho(why, c)
	_ = c.Close()
	line := `src.addr=` + c.LocalAddr().String()
	if probe {
		// What is proxied is logged when it ends; this one after it ends later.
		n.wantNewConnection("after " + why)
		eventually(n.T, "the next connection is logged", func() bool {
			return strings.Contains(strings.TrimPrefix(n.log.String(), before), "connection complete")
		})
		if strings.Contains(n.log.String(), line) {
			n.Errorf("%s: the connection was proxied", why)
		}
	} else {
		eventually(n.T, why+": the connection is logged", func() bool { return strings.Contains(n.log.String(), line) })
	}
	if got := n.counted(answer); got != counted+1 {
		n.Errorf("%s: %d connections are counted as %q, want %d", why, got, answer, counted+1)
	}
}

func (n *node) counted(answer string) (count int) {
	n.Helper()
	_, text, err := n.http("GET", "15020", "/metrics")
	if err != nil {
		n.Fatal(err)
	}
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, `ztun_probe_questions_total{answer="`+answer+`"} `); ok {
			_, _ = fmt.Sscan(rest, &count)
		}
	}
	return count
}

// kubelet runs a program of that name on the host until the test, or end, ends it.
func (n *node) kubelet() (end func()) {
	n.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		n.Fatal(err)
	}
	path := filepath.Join(n.TempDir(), "kubelet")
	if err := os.Symlink(sleep, path); err != nil {
		n.Fatal(err)
	}
	cmd := n.fabric.Command(path, "600")
	if err := cmd.Start(); err != nil {
		n.Fatal(err)
	}
	end = sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	n.Cleanup(end)
	eventually(n.T, "a kubelet runs", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
		return err == nil && string(b) == "kubelet\n"
	})
	return end
}

// TestProbes: with everything there, without the agent's answers, and without
// a proxy.
func TestProbes(t *testing.T) {
	n := newNode(t)
	owners, err := procs.NewOwners(n.fabric.File(), "/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer owners.Close()
	s := standin.New(func(src, dst netip.AddrPort) bool {
		o, err := owners.Of(src, dst)
		return err == nil && o.MayProbe()
	}, nil)
	defer s.Close()
	n.stopAgent()
	n.startAgent(func(c *agent.Config) { c.NodeAddresses, c.Standin = []netip.Addr{hostAddr}, s })
	for name, ns := range map[string]*netnstest.NS{"pa": n.pa, "pb": n.pb} {
		pod := agent.Pod{UID: name, Name: name, Namespace: "default", ServiceAccount: name, Netns: ns.Path(), ProbePorts: []uint16{8080}}
		if err := n.agent.Set(pod); err != nil {
			t.Fatal(err)
		}
	}
	go serveEcho(n.pb.Listen("tcp", "10.1.0.12:8081"))
	probeOnce := func(why string) {
		t.Helper()
		c, err := n.fromHost("8080", patience)
		if err != nil {
			t.Fatalf("%s: %v", why, err)
		}
		n.wantEcho(why, c)
		_ = c.Close()
	}
	eventually(t, "the stand-in reads", func() bool { return s.Stats().Devices == 2 })
	probeOnce("before there is a proxy")
	if c, err := n.pa.Dial("tcp", "10.1.0.12:8080", 300*time.Millisecond); err == nil {
		_ = c.Close()
		t.Error("a pod reached another without a proxy")
	}

	n.startProxy()
	eventually(t, "the stand-in has left", func() bool { return s.Stats().Devices == 0 })
	n.wantFromHost("nobody answers, probed port", "8080", true, "fallback")
	n.wantFromHost("nobody answers, other port", "8081", false, "away")
	stop := n.answerQuestions(owners)
	n.wantFromHost("a process of the host", "8081", true, "unknown")
	end := n.kubelet()
	eventually(t, "the kubelet is known", func() bool {
		c, err := n.fromHost("8080", patience)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		o, err := owners.Of(c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort())
		return err == nil && o == procs.OwnerLocal
	})
	n.wantFromHost("a process that is not the kubelet", "8080", false, "local")
	end()
	stop()
	n.wantFromHost("nobody answers any more", "8080", true, "fallback")

	n.kill()
	eventually(t, "the stand-in reads again", func() bool { return s.Stats().Devices == 2 })
	probeOnce("without a proxy")
	n.startProxy("ZTUN_PROBE_FALLBACK=false")
	n.wantFromHost("no fallback", "8080", false, "away")
}
