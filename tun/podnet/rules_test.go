package podnet

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/ztun/ztun/tun/netnstest"
)

// ruleCase shows what a rule is for: the behaviour holds with it, breaks without it, and holds again once repaired.
type ruleCase struct {
	name     string
	prio     uint32
	versions []int // families, default both
	cfg      Config
	before   func(e *env, v int) // before attach
	// after is done after attach, and again after the rule was removed.
	after func(e *env, v int)
	holds func(e *env, v int, port uint16) bool
}

var ruleCases = []ruleCase{
	{
		name: "injected packets reach the app past the routes of others", prio: prioInjected,
		after: func(e *env, v int) {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Table, r.IifName = e.family(v), 50, 77, "ztun0"
			_ = e.pod.Netlink().RuleAdd(r)
			_ = e.pod.Netlink().RouteAdd(&netlink.Route{Dst: netlinkAny(v), Table: 77, Gw: peerAddr[v].AsSlice(), LinkIndex: e.pod.Link("eth0").Attrs().Index})
		},
		holds: func(e *env, v int, port uint16) bool {
			before := e.inSegs()
			e.dev.inject(e.t, tcpPacket(netip.AddrPortFrom(farAddr[v], port), netip.AddrPortFrom(podAddr[v], port), flagSYN, 1, 0, ""))
			e.settle()
			return e.inSegs() > before
		},
	},
	{
		name: "TCP of a virtual interface is outbound", prio: prioVirtual, cfg: Config{VirtualInterfaces: []string{"vbr"}},
		before: virtualMachine,
		holds: func(e *env, v int, port uint16) bool {
			e.fromVM(v, farAddr[v], port)
			return e.onDevice(netip.AddrPortFrom(farAddr[v], port)) > 0
		},
	},
	{
		name: "TCP of a virtual interface stops where the table is empty", prio: prioVirtualStop, cfg: Config{VirtualInterfaces: []string{"vbr"}},
		before: func(e *env, v int) {
			virtualMachine(e, v)
			e.pod.SetSysctl("net/ipv4/ip_forward", "1")
			e.pod.SetSysctl("net/ipv6/conf/all/forwarding", "1")
		},
		after: func(e *env, v int) { e.flush(captureTable) },
		holds: func(e *env, v int, port uint16) bool {
			e.fromVM(v, farAddr[v], port)
			return e.onWire(netip.AddrPortFrom(farAddr[v], port)) == 0
		},
	},
	{
		name: "the pod's own address as source from outside", prio: prioSpoofed,
		// IPv4 drops it as martian unless somebody accepts local sources.
		before: func(e *env, v int) { e.pod.SetSysctl("net/ipv4/conf/eth0/accept_local", "1") },
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(podAddr[v], port)
			e.fromPeer(tcpPacket(netip.AddrPortFrom(podAddr[v], 1), to, flagSYN, 1, 0, ""))
			return e.onDevice(to) == 0
		},
	},
	{
		name: "link-local TCP does not reach the app", prio: prioInLinkLocal, versions: []int{6},
		holds: func(e *env, v int, port uint16) bool {
			before := e.inSegs()
			if err := e.connect(e.peer, netip.AddrPortFrom(e.pod.LinkLocal("eth0").WithZone("p0"), port)); err != nil {
				e.t.Fatal(err)
			}
			// Its neighbour discovery comes first.
			e.wire.Wait(e.t, "SYN", packetTo(netip.AddrPortFrom(e.pod.LinkLocal("eth0"), port)))
			e.settle()
			return e.inSegs() == before
		},
	},
	{
		name: "inbound capture", prio: prioIn,
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(podAddr[v], port)
			if err := e.connect(e.peer, to); err != nil {
				e.t.Fatal(err)
			}
			return e.onDevice(to) > 0
		},
	},
	{
		name: "inbound stops where the table is empty", prio: prioInStop,
		after: func(e *env, v int) { e.flush(captureTable) },
		holds: func(e *env, v int, port uint16) bool {
			before := e.inSegs()
			if err := e.connect(e.peer, netip.AddrPortFrom(podAddr[v], port)); err != nil {
				e.t.Fatal(err)
			}
			e.settle()
			return e.inSegs() == before
		},
	},
	{
		name: "TCP behind extension headers does not reach the app", prio: prioHidden, versions: []int{6},
		holds: func(e *env, v int, port uint16) bool {
			return e.hiddenSegments(port, 44, 60) == 0 && e.hiddenSegments(port, 60, 44, 60) == 0 &&
				e.hiddenSegments(port, slices.Repeat([]byte{60}, 18)...) == 0
		},
	},
	{
		name: "loopback stays in the pod", prio: prioLocal,
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(map[int]netip.Addr{4: netip.MustParseAddr("127.0.0.1"), 6: netip.IPv6Loopback()}[v], port)
			l := e.pod.Listen("tcp", to.String())
			defer func() { _ = l.Close() }()
			return e.connects(e.pod, to)
		},
	},
	{
		name: "the pod's own address stays in the pod", prio: prioLocal,
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(podAddr[v], port)
			l := e.pod.Listen("tcp", to.String())
			defer func() { _ = l.Close() }()
			return e.connects(e.pod, to)
		},
	},
	{
		name: "the pod is no router", prio: prioRouter,
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(map[int]netip.Addr{4: netip.MustParseAddr("203.0.113.9"), 6: netip.MustParseAddr("2001:db8:9::9")}[v], port)
			e.fromPeer(udpPacket(netip.AddrPortFrom(peerAddr[v], 5), to, "route me"))
			e.settle()
			return len(e.wire.Packets(func(b []byte) bool { p, ok := parsePacket(b); return ok && p.dst == to && p.ttl < 64 })) == 0
		},
	},
	{
		name: "link-local TCP outward", prio: prioOutLinkLocal, versions: []int{6},
		after: func(e *env, v int) { e.removeRules(prioBound, prioOutStop) }, // which would stop it as well
		holds: func(e *env, v int, port uint16) bool {
			ip := e.peer.LinkLocal("p0")
			err := e.connect(e.pod, netip.AddrPortFrom(ip.WithZone("eth0"), port))
			if err == nil {
				e.wire.Wait(e.t, "SYN", packetTo(netip.AddrPortFrom(ip, port)))
			}
			return err != nil
		},
	},
	{
		name: "a socket bound to an interface does not escape", prio: prioBound, versions: []int{4},
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(peerAddr[v], port)
			_ = e.connect(e.pod, to, bindToDevice("eth0"))
			far := netip.AddrPortFrom(farAddr[v], port)
			_ = e.connect(e.pod, far, bindToDevice("eth0"))
			return e.onWire(to) == 0 && e.onWire(far) == 0
		},
	},
	{
		// In IPv6 the device's routes do not fit such a socket, and rule 112 stops it as well.
		name: "a socket bound to an interface does not escape", prio: prioBound, versions: []int{6},
		after: func(e *env, v int) { e.removeRules(prioOutStop) },
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(peerAddr[v], port)
			_ = e.connect(e.pod, to, bindToDevice("eth0"))
			far := netip.AddrPortFrom(farAddr[v], port)
			_ = e.connect(e.pod, far, bindToDevice("eth0"))
			return e.onWire(to) == 0 && e.onWire(far) == 0
		},
	},
	{
		name: "a DNS query bound to an interface does not escape", prio: prioBound, cfg: Config{CaptureDNS: true},
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(peerAddr[v], 53)
			before := e.onWire(to)
			_ = e.sendUDP(e.pod, to, bindToDevice("eth0"))
			return e.onWire(to) == before
		},
	},
	{
		name: "outbound capture", prio: prioOut,
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(farAddr[v], port)
			_ = e.connect(e.pod, to)
			if n := e.onWire(to); n > 0 {
				e.t.Errorf("%d packets to %v left in plain text", n, to)
			}
			return e.onDevice(to) > 0
		},
	},
	{
		name: "DNS capture", prio: prioDNS, cfg: Config{CaptureDNS: true},
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(peerAddr[v], 53)
			wire, dev := e.onWire(to), e.onDevice(to)
			if err := e.sendUDP(e.pod, to); err != nil {
				e.t.Fatal(err)
			}
			return e.onWire(to) == wire && e.onDevice(to) > dev
		},
	},
	{
		name: "outbound stops where the table is empty", prio: prioOutStop,
		after: func(e *env, v int) { e.flush(captureTable) },
		holds: func(e *env, v int, port uint16) bool {
			to := netip.AddrPortFrom(farAddr[v], port)
			_ = e.connect(e.pod, to)
			return e.onWire(to) == 0
		},
	},
}

func TestEachRuleIsNeeded(t *testing.T) {
	port := uint16(7000)
	for _, c := range ruleCases {
		versions := c.versions
		if versions == nil {
			versions = bothFamilies
		}
		for _, v := range versions {
			t.Run(fmt.Sprintf("%d %s IPv%d", c.prio, c.name, v), func(t *testing.T) {
				e := newEnv(t)
				if c.before != nil {
					c.before(e, v)
				}
				e.attach(c.cfg)
				check := func(when string, want bool) {
					if c.after != nil {
						c.after(e, v)
					}
					port++
					if got := c.holds(e, v, port); got != want {
						t.Errorf("%s: holds = %v, want %v", when, got, want)
					}
				}
				check("attached", true)
				e.a.repair(t.Context())
				e.removeRules(c.prio)
				check("without the rule", false)
				e.a.repair(t.Context())
				check("repaired", true)
			})
		}
	}
}

func (e *env) family(v int) int {
	if v == 6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

func netlinkAny(v int) *net.IPNet {
	if v == 6 {
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

// connects tells whether a connection is made, which for addresses of the pod itself is decided at once.
func (e *env) connects(ns *netnstest.NS, to netip.AddrPort) bool {
	c, err := ns.Dial("tcp", to.String(), 300*time.Millisecond)
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}

// virtualMachine gives the pod a bridge vbr with a machine behind it, at 10.2.0.2 and fd02::2.
func virtualMachine(e *env, _ int) {
	e.vm = netnstest.New(e.t, "vm")
	netnstest.Veth(e.t, e.pod, "tap0", e.vm, "eth0")
	e.pod.Bridge("vbr", "tap0")
	e.pod.Addr("vbr", "10.2.0.1/24", "fd02::1/64")
	e.pod.SetSysctl("net/ipv4/conf/vbr/rp_filter", "0")
}

// fromVM sends a SYN as the machine would, through the pod's bridge port.
func (e *env) fromVM(v int, to netip.Addr, port uint16) {
	e.t.Helper()
	src := map[int]netip.Addr{4: netip.MustParseAddr("10.2.0.2"), 6: netip.MustParseAddr("fd02::2")}[v]
	b := tcpPacket(netip.AddrPortFrom(src, port), netip.AddrPortFrom(to, port), flagSYN, 1, 0, "")
	e.send(e.vm, "eth0", e.pod.Link("vbr"), b)
}
