package podnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztun/ztun/tun/netnstest"
)

// watched is an Attachment under Watch, which never rechecks by itself while a test runs.
type watched struct {
	*env
	// mu guards the fields below.
	mu      sync.Mutex
	changes []Change
}

func watch(t *testing.T, e *env, cfg Config) *watched {
	t.Helper()
	w := &watched{env: e}
	cfg.Recheck = time.Hour
	cfg.OnChange = func(c Change) {
		w.mu.Lock()
		w.changes = append(w.changes, c)
		w.mu.Unlock()
	}
	e.attach(cfg)
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- e.a.Watch(ctx) }()
	over := errors.New("the test is over")
	t.Cleanup(func() {
		cancel(over)
		if err := <-done; !errors.Is(err, over) {
			t.Errorf("Watch = %v, want the cause of its context", err)
		}
	})
	netnstest.Eventually(t, "first check", func() bool { return e.a.Stats().Checks > 0 })
	return w
}

// mended waits until all is well again and something of a kind was repaired.
func (w *watched) mended(kind string, before Stats) {
	w.t.Helper()
	netnstest.Eventually(w.t, "repair of "+kind, func() bool { return w.a.Stats().Repairs[kind] > before.Repairs[kind] })
	var err error
	netnstest.Eventually(w.t, "all well after repair of "+kind, func() bool { err = w.a.Verify(w.t.Context()); return err == nil })
}

func (w *watched) lastChange() (c Change, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.changes) == 0 {
		return Change{}, false
	}
	return w.changes[len(w.changes)-1], true
}

func TestWatchRepairs(t *testing.T) {
	w := watch(t, newEnv(t), Config{CaptureDNS: true})
	for _, c := range []struct {
		kind, what string
		harm       func()
	}{
		{repairRule, "outbound capture", func() { w.pod.Run("ip", "rule", "del", "pref", "110") }},
		{repairRule, "inbound capture of IPv6", func() { w.pod.Run("ip", "-6", "rule", "del", "pref", "20") }},
		{repairRule, "local back at 0", func() { w.pod.Run("ip", "rule", "add", "pref", "0", "lookup", "local") }},
		{repairRule, "all rules", func() {
			w.pod.Run("ip", "rule", "flush")
			w.pod.Run("ip", "rule", "add", "pref", "32766", "lookup", "main")
		}},
		{repairRoute, "default of the table", func() { w.pod.Run("ip", "route", "del", "default", "dev", "ztun0", "table", fmt.Sprint(captureTable)) }},
		{repairRoute, "whole table of IPv6", func() { w.pod.Run("ip", "-6", "route", "flush", "table", fmt.Sprint(captureTable)) }},
		{repairRoute, "a way past the device", func() {
			w.pod.Run("ip", "route", "add", "198.51.100.0/24", "via", "10.1.0.1", "table", fmt.Sprint(captureTable))
		}},
		{repairRoute, "a new prefix of main", func() { w.pod.Run("ip", "route", "add", "172.30.0.0/16", "via", "10.1.0.1") }},
		{repairLink, "device down", func() { w.pod.Down("ztun0") }},
		{repairLink, "device MTU", func() { w.pod.SetMTU("ztun0", 9000) }},
		{repairLink, "address on the device", func() { w.pod.Addr("ztun0", "10.99.0.1/32") }},
		{repairSysctl, "forwarding", func() { w.pod.SetSysctl("net/ipv4/conf/eth0/forwarding", "0") }},
		{repairSysctl, "reverse path", func() { w.pod.SetSysctl("net/ipv4/conf/all/rp_filter", "1") }},
	} {
		t.Run(c.what, func(t *testing.T) {
			before := w.a.Stats()
			c.harm()
			w.mended(c.kind, before)
		})
	}
	if w.a.Stats().Failures != 0 {
		t.Errorf("stats = %+v", w.a.Stats())
	}
}

func TestWatchRepairsAToggledIPForward(t *testing.T) {
	w := watch(t, newEnv(t), Config{})
	before := w.a.Stats()
	w.pod.SetSysctl("net/ipv4/ip_forward", "1")
	w.mended(repairRule, before) // the pod wants to be a router: 101 goes
	if rules := w.pod.Run("ip", "rule"); slices.Contains(ruleNumbers(rules), "101") {
		t.Errorf("rule 101 in a pod that forwards:\n%s", rules)
	}
	before = w.a.Stats()
	w.pod.SetSysctl("net/ipv4/ip_forward", "0")
	w.mended(repairRule, before)
	if !inboundCaptured(w.env, 4, 8181) || !networkLeg(w.env, 4, 8182) {
		t.Error("capture does not work after ip_forward was toggled")
	}
}

func ruleNumbers(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		number, _, _ := strings.Cut(line, ":")
		out = append(out, number)
	}
	return out
}

func TestWatchFollowsAddressesAndInterfaces(t *testing.T) {
	w := watch(t, newEnv(t), Config{})
	w.pod.Addr("eth0", "10.1.0.3/24", "fd01::3/64")
	for _, ip := range []string{"10.1.0.3", "fd01::3"} {
		to := netip.AddrPortFrom(netip.MustParseAddr(ip), 80)
		netnstest.Eventually(t, "the proxy is told of "+ip, func() bool {
			c, ok := w.lastChange()
			return ok && slices.Contains(c.Addrs, to.Addr())
		})
		from := peerAddr[4]
		if to.Addr().Is6() {
			from = peerAddr[6]
		}
		w.fromPeer(tcpPacket(netip.AddrPortFrom(from, 9), to, flagSYN, 1, 0, ""))
		if w.onDevice(to) == 0 {
			t.Errorf("TCP to the new address %v is not captured", to)
		}
	}
	w.pod.SetMTU("eth0", 1380)
	netnstest.Eventually(t, "the proxy is told of the MTU", func() bool { c, _ := w.lastChange(); return c.MTU == 1380 && w.a.MTU() == 1380 })

	netnstest.Veth(t, w.pod, "net1", w.peer, "p1")
	w.pod.Addr("net1", "10.3.0.2/24")
	netnstest.Eventually(t, "capture of the new interface", func() bool {
		return w.a.Verify(t.Context()) == nil && slices.Contains(w.a.Addrs(), netip.MustParseAddr("10.3.0.2"))
	})
	if err := w.connect(w.pod, netip.MustParseAddrPort("10.3.0.9:80"), bindToDevice("net1")); err == nil {
		t.Log("connect bound to the new interface did not fail at once")
	}
	if n := w.onWire(netip.MustParseAddrPort("10.3.0.9:80")); n != 0 {
		t.Error("a socket bound to the new interface escapes")
	}

	before := w.a.Stats()
	w.pod.Bridge("docker0")
	w.mended(repairRule, before)
	if rules := w.pod.Run("ip", "rule"); slices.Contains(ruleNumbers(rules), "101") {
		t.Errorf("rule 101 in a pod with a bridge:\n%s", rules)
	}
}

func TestWatchMakesADeletedDeviceAnew(t *testing.T) {
	w := watch(t, newEnv(t), Config{})
	before := w.a.Stats()
	w.pod.Run("ip", "link", "del", "ztun0")
	w.mended(repairDevice, before)
	var file *os.File
	netnstest.Eventually(t, "the proxy gets the new device", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, c := range w.changes {
			if c.File != nil {
				file = c.File
				if !c.Offload {
					t.Error("the new device has no offload")
				}
			}
		}
		return file != nil
	})
	w.dev = readDevice(t, file)
	if !inboundCaptured(w.env, 4, 8080) || !networkLeg(w.env, 6, 8081) {
		t.Error("capture does not work on the new device")
	}
}

// Nothing of the pod's TCP reaches the wire, and nothing from outside the app, whatever becomes of the device.
func TestFailsClosed(t *testing.T) {
	for name, harm := range map[string]func(e *env){
		"no reader":   func(e *env) { e.dev.close() },
		"device down": func(e *env) { e.pod.Down("ztun0") },
		"device gone": func(e *env) { e.dev.close(); e.pod.Run("ip", "link", "del", "ztun0") },
		"linkdown": func(e *env) {
			e.dev.close()
			e.pod.SetSysctl("net/ipv4/conf/all/ignore_routes_with_linkdown", "1")
			e.pod.SetSysctl("net/ipv6/conf/all/ignore_routes_with_linkdown", "1")
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			e.attach(Config{CaptureDNS: true})
			flow := e.proxied(netip.AddrPortFrom(farAddr[4], 443))
			harm(e)
			for _, v := range bothFamilies {
				out, in := netip.AddrPortFrom(farAddr[v], 80), netip.AddrPortFrom(podAddr[v], 80)
				_ = e.connect(e.pod, out)
				dns := netip.AddrPortFrom(farAddr[v], 53)
				_ = e.sendUDP(e.pod, dns)
				before := e.inSegs()
				if err := e.connect(e.peer, in); err != nil {
					t.Fatal(err)
				}
				if e.onWire(out) != 0 || e.onWire(dns) != 0 {
					t.Errorf("IPv%d: %d TCP and %d DNS packets left in plain text", v, e.onWire(out), e.onWire(dns))
				}
				if n := e.inSegs() - before; n != 0 {
					t.Errorf("IPv%d: %d segments reached the app", v, n)
				}
			}
			_, _ = flow.Write([]byte("secret"))
			if n := e.onWire(netip.AddrPortFrom(farAddr[4], 443)); n != 0 {
				t.Errorf("%d packets of a proxied flow left in plain text", n)
			}
		})
	}
}

func TestForeignRuleIsReported(t *testing.T) {
	w := watch(t, newEnv(t), Config{})
	w.pod.Run("ip", "rule", "add", "pref", "30", "fwmark", "7", "lookup", "main")
	netnstest.Eventually(t, "the foreign rule is counted", func() bool { return w.a.Stats().Foreign == 1 })
	var drift *DriftError
	if err := w.a.Verify(t.Context()); !errors.As(err, &drift) {
		t.Errorf("Verify = %v, want a DriftError", err)
	}
}

func TestClosedAttachment(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	for range 2 {
		if err := e.a.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.a.Watch(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Watch = %v", err)
	}
	if err := e.a.Verify(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Verify = %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Attach(ctx, e.pod.File(), Config{}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Attach with a context that ended = %v", err)
	}
}
