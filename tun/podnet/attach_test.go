package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

// linkState of a TUN depends on having had a reader.
var linkState = regexp.MustCompile(` state [A-Z]+`)

// trace is everything in a namespace that an attachment may leave behind.
func trace(t *testing.T, ns *netnstest.NS) string {
	t.Helper()
	var b strings.Builder
	for _, args := range []string{
		"-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all", "-o addr", "-o link",
	} {
		for line := range strings.Lines(ns.Run("ip", strings.Fields(args)...)) {
			// Counters of caches and of reference times.
			if !strings.Contains(line, "cache") {
				fmt.Fprintf(&b, "%s: %s", args, linkState.ReplaceAllString(line, ""))
			}
		}
	}
	// stable_secret cannot be read; the others count or differ by themselves.
	b.WriteString(ns.Run("sh", "-c", "cd /proc/sys/net && grep -rs . ipv4 ipv6 | grep -v -e stable_secret -e ipv4/route/flush -e tcp_mem -e udp_mem -e fib_multipath_hash_seed | sort"))
	return b.String()
}

func TestDetachLeavesNoTrace(t *testing.T) {
	for name, prepare := range map[string]func(e *env){
		"plain": func(*env) {},
		"strict reverse path": func(e *env) {
			e.pod.SetSysctl("net/ipv4/conf/all/rp_filter", "1")
			e.pod.SetSysctl("net/ipv4/conf/default/rp_filter", "0")
			e.pod.SetSysctl("net/ipv4/conf/eth0/rp_filter", "2")
		},
		"forwarding": func(e *env) {
			e.pod.SetSysctl("net/ipv4/ip_forward", "1")
			e.pod.SetSysctl("net/ipv6/conf/all/forwarding", "1")
		},
		"no IPv6": func(e *env) {
			e.pod.SetSysctl("net/ipv6/conf/all/disable_ipv6", "1")
			e.pod.SetSysctl("net/ipv6/conf/default/disable_ipv6", "1")
		},
		"two interfaces": func(e *env) {
			netnstest.Veth(e.t, e.pod, "net1", e.peer, "p1")
			e.pod.Addr("net1", "10.3.0.2/24", "fd03::2/64")
		},
		"virtual machines": func(e *env) { virtualMachine(e, 4) },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			prepare(e)
			e.pod.Settled()
			before := trace(t, e.pod)
			e.attach(Config{CaptureDNS: true, VirtualInterfaces: []string{"vbr"}})
			if during := trace(t, e.pod); during == before {
				t.Fatal("attach changed nothing that the test can see")
			}
			for range 2 { // the second finds nothing to do
				if err := Detach(t.Context(), e.pod.File(), e.a.State(), nil); err != nil {
					t.Fatal(allOf(err))
				}
				if diff := cmp.Diff(before, trace(t, e.pod)); diff != "" {
					t.Errorf("trace after detach (-before +after):\n%s", diff)
				}
			}
		})
	}
}

func TestAttachTwiceIsAttachOnce(t *testing.T) {
	e := newEnv(t)
	before := trace(t, e.pod)
	e.attach(Config{CaptureDNS: true})
	once := trace(t, e.pod)
	if _, err := Attach(t.Context(), e.pod.File(), Config{CaptureDNS: true}, nil); !errors.Is(err, tun.ErrBusy) {
		t.Fatalf("Attach under a reader = %v, want ErrBusy", err)
	}
	if diff := cmp.Diff(once, trace(t, e.pod)); diff != "" {
		t.Errorf("a refused attach left (-before +after):\n%s", diff)
	}
	state := e.a.State()
	e.dev.close()
	for _, prev := range []*State{&state, nil} {
		a, err := Attach(t.Context(), e.pod.File(), Config{CaptureDNS: true}, prev)
		if err != nil {
			t.Fatal(allOf(err))
		}
		if !a.Offload || a.File == nil {
			t.Errorf("second attach: file %v, offload %v", a.File, a.Offload)
		}
		if diff := cmp.Diff(once, trace(t, e.pod)); diff != "" {
			t.Errorf("second attach (-first +second):\n%s", diff)
		}
		if prev != nil {
			if diff := cmp.Diff(state.Sysctls, a.State().Sysctls); diff != "" {
				t.Errorf("saved sysctls (-first +second):\n%s", diff)
			}
		}
		_ = a.File.Close()
		_ = a.Close()
		state = a.State()
	}
	// The last one had to guess what the sysctls were.
	if err := Detach(t.Context(), e.pod.File(), state, nil); err != nil {
		t.Fatal(allOf(err))
	}
	if diff := cmp.Diff(before, trace(t, e.pod)); diff != "" {
		t.Errorf("trace after detach (-before +after):\n%s", diff)
	}
}

// An agent that died before it could store the State detaches all the same.
func TestDetachWithoutState(t *testing.T) {
	e := newEnv(t)
	before := trace(t, e.pod)
	if err := Detach(t.Context(), e.pod.File(), State{}, nil); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, trace(t, e.pod)); diff != "" {
		t.Errorf("detach of a pod that was never attached (-before +after):\n%s", diff)
	}
	e.attach(Config{})
	if err := Detach(t.Context(), e.pod.File(), State{}, nil); err != nil {
		t.Fatal(allOf(err))
	}
	if diff := cmp.Diff(before, trace(t, e.pod)); diff != "" {
		t.Errorf("trace after detach (-before +after):\n%s", diff)
	}
}

func TestResumeLeavesTheDeviceToItsReader(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	b, err := json.Marshal(e.a.State())
	if err != nil {
		t.Fatal(err)
	}
	_ = e.a.Close()
	var state State
	if err := json.Unmarshal(b, &state); err != nil {
		t.Fatal(err)
	}
	a, err := Resume(t.Context(), e.pod.File(), Config{}, state)
	if err != nil {
		t.Fatal(err)
	}
	e.own(a)
	if a.File != nil {
		t.Error("Resume took the device from its reader")
	}
	if diff := cmp.Diff(state, a.State(), cmp.Comparer(func(x, y netip.Addr) bool { return x == y }), cmp.Comparer(func(x, y netip.AddrPort) bool { return x == y })); diff != "" {
		t.Errorf("state (-stored +resumed):\n%s", diff)
	}
	e.repair()
}

func TestReattachWithOtherFlags(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{VirtualInterfaces: []string{"vbr"}})
	state := e.a.State()
	dns := netip.AddrPortFrom(peerAddr[4], 53)
	_ = e.sendUDP(e.pod, dns)
	if e.onWire(dns) != 1 {
		t.Error("DNS is captured without the flag")
	}
	e.dev.close()
	_ = e.a.Close()
	a, err := Attach(t.Context(), e.pod.File(), Config{CaptureDNS: true}, &state)
	if err != nil {
		t.Fatal(allOf(err))
	}
	e.own(a)
	_ = e.sendUDP(e.pod, dns)
	if e.onWire(dns) != 1 || e.onDevice(dns) != 1 {
		t.Errorf("DNS with the flag: %d on the wire, %d at the device", e.onWire(dns), e.onDevice(dns))
	}
	if got := e.pod.Run("ip", "rule"); strings.Contains(got, "vbr") {
		t.Errorf("a rule of the flag that is gone:\n%s", got)
	}
	if !strings.Contains(e.pod.Run("ip", "rule"), "101:") {
		t.Error("rule 101 did not come back with the virtual interface gone from the flags")
	}
}

func TestAttachRefusesCollisions(t *testing.T) {
	for name, collide := range map[string]func(e *env){
		"rule before capture": func(e *env) { e.pod.Run("ip", "rule", "add", "pref", "50", "lookup", "77") },
		"IPv6 rule before capture": func(e *env) {
			e.pod.Run("ip", "-6", "rule", "add", "pref", "110", "lookup", "77")
		},
		"rule at 0":    func(e *env) { e.pod.Run("ip", "rule", "add", "pref", "0", "fwmark", "1", "lookup", "77") },
		"use of table": func(e *env) { e.pod.Run("ip", "rule", "add", "pref", "900", "lookup", fmt.Sprint(captureTable)) },
		"route": func(e *env) {
			e.pod.Run("ip", "route", "add", "10.9.0.0/16", "dev", "eth0", "table", fmt.Sprint(captureTable))
		},
		"foreign ztun0": func(e *env) { netnstest.Veth(e.t, e.pod, "ztun0", e.peer, "px") },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			collide(e)
			before := trace(t, e.pod)
			_, err := Attach(t.Context(), e.pod.File(), Config{}, nil)
			var collision *CollisionError
			if !errors.As(err, &collision) {
				t.Fatalf("Attach = %v, want a CollisionError", err)
			}
			if diff := cmp.Diff(before, trace(t, e.pod)); diff != "" {
				t.Errorf("trace (-before +after):\n%s", diff)
			}
		})
	}
}

func TestFailedAttachUndoesItself(t *testing.T) {
	e := newEnv(t)
	for i := range maxRules {
		// More addresses than there is room for in rules.
		a := netip.AddrFrom4([4]byte{10, 4, byte(i >> 8), byte(i)})
		e.pod.Addr("eth0", a.String()+"/32")
		if i > maxRules/3 {
			break
		}
	}
	before := trace(t, e.pod)
	if _, err := Attach(t.Context(), e.pod.File(), Config{}, nil); err == nil || !strings.Contains(err.Error(), "rules") {
		t.Fatalf("Attach = %v, want an error about rules", err)
	}
	if diff := cmp.Diff(before, trace(t, e.pod)); diff != "" {
		t.Errorf("trace (-before +after):\n%s", diff)
	}
}

func TestUnaffectedTraffic(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	for _, v := range bothFamilies {
		udp := netip.AddrPortFrom(peerAddr[v], 9000)
		if err := e.sendUDP(e.pod, udp); err != nil {
			t.Fatal(err)
		}
		if e.onWire(udp) != 1 || e.onDevice(udp) != 0 {
			t.Errorf("UDP to %v: %d on the wire, %d at the device", udp, e.onWire(udp), e.onDevice(udp))
		}
		in := e.pod.ListenPacket("udp", netip.AddrPortFrom(podAddr[v], 9001).String())
		if err := e.sendUDP(e.peer, netip.AddrPortFrom(podAddr[v], 9001)); err != nil {
			t.Fatal(err)
		}
		_ = in.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, _, err := in.ReadFrom(make([]byte, 100)); err != nil {
			t.Errorf("UDP to %v: %v", podAddr[v], err)
		}
	}
	for _, v := range bothFamilies {
		for _, ns := range []*netnstest.NS{e.pod, e.peer} {
			ping(e, ns, map[*netnstest.NS]netip.Addr{e.pod: peerAddr[v], e.peer: podAddr[v]}[ns])
		}
		if got := e.dev.matching(func(b []byte) bool {
			p, ok := parsePacket(b)
			return ok && p.dst.Addr() == peerAddr[v]
		}); len(got) != 0 {
			t.Errorf("%d packets to %v at the device", len(got), peerAddr[v])
		}
	}
}

// ping waits for the answer to an echo request.
func ping(e *env, ns *netnstest.NS, to netip.Addr) {
	e.t.Helper()
	domain, proto, request, reply := unix.AF_INET, unix.IPPROTO_ICMP, byte(8), byte(0)
	if to.Is6() {
		domain, proto, request, reply = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, 129
	}
	ns.Do(func() {
		raw, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
		if err != nil {
			e.t.Fatal(err)
		}
		defer func() { _ = unix.Close(raw) }()
		b := []byte{request, 0, 0, 0, 0, 1, 0, 1}
		sum := ^onesSum(b) // of IPv6 the kernel sums itself
		b[2], b[3] = byte(sum>>8), byte(sum)
		if err := unix.Sendto(raw, b, 0, sockaddr(ns, netip.AddrPortFrom(to, 0))); err != nil {
			e.t.Error(err)
		}
	})
	e.wire.Wait(e.t, fmt.Sprintf("echo reply of %v", to), func(b []byte) bool {
		p, ok := parsePacket(b)
		at := 20
		if to.Is6() {
			at = 40
		}
		return ok && int(p.proto) == proto && p.src.Addr() == to && b[at] == reply
	})
}

// The proxy's own connections: from the pod's address through the device to the wire, and back to the device.
func TestNetworkLeg(t *testing.T) {
	for _, strict := range []string{"0", "1"} {
		for _, v := range bothFamilies {
			t.Run(fmt.Sprintf("IPv%d rp_filter %s", v, strict), func(t *testing.T) {
				e := newEnv(t)
				e.pod.SetSysctl("net/ipv4/conf/all/rp_filter", strict)
				e.attach(Config{})
				e.peer.Listen("tcp", netip.AddrPortFrom(farAddr[v], 15008).String())
				from, to := netip.AddrPortFrom(podAddr[v], 40001), netip.AddrPortFrom(farAddr[v], 15008)
				e.dev.inject(t, tcpPacket(from, to, flagSYN, 100, 0, ""))
				netnstest.Eventually(t, "SYN-ACK at the device", func() bool {
					return len(e.dev.matching(func(b []byte) bool {
						p, ok := parsePacket(b)
						return ok && p.src == to && p.dst == from && p.flags == flagSYN|flagACK
					})) > 0
				})
			})
		}
	}
}

// The proxy's connection to the app, with the client's address, and the app's answer.
func TestAppLegKeepsTheClientsAddress(t *testing.T) {
	for _, strict := range []string{"0", "1"} {
		for _, v := range bothFamilies {
			t.Run(fmt.Sprintf("IPv%d rp_filter %s", v, strict), func(t *testing.T) {
				e := newEnv(t)
				e.pod.SetSysctl("net/ipv4/conf/all/rp_filter", strict)
				e.attach(Config{})
				e.pod.Listen("tcp", netip.AddrPortFrom(podAddr[v], 8080).String())
				from, to := netip.AddrPortFrom(farAddr[v], 40002), netip.AddrPortFrom(podAddr[v], 8080)
				e.dev.inject(t, tcpPacket(from, to, flagSYN, 100, 0, ""))
				netnstest.Eventually(t, "SYN-ACK at the device", func() bool {
					return len(e.dev.matching(func(b []byte) bool {
						p, ok := parsePacket(b)
						return ok && p.src == to && p.dst == from && p.flags == flagSYN|flagACK
					})) > 0
				})
				if e.onWire(from) != 0 {
					t.Error("the app's answer left in plain text")
				}
			})
		}
	}
}

func TestSourceAddressWithTwoInterfaces(t *testing.T) {
	e := newEnv(t)
	netnstest.Veth(t, e.pod, "net1", e.peer, "p1")
	e.pod.Addr("net1", "10.3.0.2/24", "fd03::2/64")
	e.pod.Route("172.20.0.0/16", "10.3.0.1", "net1")
	e.pod.Route("fd20::/16", "fd03::1", "net1")
	e.attach(Config{})
	for to, want := range map[string]string{
		"198.51.100.1": "10.1.0.2", "10.3.0.9": "10.3.0.2", "172.20.1.1": "10.3.0.2",
		"2001:db8::1": "fd01::2", "fd03::9": "fd03::2", "fd20::1": "fd03::2",
	} {
		dst := netip.AddrPortFrom(netip.MustParseAddr(to), 7777)
		if err := e.connect(e.pod, dst); err != nil {
			t.Errorf("connect to %v: %v", dst, err)
			continue
		}
		e.settle()
		got := e.dev.matching(packetTo(dst))
		if len(got) == 0 {
			t.Errorf("connect to %v was not captured", dst)
			continue
		}
		if p, _ := parsePacket(got[0]); p.src.Addr().String() != want {
			t.Errorf("source to %v = %v, want %s", to, p.src.Addr(), want)
		}
	}
}

func TestAddrsAndMTU(t *testing.T) {
	e := newEnv(t)
	e.pod.SetMTU("eth0", 1400)
	e.pod.Addr("lo", "10.7.7.7/32")
	e.attach(Config{})
	want := []string{"10.7.7.7", "10.1.0.2", "fd01::2"}
	var got []string
	for _, a := range e.a.Addrs() {
		got = append(got, a.String())
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("Addrs = %v, want %v", got, want)
	}
	if e.a.MTU() != 1400 || e.pod.Link("ztun0").Attrs().MTU != 1400 {
		t.Errorf("MTU = %d, device %d, want 1400", e.a.MTU(), e.pod.Link("ztun0").Attrs().MTU)
	}
	// What the kernel would deliver although it is on lo is captured too.
	to := netip.MustParseAddrPort("10.7.7.7:80")
	e.fromPeer(tcpPacket(netip.AddrPortFrom(peerAddr[4], 9), to, flagSYN, 1, 0, ""))
	if e.onDevice(to) == 0 {
		t.Error("TCP to an address on lo is not captured")
	}
}

func TestOneFamilyOnly(t *testing.T) {
	for _, v := range bothFamilies {
		t.Run(fmt.Sprintf("IPv%d", v), func(t *testing.T) {
			e := newEnv(t)
			if v == 6 {
				e.pod.DelAddr("eth0", "10.1.0.2/24")
			} else {
				e.pod.SetSysctl("net/ipv6/conf/all/disable_ipv6", "1")
				e.pod.SetSysctl("net/ipv6/conf/default/disable_ipv6", "1")
			}
			a, err := Attach(t.Context(), e.pod.File(), Config{CaptureDNS: true}, nil)
			if err != nil {
				t.Fatal(allOf(err))
			}
			defer func() { _ = a.Close() }()
			dev := readDevice(t, a.File)
			to := netip.AddrPortFrom(farAddr[v], 7777)
			if err := e.connect(e.pod, to); err != nil {
				t.Fatal(err)
			}
			netnstest.Eventually(t, "SYN at the device", func() bool { return len(dev.matching(packetTo(to))) > 0 })
		})
	}
}

// Nothing but captured packets crosses the device: no router solicitation, no multicast report.
func TestDeviceIsSilent(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	e.settle()
	for _, b := range e.dev.matching(func(b []byte) bool { p, ok := parsePacket(b); return !ok || p.proto != unix.IPPROTO_UDP }) {
		p, _ := parsePacket(b)
		t.Errorf("unexpected packet at the device: %v", p)
	}
	addrs, err := e.pod.Netlink().AddrList(e.pod.Link("ztun0"), netlink.FAMILY_ALL)
	if err != nil || len(addrs) != 0 {
		t.Errorf("addresses of the device = %v, %v; want none", addrs, err)
	}
}

func TestOpenNetns(t *testing.T) {
	ns := netnstest.New(t, "pod")
	f, err := OpenNetns(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	leftover := t.TempDir() + "/ns"
	if err := os.WriteFile(leftover, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/proc/999999999/ns/net", leftover} {
		if _, err := OpenNetns(path); !errors.Is(err, ErrGone) {
			t.Errorf("OpenNetns(%s) = %v, want ErrGone", path, err)
		}
	}
	if err := Detach(t.Context(), nil, State{}, nil); err != nil {
		t.Errorf("Detach of nothing = %v", err)
	}
	// The state of a namespace that is gone does nothing to another that came in its place.
	e := newEnv(t)
	e.attach(Config{})
	st := e.a.State()
	st.Netns++
	if err := Detach(t.Context(), e.pod.File(), st, nil); err != nil {
		t.Errorf("Detach of a vanished namespace = %v", err)
	}
	if err := e.a.Verify(t.Context()); err != nil {
		t.Error("Detach of a vanished namespace changed another:", err)
	}
}
