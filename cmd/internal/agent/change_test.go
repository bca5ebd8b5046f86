package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/zds"
)

// lenders are proxyPods that lend their devices to an agent that has none, as
// those of ztun's own proxy do, and take changes.
type lenders struct{ *proxyPods }

func (p lenders) Start(w zds.Workload, files zds.Files) (zds.Proxy, error) {
	pod, err := p.proxyPods.Start(w, files)
	return lender{pod.(*proxyPod)}, err
}

type lender struct{ *proxyPod }

func (lender) Yield(*os.File) error  { return errors.New("not in this test") }
func (lender) Predecessor() *os.File { return nil }

func (p lender) Update(w zds.Workload) error {
	p.owner.mu.Lock()
	defer p.owner.mu.Unlock()
	p.workload = w
	return nil
}

func (p lender) Lend() (f zds.Files, yielded bool, err error) {
	p.owner.mu.Lock()
	defer p.owner.mu.Unlock()
	again := func(file *os.File) *os.File {
		fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			panic(err)
		}
		return os.NewFile(uintptr(fd), file.Name())
	}
	f.Device = again(p.files.Device)
	if p.owner.lie != nil {
		f.Device = again(p.owner.lie)
	}
	for _, file := range p.files.ICMP {
		f.ICMP = append(f.ICMP, again(file))
	}
	return f, false, nil
}

// TestChangeBeforeTheProxyComes: an agent that starts again takes nothing from a
// proxy that has yet to connect and to lend the device.
func TestChangeBeforeTheProxyComes(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	n.startLenders()
	n.wait("u")
	n.stop()
	dir := n.dir
	n.dir = t.TempDir() // Where the proxy does not find the agent.
	if err := os.Rename(filepath.Join(dir, "state"), filepath.Join(n.dir, "state")); err != nil {
		t.Fatal(err)
	}
	n.startAgent()
	f, err := os.Open(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := podIn(ns, "u")
	p.Netns = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	n.set(p)
	eventually(t, "attached by another path", func() bool { return n.status("u").Phase == Attached })
	if st := n.status("u"); !strings.Contains(st.Error, "no proxy") {
		t.Errorf("another path is a change: %+v", st)
	}
	p.BypassInbound = true
	n.set(p)
	eventually(t, "the change waits", func() bool { return strings.Contains(n.status("u").Error, "has yet to come") })
	if !n.agent.server.State("u").Set {
		t.Error("the proxy will be told that the pod is gone")
	}
}

// TestLentDeviceOfAnotherPod: a proxy that lends one pod's device as another's is
// not believed.
func TestLentDeviceOfAnotherPod(t *testing.T) {
	n, one, two := newNode(t), podNS(t), podNS(t)
	n.set(podIn(one, "u"))
	n.set(podIn(two, "v"))
	proxy := n.startLenders()
	n.wait("u")
	n.wait("v")
	n.stop()
	proxy.mu.Lock()
	proxy.lie = proxy.running["v"].files.Device
	proxy.mu.Unlock()
	n.startAgent()
	eventually(t, "the pod whose device is lent truly is held", func() bool { return n.status("v").Held })
	if !n.agent.server.State("u").Set || n.status("u").Held {
		t.Errorf("the agent took another pod's device: %+v", n.status("u"))
	}
}

// startLenders is a proxy of ztun's.
func (n *node) startLenders() *proxyPods {
	pods := &proxyPods{running: map[string]*proxyPod{}}
	n.runProxy(zds.ClientConfig{Socket: n.socket(), Starter: lenders{pods}, Yields: true})
	return pods
}

// TestChangeCutsNothing: neither while the agent runs, nor of a pod that the
// next agent wants otherwise or knows by another path.
func TestChangeCutsNothing(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	p := podIn(ns, "u")
	p.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.2")}
	n.set(p)
	proxy := n.startLenders()
	n.wait("u")
	told := func(why string, is func(*zds.Device) bool) {
		t.Helper()
		eventually(t, why, func() bool { w, ok := proxy.workload("u"); return ok && is(w.Device) })
		n.wait("u")
		if got := proxy.started(); got != 1 {
			t.Fatalf("%s: started %d times", why, got)
		}
	}

	n.agent.SetNodeAddresses([]netip.Addr{netip.MustParseAddr("192.168.0.2")})
	told("the node's address", func(d *zds.Device) bool { return d.NodeAddresses[0].String() == "192.168.0.2" })

	// What is not mounted is found anew with the second address, and has another path.
	f, err := os.Open(p.Netns)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p.Netns = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	p.Addresses = append(p.Addresses, netip.MustParseAddr("fd00::2"))
	n.set(p)
	told("a second address", func(d *zds.Device) bool { return slices.Equal(d.Addresses, p.Addresses) })

	p.ProbePorts, p.BypassInbound = []uint16{8080}, true
	n.set(p)
	told("settings", func(d *zds.Device) bool { return d.BypassInbound && len(d.ProbePorts) == 1 })

	n.stop()
	n.startAgent()
	p.BypassInbound, p.Netns = false, ns.Path()
	n.set(p)
	told("a change while the agent was away", func(d *zds.Device) bool { return !d.BypassInbound })
	if !n.status("u").Held {
		t.Error("the device was not lent")
	}
}
