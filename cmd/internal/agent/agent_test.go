package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun/netnstest"
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

// node is where agents and proxies of a test live one after the other.
type node struct {
	*testing.T
	dir   string
	agent *Agent
	stop  func() // The agent; its pods stay.
}

func newNode(t *testing.T) *node {
	netnstest.Require(t)
	n := &node{T: t, dir: t.TempDir(), stop: func() {}}
	n.startAgent()
	t.Cleanup(func() { n.stop() })
	return n
}

func (n *node) socket() string { return filepath.Join(n.dir, "agent.sock") }

// startAgent is an agent's next life.
func (n *node) startAgent() {
	n.Helper()
	a, err := New(Config{
		StateDir: filepath.Join(n.dir, "state"), Socket: n.socket(),
		NodeAddresses: []netip.Addr{netip.MustParseAddr("192.168.0.1")},
		Log:           slog.New(slog.NewTextHandler(n.Output(), nil)),
	})
	if err != nil {
		n.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = a.Run(ctx) }()
	n.agent = a
	n.stop = sync.OnceFunc(func() { cancel(); <-done })
}

func (n *node) set(p Pod) {
	n.Helper()
	if err := n.agent.Set(p); err != nil {
		n.Fatal(err)
	}
}

func (n *node) status(uid string) Status {
	for _, s := range n.agent.Status() {
		if s.Pod.UID == uid {
			return s
		}
	}
	return Status{}
}

func (n *node) wait(uid string) {
	n.Helper()
	ctx, cancel := context.WithTimeout(n.Context(), patience)
	defer cancel()
	if err := n.agent.Wait(ctx, uid); err != nil {
		n.Fatal(err)
	}
}

func (n *node) delete(uid string) {
	n.Helper()
	ctx, cancel := context.WithTimeout(n.Context(), patience)
	defer cancel()
	if err := n.agent.Delete(ctx, uid); err != nil {
		n.Fatal(err)
	}
}

// proxyPods are the pods of a proxy that does nothing with them but hold
// their devices, as the life of one process.
type proxyPods struct {
	mu      sync.Mutex
	running map[string]*proxyPod
	starts  []zds.Workload
	lie     *os.File // Lent as the device of every pod. Nil: none is.
}

type proxyPod struct {
	owner    *proxyPods
	workload zds.Workload
	files    zds.Files
}

func (p *proxyPods) Start(w zds.Workload, files zds.Files) (zds.Proxy, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pod := &proxyPod{p, w, files}
	p.running[w.UID] = pod
	p.starts = append(p.starts, w)
	return pod, nil
}

func (p *proxyPod) Stop() {
	p.owner.mu.Lock()
	defer p.owner.mu.Unlock()
	if p.owner.running[p.workload.UID] == p {
		delete(p.owner.running, p.workload.UID)
	}
	p.files.Close()
}

func (p *proxyPods) workload(uid string) (zds.Workload, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pod := p.running[uid]
	if pod == nil {
		return zds.Workload{}, false
	}
	return pod.workload, true
}

// icmp is how many ICMP sockets came with the pod's device.
func (p *proxyPods) icmp(uid string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pod := p.running[uid]; pod != nil {
		return len(pod.files.ICMP)
	}
	return -1
}

func (p *proxyPods) started() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.starts)
}

// proxy is one life of a proxy; die closes everything that it held.
type proxy struct {
	*proxyPods
	die func()
}

func (n *node) startProxy() *proxy {
	pods := &proxyPods{running: map[string]*proxyPod{}}
	return &proxy{pods, n.runProxy(zds.ClientConfig{Socket: n.socket(), Starter: pods})}
}

func (n *node) runProxy(cfg zds.ClientConfig) (die func()) {
	c := zds.NewClient(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	die = sync.OnceFunc(func() {
		cancel()
		<-done
		for _, st := range c.Pods() {
			if st.Proxy != nil {
				st.Proxy.Stop()
			}
		}
	})
	n.Cleanup(die)
	return die
}

// podNS is a pod with one interface.
func podNS(t *testing.T) *netnstest.NS {
	ns, host := netnstest.New(t, "pod"), netnstest.New(t, "host")
	netnstest.Veth(t, ns, "eth0", host, "veth0")
	ns.Addr("eth0", "10.0.0.2/24", "fd00::2/64")
	host.Addr("veth0", "10.0.0.1/24", "fd00::1/64")
	ns.Route("0.0.0.0/0", "10.0.0.1", "eth0")
	ns.Settled()
	return ns
}

func podIn(ns *netnstest.NS, uid string) Pod {
	p := testPod(uid)
	p.Netns = ns.Path()
	return p
}

func captured(ns *netnstest.NS) bool {
	var rules []netlink.Rule
	ns.Do(func() { rules, _ = netlink.RuleList(netlink.FAMILY_V4) })
	return slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Priority == 110 })
}

func TestAttachServeDetach(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	p := podIn(ns, "u")
	p.BypassInbound, p.ProbePorts = true, []uint16{8080}
	n.set(p)
	eventually(t, "attached", func() bool { return n.status("u").Phase == Attached })
	if st := n.status("u"); !st.Held || !strings.Contains(st.Error, "no proxy") || !captured(ns) {
		t.Errorf("attached without a proxy: %+v", st)
	}
	proxy := n.startProxy()
	n.wait("u")
	w, ok := proxy.workload("u")
	if !ok {
		t.Fatal("the proxy does not serve the pod")
	}
	if got := proxy.icmp("u"); got != 2 {
		t.Errorf("%d ICMP sockets came with the device, want one for each family", got)
	}
	d := w.Device
	if d == nil || d.ID == "" || d.MTU != 1500 || !d.Offload || !d.BypassInbound || d.DNSCapture ||
		!slices.Contains(d.Addresses, netip.MustParseAddr("10.0.0.2")) || !slices.Contains(d.Addresses, netip.MustParseAddr("fd00::2")) ||
		!slices.Equal(d.ProbePorts, p.ProbePorts) || len(d.NodeAddresses) != 1 {
		t.Errorf("the device is described as %+v", d)
	}
	n.delete("u")
	if _, ok := proxy.workload("u"); ok || captured(ns) {
		t.Errorf("after Delete the proxy serves it: %v, captured: %v", ok, captured(ns))
	}
	if st := n.agent.Status(); len(st) != 0 {
		t.Errorf("after Delete: %+v", st)
	}
	entries, _ := os.ReadDir(filepath.Join(n.dir, "state", "pods"))
	if len(entries) != 0 {
		t.Errorf("left in the state: %v", entries)
	}
	n.delete("u") // An unknown one is no error.
}

// TestAgentRestart: the proxy goes on with its device, and when it ends the
// next one gets the device that the new agent could open then.
func TestAgentRestart(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	proxy := n.startProxy()
	n.wait("u")
	n.stop()
	if !captured(ns) {
		t.Fatal("an agent that ends lets its pods go")
	}
	n.startAgent() // Nobody tells it of the pod: its state does.
	n.wait("u")
	if st := n.status("u"); st.Held {
		t.Errorf("the new agent holds the device that the proxy has: %+v", st)
	}
	if proxy.started() != 1 || proxy.icmp("u") != 2 {
		t.Errorf("the proxy started the pod %d times and has %d ICMP sockets, want once and 2", proxy.started(), proxy.icmp("u"))
	}
	n.set(podIn(ns, "u")) // The same again changes nothing.
	proxy.die()
	next := n.startProxy()
	eventually(t, "the next proxy serves the pod", func() bool { _, ok := next.workload("u"); return ok })
	n.wait("u")
	if st := n.status("u"); !st.Held {
		t.Errorf("the agent does not hold the device: %+v", st)
	}
	if got := next.icmp("u"); got != 2 {
		t.Errorf("the next proxy got %d ICMP sockets, want 2", got)
	}
}

func TestBothRestart(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	proxy := n.startProxy()
	n.wait("u")
	n.stop()
	proxy.die()
	if !captured(ns) {
		t.Fatal("with neither agent nor proxy the pod is not captured")
	}
	n.startAgent()
	next := n.startProxy()
	n.wait("u")
	if _, ok := next.workload("u"); !ok || !n.status("u").Held {
		t.Errorf("not served after both restarted: %+v", n.status("u"))
	}
}

func TestProxyRestartGetsSameDevice(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	proxy := n.startProxy()
	n.wait("u")
	first, _ := proxy.workload("u")
	proxy.die() // Its process, this one, lives: the same reader comes back.
	next := n.startProxy()
	eventually(t, "served again", func() bool { _, ok := next.workload("u"); return ok })
	second, _ := next.workload("u")
	if first.Device.ID != second.Device.ID {
		t.Errorf("device ids %q and %q: it was opened again", first.Device.ID, second.Device.ID)
	}
	if got := next.icmp("u"); got != 2 {
		t.Errorf("%d ICMP sockets, want 2", got)
	}
}

func TestChangeWhileRunning(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	p := podIn(ns, "u")
	n.set(p)
	proxy := n.startProxy()
	n.wait("u")
	before, _ := proxy.workload("u")
	p.BypassInbound, p.DNSCapture = true, true
	n.set(p)
	eventually(t, "told of the change", func() bool {
		w, ok := proxy.workload("u")
		return ok && w.Device.BypassInbound && w.Device.DNSCapture
	})
	if after, _ := proxy.workload("u"); after.Device.ID != before.Device.ID {
		t.Error("the device was opened again for other flags")
	}
	n.wait("u")
}

// TestChangeWhileAway: the agent's next life wants other flags, but only the
// proxy has the device.
func TestChangeWhileAway(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	p := podIn(ns, "u")
	n.set(p)
	proxy := n.startProxy()
	n.wait("u")
	n.stop()
	n.startAgent()
	p.BypassInbound = true
	n.set(p)
	eventually(t, "told of the change", func() bool {
		w, ok := proxy.workload("u")
		return ok && w.Device.BypassInbound
	})
	n.wait("u")
}

func TestDeviceTakenAway(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	proxy := n.startProxy()
	n.wait("u")
	before, _ := proxy.workload("u")
	ns.Do(func() {
		link, err := netlink.LinkByName("ztun0")
		if err == nil {
			err = netlink.LinkDel(link)
		}
		if err != nil {
			t.Error(err)
		}
	})
	eventually(t, "another device", func() bool {
		w, ok := proxy.workload("u")
		return ok && w.Device.ID != before.Device.ID
	})
	if got := proxy.icmp("u"); got != 2 {
		t.Errorf("%d ICMP sockets came with it, want 2", got)
	}
	eventually(t, "counted", func() bool { return n.status("u").Repairs > 0 })
}

func TestAddressesComeLate(t *testing.T) {
	n := newNode(t)
	ns, host := netnstest.New(t, "pod"), netnstest.New(t, "host")
	netnstest.Veth(t, ns, "eth0", host, "veth0")
	n.set(podIn(ns, "u"))
	proxy := n.startProxy()
	eventually(t, "an attempt", func() bool { return n.status("u").Error != "" })
	ns.Addr("eth0", "10.0.0.7/24")
	eventually(t, "served with its address", func() bool {
		w, ok := proxy.workload("u")
		return ok && slices.Contains(w.Device.Addresses, netip.MustParseAddr("10.0.0.7"))
	})
}

func TestDeleteWhenNamespaceIsGone(t *testing.T) {
	n := newNode(t)
	p := testPod("u")
	p.Netns = filepath.Join(t.TempDir(), "gone")
	n.set(p)
	eventually(t, "an error", func() bool { return strings.Contains(n.status("u").Error, "gone") })
	if st := n.status("u"); st.Phase != Attaching {
		t.Errorf("phase = %s", st.Phase)
	}
	n.delete("u")
}

// TestDeleteWhenNamespaceIsNotFound: an agent that starts again and does not know
// where the pod's namespace is must not say that the pod is out of the mesh.
func TestDeleteWhenNamespaceIsNotFound(t *testing.T) {
	for name, tt := range map[string]struct {
		netns string
		undo  func(*node, *netnstest.NS) error
	}{
		"never known, then wanted where it is": {NotFound, func(n *node, ns *netnstest.NS) error {
			n.set(podIn(ns, "u"))
			return n.agent.Delete(n.Context(), "u")
		}},
		"never known, then found": {NotFound, func(n *node, ns *netnstest.NS) error {
			return n.agent.Detach(n.Context(), podIn(ns, "u"))
		}},
		"not mounted any more, then found": {"/nowhere", func(n *node, ns *netnstest.NS) error {
			return n.agent.Detach(n.Context(), podIn(ns, "u"))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			n, ns := newNode(t), podNS(t)
			n.set(podIn(ns, "u"))
			eventually(t, "attached", func() bool { return n.status("u").Phase == Attached })
			n.stop()
			p := podIn(ns, "u")
			p.Netns = tt.netns
			rewriteState(t, n, p)
			n.startAgent()
			if err := n.agent.Delete(t.Context(), "u"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), tt.netns) {
				t.Errorf("Delete = %v, want ErrNotFound for %s", err, tt.netns)
			}
			if st := n.status("u"); !captured(ns) || st.Phase != Detaching {
				t.Errorf("captured: %v; %+v", captured(ns), st)
			}
			if err := tt.undo(n, ns); err != nil {
				t.Error(err)
			}
			if left := n.agent.Status(); captured(ns) || len(left) != 0 {
				t.Errorf("captured: %v; the agent has %+v", captured(ns), left)
			}
		})
	}
}

// rewriteState makes the state of an agent that has ended say something else of p.
func rewriteState(t *testing.T, n *node, p Pod) {
	t.Helper()
	s, err := n.agent.store.read(p.UID + suffix)
	if err != nil {
		t.Fatal(err)
	}
	s.Pod = p
	if err := n.agent.store.save(s); err != nil {
		t.Fatal(err)
	}
}

// TestDetachWithoutState: only the pod's rules tell that an agent was there.
func TestDetachWithoutState(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	eventually(t, "attached", func() bool { return n.status("u").Phase == Attached })
	n.stop()
	if err := n.agent.store.remove("u"); err != nil {
		t.Fatal(err)
	}
	n.startAgent()
	if err := n.agent.Detach(t.Context(), podIn(ns, "u")); err != nil {
		t.Error(err)
	}
	if left := n.agent.Status(); captured(ns) || len(left) != 0 {
		t.Errorf("captured: %v; the agent has %+v", captured(ns), left)
	}
}

// TestSlowDetachesDoNotHoldAttachesUp: those that wait for sockets have turns
// of their own.
func TestSlowDetachesDoNotHoldAttachesUp(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.startProxy()
	for range cap(n.agent.detaching) {
		n.agent.detaching <- struct{}{}
	}
	n.set(podIn(ns, "u"))
	n.wait("u")
	for range cap(n.agent.detaching) {
		<-n.agent.detaching
	}
	n.delete("u")
}

func TestDeleteAndSetAgain(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	proxy := n.startProxy()
	for range 3 {
		n.set(podIn(ns, "u"))
		n.wait("u")
		n.delete("u")
		if captured(ns) {
			t.Fatal("captured after Delete")
		}
	}
	if proxy.started() != 3 {
		t.Errorf("%d starts, want 3", proxy.started())
	}
}

// TestCrashBeforeStateIsSaved: the pod's file says that it is wanted, not what
// was done to it.
func TestCrashBeforeStateIsSaved(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	p := podIn(ns, "u")
	n.set(p)
	eventually(t, "attached", func() bool { return n.status("u").Phase == Attached })
	n.stop()
	if err := n.agent.store.save(saved{Pod: p}); err != nil {
		t.Fatal(err)
	}
	n.startAgent()
	n.startProxy()
	n.wait("u")
	n.delete("u")
	if captured(ns) {
		t.Error("captured after Delete")
	}
}

func TestManyPods(t *testing.T) {
	n := newNode(t)
	proxy := n.startProxy()
	const pods = 8
	for i := range pods {
		p := podIn(podNS(t), string(rune('a'+i)))
		n.set(p)
	}
	for i := range pods {
		n.wait(string(rune('a' + i)))
	}
	if proxy.started() != pods {
		t.Errorf("%d starts, want %d", proxy.started(), pods)
	}
}

// TestPodsAreLeftAloneWithOthersProxies: what proxies do to one pod is looked at by
// that one alone, or many at once take the square of their number.
func TestPodsAreLeftAloneWithOthersProxies(t *testing.T) {
	a, err := New(Config{StateDir: filepath.Join(t.TempDir(), "state"), Socket: filepath.Join(t.TempDir(), "s")})
	if err != nil {
		t.Fatal(err)
	}
	defer a.listener.Close()
	for _, uid := range []string{"u", "v"} {
		p := testPod(uid)
		p.Netns = "/nowhere"
		if err := a.Set(p); err != nil { // Nobody runs.
			t.Fatal(err)
		}
	}
	look := func() (woken []string) {
		for _, w := range a.all() {
			before := w.changes()
			w.look()
			kicked, told := len(w.wake) > 0, before != w.changes()
			if kicked != told {
				t.Errorf("%s: kicked: %v, those who wait told: %v", w.uid, kicked, told)
			}
			if kicked {
				<-w.wake
				woken = append(woken, w.uid)
			}
		}
		return woken
	}
	p := testPod("u")
	d := &zds.Device{ID: "d", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, MTU: 1500}
	for range 2 { // The second time it is described anew.
		d.ProbePorts = append(d.ProbePorts, 80)
		if err := a.server.Set(p.workload(d), zds.Files{}); err != nil {
			t.Fatal(err)
		}
		if got := look(); !slices.Equal(got, []string{"u"}) {
			t.Errorf("woken: %q, want the one that changed", got)
		}
	}
	if got := look(); len(got) != 0 {
		t.Errorf("woken without a change: %q", got)
	}
}

func TestAwait(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	if got := n.agent.Await(t.Context(), "u", Attached); got != "" || n.agent.Phase("u") != "" {
		t.Errorf("an unknown pod is %q", got)
	}
	n.set(podIn(ns, "u"))
	if got := n.agent.Await(t.Context(), "u", Attaching); got != Attached {
		t.Errorf("it becomes %q", got)
	}
	n.startProxy()
	if got := n.agent.Await(t.Context(), "u", Attached); got != Served || n.agent.Phase("u") != Served {
		t.Errorf("it becomes %q", got)
	}
	gone := make(chan Phase)
	go func() {
		phase := Served
		for phase != "" {
			phase = n.agent.Await(t.Context(), "u", phase)
		}
		gone <- phase
	}()
	n.delete("u")
	<-gone
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	n.set(podIn(ns, "u"))
	if got := n.agent.Await(ctx, "u", Attaching); got != Attaching && got != Served && got != Attached {
		t.Errorf("it is %q", got)
	}
}

func TestWaitAndRunRefuse(t *testing.T) {
	n := newNode(t)
	if err := n.agent.Wait(t.Context(), "nobody"); err == nil {
		t.Error("Wait for a pod that is not wanted returned")
	}
	eventually(t, "running", func() bool {
		n.agent.mu.Lock()
		defer n.agent.mu.Unlock()
		return n.agent.ctx != nil
	})
	if err := n.agent.Run(t.Context()); err == nil {
		t.Error("Run twice")
	}
	if err := n.agent.Set(Pod{}); err == nil {
		t.Error("Set of nothing was accepted")
	}
	if _, err := New(Config{}); err == nil {
		t.Error("New without a directory was accepted")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	p := testPod("u")
	p.Netns = "/nowhere"
	n.set(p)
	if err := n.agent.Wait(ctx, "u"); !errors.Is(err, why) {
		t.Errorf("Wait = %v, want the cause", err)
	}
}

// TestForgetLeavesNamespaceAlone: a pod that has ended is nobody's, and what
// may still run in it stays captured.
func TestForgetLeavesNamespaceAlone(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	proxy := n.startProxy()
	n.set(podIn(ns, "u"))
	n.wait("u")
	if err := n.agent.Forget(t.Context(), "u"); err != nil {
		t.Fatal(err)
	}
	if _, ok := proxy.workload("u"); ok || !captured(ns) || len(n.agent.Status()) != 0 {
		t.Errorf("after Forget the proxy serves it: %v, captured: %v, status: %+v", ok, captured(ns), n.agent.Status())
	}
	if entries, _ := os.ReadDir(filepath.Join(n.dir, "state", "pods")); len(entries) != 0 {
		t.Errorf("left in the state: %v", entries)
	}
	if err := n.agent.Forget(t.Context(), "u"); err != nil {
		t.Errorf("an unknown pod: %v", err)
	}
	n.set(podIn(ns, "u"))
	n.wait("u")
	n.delete("u")
	if captured(ns) {
		t.Error("a pod that is wanted again after Forget stays captured after Delete")
	}
}

// TestForgetBeforeRun: no proxy hears of a pod that ended while no agent ran.
func TestForgetBeforeRun(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	eventually(t, "attached", func() bool { return n.status("u").Phase == Attached })
	n.stop()
	a, err := New(Config{StateDir: filepath.Join(n.dir, "state"), Socket: n.socket()})
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Status()) != 1 {
		t.Fatalf("the new agent knows %+v", a.Status())
	}
	if err := a.Forget(t.Context(), "u"); err != nil {
		t.Fatal(err)
	}
	if got := a.server.State("u"); got.Set || len(a.Status()) != 0 {
		t.Errorf("after Forget: %+v, %+v", got, a.Status())
	}
	if entries, _ := os.ReadDir(filepath.Join(n.dir, "state", "pods")); len(entries) != 0 {
		t.Errorf("left in the state: %v", entries)
	}
	_ = a.listener.Close()
}

// TestWaitIsForWhatWasSetLast: a pod whose sandbox was made again is served
// only once the new one is.
func TestWaitIsForWhatWasSetLast(t *testing.T) {
	n, first := newNode(t), podNS(t)
	n.startProxy()
	n.set(podIn(first, "u"))
	n.wait("u")
	for i := range 5 {
		again := podNS(t)
		n.set(podIn(again, "u"))
		n.wait("u")
		if !captured(again) {
			t.Fatalf("sandbox %d: Wait returned before it was captured", i)
		}
	}
}
