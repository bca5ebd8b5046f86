package podnet

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

// sysctlCase shows what a sysctl is for, as ruleCase does for rules.
type sysctlCase struct {
	path, wrong string
	version     int
	before      func(e *env)
	holds       func(e *env, v int, port uint16) bool
}

// inboundCaptured and networkLeg are the two ways through the pod's forwarding.
func inboundCaptured(e *env, v int, port uint16) bool {
	to := netip.AddrPortFrom(podAddr[v], port)
	if err := e.connect(e.peer, to); err != nil {
		e.t.Fatal(err)
	}
	return e.onDevice(to) > 0
}

func networkLeg(e *env, v int, port uint16) bool {
	to := netip.AddrPortFrom(farAddr[v], port)
	e.dev.inject(e.t, tcpPacket(netip.AddrPortFrom(podAddr[v], port), to, flagSYN, 1, 0, ""))
	return e.onWire(to) > 0
}

func appLeg(e *env, v int, port uint16) bool {
	before := e.inSegs()
	e.dev.inject(e.t, tcpPacket(netip.AddrPortFrom(farAddr[v], port), netip.AddrPortFrom(podAddr[v], port), flagSYN, 1, 0, ""))
	e.settle()
	return e.inSegs() > before
}

// forwardedQuery is the app's own DNS query, given back by the proxy to leave as it is.
func forwardedQuery(e *env, v int, port uint16) bool {
	to := netip.AddrPortFrom(farAddr[v], port)
	e.dev.inject(e.t, udpPacket(netip.AddrPortFrom(podAddr[v], port), to, "query"))
	return e.onWire(to) > 0
}

// dnsAnswer is the proxy's answer to a captured query, with the address of the server that the app asked.
func dnsAnswer(e *env, v int, port uint16) bool {
	in := e.pod.ListenPacket("udp", netip.AddrPortFrom(podAddr[v], port).String())
	e.dev.inject(e.t, udpPacket(netip.AddrPortFrom(farAddr[v], 53), netip.AddrPortFrom(podAddr[v], port), "answer"))
	e.settle()
	_ = in.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, _, err := in.ReadFrom(make([]byte, 100))
	return err == nil
}

var sysctlCases = []sysctlCase{
	{path: "net/ipv4/conf/eth0/forwarding", wrong: "0", version: 4, holds: inboundCaptured},
	{path: "net/ipv4/conf/ztun0/forwarding", wrong: "0", version: 4, holds: networkLeg},
	{path: "net/ipv4/conf/ztun0/accept_local", wrong: "0", version: 4, holds: forwardedQuery},
	{path: "net/ipv4/conf/ztun0/rp_filter", wrong: "1", version: 4, holds: forwardedQuery},
	{path: "net/ipv4/conf/ztun0/rp_filter", wrong: "2", version: 4, holds: forwardedQuery},
	{path: "net/ipv4/conf/ztun0/rp_filter", wrong: "1", version: 4, holds: dnsAnswer},
	{path: "net/ipv4/conf/all/rp_filter", wrong: "2", version: 4, holds: dnsAnswer},
	{path: "net/ipv6/conf/eth0/force_forwarding", wrong: "0", version: 6, holds: inboundCaptured},
	{path: "net/ipv6/conf/ztun0/force_forwarding", wrong: "0", version: 6, holds: networkLeg},
	{path: "net/ipv6/conf/ztun0/disable_ipv6", wrong: "1", version: 6, holds: appLeg},
	{
		path: "net/ipv4/conf/all/send_redirects", wrong: "1", version: 4,
		before: func(e *env) { e.pod.SetSysctl("net/ipv4/ip_forward", "1") }, // so that it is a router
		holds: func(e *env, v int, port uint16) bool {
			redirect := func(b []byte) bool { return b[0]>>4 == 4 && b[9] == unix.IPPROTO_ICMP && b[20] == 5 }
			before := len(e.wire.Packets(redirect))
			to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(port >> 8), byte(port)}), port)
			e.fromPeer(udpPacket(netip.AddrPortFrom(peerAddr[4], 5), to, "route me"))
			e.wire.Wait(e.t, "the routed packet", func(b []byte) bool { p, ok := parsePacket(b); return ok && p.dst == to && p.ttl == 63 })
			e.settle()
			return len(e.wire.Packets(redirect)) == before
		},
	},
}

func TestEachSysctlIsNeeded(t *testing.T) {
	port := uint16(9000)
	for _, c := range sysctlCases {
		t.Run(fmt.Sprintf("%s=%s", c.path, c.wrong), func(t *testing.T) {
			e := newEnv(t)
			if c.before != nil {
				c.before(e)
			}
			e.attach(Config{})
			if !e.pod.HasSysctl(c.path) {
				t.Skipf("this kernel has no %s", c.path)
			}
			check := func(when string, want bool) {
				port++
				if got := c.holds(e, c.version, port); got != want {
					t.Errorf("%s: holds = %v, want %v", when, got, want)
				}
			}
			check("attached", true)
			e.pod.SetSysctl(c.path, c.wrong)
			check("with the wrong value", false)
			e.repair()
			check("repaired", true)
		})
	}
}

// With early demultiplexing the pod's kernel takes the packets of flows it knows past the rules, or drops them.
func TestEarlyDemuxIsOff(t *testing.T) {
	for _, v := range bothFamilies {
		t.Run(fmt.Sprintf("IPv%d", v), func(t *testing.T) {
			e := newEnv(t)
			c := e.live(v)
			e.attach(Config{})
			e.forward(e.a.Older())
			local := e.a.Older()[0].Local
			e.exchange(c, "attached")
			replies := func() int { return len(e.dev.matching(packetTo(local))) }
			before := replies()
			e.exchange(c, "once more")
			if replies() == before {
				t.Fatal("replies of an older flow do not cross the device")
			}
			e.pod.SetSysctl(earlyDemux, "1")
			seen := replies()
			// The reply is on the wire, and does not come to the device.
			if _, err := c.Write([]byte("early")); err != nil {
				t.Fatal(err)
			}
			e.wire.Wait(t, "reply on the wire", func(b []byte) bool {
				p, ok := parsePacket(b)
				return ok && p.dst == local && string(p.payload) == "early"
			})
			e.settle()
			if got := replies(); got != seen {
				t.Errorf("%d packets crossed the device with early demultiplexing", got-seen)
			}
			e.repair()
			if e.pod.Sysctl(earlyDemux) != "0" {
				t.Error("not repaired")
			}
		})
	}
}

// Without addr_gen_mode the device would get a random address, which the app's packets could have as source.
func TestAddrGenMode(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	has := func() bool {
		addrs, err := e.pod.Netlink().AddrList(e.pod.Link("ztun0"), netlink.FAMILY_V6)
		if err != nil {
			t.Fatal(err)
		}
		return len(addrs) > 0
	}
	if has() {
		t.Error("the device has an address")
	}
	e.pod.SetSysctl("net/ipv6/conf/ztun0/addr_gen_mode", "0")
	e.pod.Down("ztun0")
	e.pod.Up("ztun0")
	netnstest.Eventually(t, "address of the device", has)
	e.repair()
	if has() {
		t.Error("the device still has an address")
	}
}

// fakeSysctls is a kernel's tree as a map, to decide for kernels that are not this one.
func fakeSysctls(m map[string]string) sysctls {
	return sysctls{
		read: func(p string) (string, bool) { v, ok := m[p]; return v, ok },
		write: func(p, value string) error {
			m[p] = value
			return nil
		},
	}
}

func TestForwardingWithoutForceForwarding(t *testing.T) {
	e := newEnv(t)
	before := trace(t, e.pod)
	e.pod.SetSysctl("net/ipv6/conf/eth0/accept_ra", "1")
	e.attach(Config{})
	k := e.a.kernel
	w, err := k.observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := &plan{}
	p.classify(&e.a.cfg, w)
	// The same kernel, as if it had no force_forwarding.
	err = k.onSysctls(t.Context(), func(s sysctls) error {
		old := s
		old.read = func(p string) (string, bool) {
			if len(p) > 16 && p[len(p)-16:] == "force_forwarding" {
				return "", false
			}
			return s.read(p)
		}
		for _, set := range []string{"eth0", "ztun0"} {
			if err := s.write(conf6+set+"/force_forwarding", "0"); err != nil {
				t.Skip("this kernel has no force_forwarding to do without")
			}
		}
		_, err := putSettings(old, &e.a.state, settingsFor(old, &e.a.cfg, w, p))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !inboundCaptured(e, 6, 9500) || !networkLeg(e, 6, 9501) {
		t.Error("IPv6 is not forwarded")
	}
	if got := e.pod.Sysctl("net/ipv6/conf/eth0/accept_ra"); got != "2" {
		t.Errorf("accept_ra = %s, want 2", got)
	}
	if e.a.state.forwards(fakeSysctls(map[string]string{}), w, &e.a.cfg)[unix.AF_INET6] {
		t.Error("forwarding that we turned on counts as the pod's own")
	}
	if err := Detach(t.Context(), e.pod.File(), e.a.State(), nil); err != nil {
		t.Fatal(allOf(err))
	}
	if after := trace(t, e.pod); after != before {
		t.Error("sysctls were not restored: see TestDetachLeavesNoTrace for how to tell")
	}
}
