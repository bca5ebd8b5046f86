package meshtest

import (
	"bytes"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/podnet"
	"github.com/ztun/ztun/xds/workloadapi"
)

const (
	plainDevice  = unix.IFF_TUN | unix.IFF_NO_PI
	headerDevice = plainDevice | unix.IFF_VNET_HDR
	allOffloads  = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
)

// lacking are kernels, and agents on them, that have less than this one. The
// devices are real and really lack it; RWF_NOWAIT is refused to the reader's
// thread by a seccomp filter, as a kernel before 6.4 would.
var lacking = []struct {
	name     string
	flags    uint16 // of the device
	offloads int    // that the device has on
	offload  bool   // what the agent tells the proxy
	noWait   bool   // reads can be told not to wait
	want     []tun.Feature
}{
	{"nothing", headerDevice, allOffloads, true, true, nil},
	{"RWF_NOWAIT", headerDevice, allOffloads, true, false, []tun.Feature{tun.NoWait}},
	{"TSO of IPv6", headerDevice, unix.TUN_F_CSUM | unix.TUN_F_TSO4, true, true, nil},
	{"TSO", headerDevice, unix.TUN_F_CSUM, false, true, []tun.Feature{tun.Offload}},
	{"offloads", headerDevice, 0, false, true, []tun.Feature{tun.Offload}},
	{"virtio headers", plainDevice, allOffloads, true, true, []tun.Feature{tun.VirtioHeader}},
	{"everything", plainDevice, 0, false, false, []tun.Feature{tun.NoWait, tun.VirtioHeader}},
}

func TestEverythingWorksWithout(t *testing.T) {
	for _, l := range lacking {
		t.Run(l.name, func(t *testing.T) {
			var log logBuffer
			m := New(t)
			m.Log = slog.New(slog.NewTextHandler(&log, nil))
			na, nb := m.Node("na"), m.Node("nb")
			if !l.noWait {
				na.withoutNoWait("first-a")
				nb.withoutNoWait("first-b")
			}
			start := func(name string, n *Node) *Pod {
				p := m.Bare(name, n)
				p.Attach(podnet.Config{})
				p.reopen(l.flags, l.offloads)
				p.attached.Offload = l.offload
				p.Workload.TunnelProtocol = workloadapi.TunnelProtocol_HBONE
				m.Tell(p.Workload)
				p.StartProxy()
				return p
			}
			client, neighbour, server := start("client", na), start("neighbour", na), start("server", nb)
			outside := m.Bare("outside", nil)
			for _, path := range []struct {
				name           string
				client, server *Pod
			}{
				{"hbone", client, server},
				{"same node", client, neighbour},
				{"plaintext out", client, outside},
				{"plaintext in", outside, server},
			} {
				t.Run(path.name, func(t *testing.T) { behave(t, path.client, path.server) })
			}
			if !client.dev.Offload() {
				noneExceedsMTU(t, client, neighbour, server)
			}
			for _, n := range m.nodes {
				if got := log.lines("works without", "node="+n.Name); len(got) != len(l.want) {
					t.Errorf("%s: logged %q, want a line each for %v", n.Name, got, l.want)
				}
				for _, f := range l.want {
					if got := log.lines("works without", "node="+n.Name, f.String(), f.Cost()); len(got) != 1 {
						t.Errorf("%s: logged %q, want one line for %v", n.Name, got, f)
					}
				}
			}
		})
	}
}

// behave goes through what a connection does, on both families where there is bulk.
func behave(t *testing.T, client, server *Pod) {
	t.Helper()
	for _, to := range []netip.Addr{server.Addr, server.Addr6} {
		c, s := pairTo(t, client, server, to)
		bulkBothWays(t, c, s, 4<<20)
	}
	c, s := pair(t, client, server)
	for range 100 {
		io.WriteString(c, "request")
		mustRead(t, s, "request")
		io.WriteString(s, "answer")
		mustRead(t, c, "answer")
	}
	halfCloseBothWays(t, client, server)
	resetBothWays(t, client, server)
}

// noneExceedsMTU looks at the means: bulk in super-segments would be far above.
func noneExceedsMTU(t *testing.T, pods ...*Pod) {
	t.Helper()
	for _, p := range pods {
		st, mtu := p.Stack().Stats(), uint64(p.attached.MTU())
		if st.PacketsIn == 0 || st.BytesIn > st.PacketsIn*mtu || st.BytesOut > st.PacketsOut*mtu {
			t.Errorf("%s: %d bytes in %d packets in, %d in %d out: more than an MTU of %d each",
				p.Name, st.BytesIn, st.PacketsIn, st.BytesOut, st.PacketsOut, mtu)
		}
	}
}

// withoutNoWait makes the node's kernel one before Linux 6.4. It takes a pod
// to get at the reader's thread; that one has everything.
func (n *Node) withoutNoWait(name string) {
	t := n.mesh.T
	t.Helper()
	p := n.mesh.Pod(name, n)
	done := make(chan error)
	p.Stack().Loop().Post(func() { done <- netnstest.Refuse(netnstest.WithoutNoWait(unix.EOPNOTSUPP)) })
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	p.StopProxy()
}

// reopen makes the pod's device anew as another agent, or kernel, makes it.
func (p *Pod) reopen(flags uint16, offloads int) {
	t := p.mesh.T
	t.Helper()
	p.file.Close()
	p.NS.Do(func() {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		p.file = os.NewFile(uintptr(fd), podnet.DefaultDevice)
		ifr, err := unix.NewIfreq(podnet.DefaultDevice)
		if err == nil {
			ifr.SetUint16(flags)
			if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err == nil {
				err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads)
			}
		}
		if err != nil {
			t.Fatalf("device of %s: %v", p.Name, err)
		}
	})
}

// logBuffer keeps what several engines log.
type logBuffer struct {
	// mu guards buf.
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// lines returns the lines that have all parts.
func (l *logBuffer) lines(parts ...string) (list []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
line:
	for line := range strings.Lines(l.buf.String()) {
		for _, p := range parts {
			if !strings.Contains(line, p) {
				continue line
			}
		}
		list = append(list, line)
	}
	return list
}
