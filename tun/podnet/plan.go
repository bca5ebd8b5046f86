package podnet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Priorities of our rules. A packet takes the first that matches. Nothing of somebody else's may stand before
// the last of them: Attach refuses such a namespace.
const (
	prioInjected     = 10  // what the proxy injects for the pod goes to the app
	prioVirtual      = 16  // TCP of virtual interfaces is outbound traffic of the pod
	prioVirtualStop  = 17  // backstop of 16
	prioSpoofed      = 18  // the pod's own address as source, from outside
	prioInLinkLocal  = 19  // link-local TCP would reach the app past policy
	prioIn           = 20  // inbound capture
	prioInStop       = 21  // backstop when the table has lost its routes
	prioHidden       = 22  // TCP behind headers that rules cannot look past, but the app's stack can
	prioLocal        = 100 // "lookup local", moved here from 0
	prioRouter       = 101 // forwarding must not make the pod a router
	prioOutLinkLocal = 104 // link-local TCP outward
	prioBound        = 105 // SO_BINDTODEVICE escapes capture otherwise
	prioOut          = 110 // outbound capture
	prioDNS          = 111 // DNS capture
	prioOutStop      = 112 // backstop when the table has lost its routes
)

// Tables of ours: capture leads to the device, bound leads sockets that are bound to an interface to nowhere.
const (
	captureTable = 15008
	boundTable   = 15009
)

// ourProtocol marks rules and routes as ours (rtm_protocol).
const ourProtocol = 90

// Metrics in captureTable. The unreachable default stays when the device is gone or down.
const (
	captureMetric  = 1024
	backstopMetric = 1 << 24
	boundMetric    = 1024 // plus the interface's index
)

// Bounds of what we are ready to put into one namespace.
const (
	maxRules  = 2048
	maxRoutes = 4096
)

const dnsPort = 53

// hiding are the extension headers behind which the kernel's rules see no TCP: it follows headers up to a fragment header
// and at most 15 of them, and takes the next one for the protocol. Honest packets look like that hardly ever.
var hiding = []uint8{unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT, unix.IPPROTO_DSTOPTS}

var linkLocal6 = netip.MustParsePrefix("fe80::/10")

// plan is what a namespace should have.
type plan struct {
	rules  []rule // in the order in which they are added
	routes []route
	addrs  []netip.Addr
	mtu    uint32
	// layer3 are the interfaces on which packets of the pod arrive; bindable those a socket can be bound to.
	layer3, bindable []link
}

// planFor decides what a namespace as observed should have. Until the device exists, only rules are complete.
func planFor(cfg *Config, w *world) (*plan, error) {
	p := &plan{}
	p.classify(cfg, w)
	p.addresses(cfg, w)
	for _, family := range w.families {
		p.rulesFor(cfg, w, family)
		if dev, ok := w.link(cfg.Device); ok {
			p.captureRoutes(w, family, dev)
		}
	}
	for _, l := range p.bindable {
		p.routes = append(p.routes, route{
			Family: unix.AF_INET, Table: boundTable, Dst: anyPrefix(unix.AF_INET), Type: unix.RTN_LOCAL, Oif: l.Index,
			Metric: boundMetric + uint32(l.Index), Scope: unix.RT_SCOPE_HOST, Protocol: ourProtocol,
		})
	}
	if len(p.rules) > maxRules || len(p.routes) > maxRoutes {
		return nil, fmt.Errorf("podnet: the namespace would need %d rules and %d routes, more than %d and %d", len(p.rules), len(p.routes), maxRules, maxRoutes)
	}
	return p, nil
}

func (p *plan) classify(cfg *Config, w *world) {
	for _, l := range w.links {
		if l.Loopback || l.Name == cfg.Device {
			continue
		}
		p.bindable = append(p.bindable, l)
		if master, ok := w.linkAt(l.Master); ok && l.Master != 0 && master.Kind != "vrf" {
			continue // a port: its packets arrive on the bridge
		}
		p.layer3 = append(p.layer3, l)
	}
}

func (p *plan) addresses(cfg *Config, w *world) {
	dev, _ := w.link(cfg.Device)
	seen := map[netip.Addr]bool{}
	for _, a := range w.addrs {
		ip := a.Prefix.Addr()
		if a.Link == dev.Index && dev.Index != 0 || ip.IsLoopback() || ip.Is6() && ip.IsLinkLocalUnicast() || seen[ip] {
			continue
		}
		seen[ip] = true
		p.addrs = append(p.addrs, ip)
	}
	for _, l := range p.layer3 {
		hasAddr := slices.ContainsFunc(w.addrs, func(a address) bool { return a.Link == l.Index })
		if mtu := uint32(max(l.MTU, 68)); hasAddr && (p.mtu == 0 || mtu < p.mtu) {
			p.mtu = mtu
		}
	}
	if p.mtu == 0 {
		p.mtu = 1500
	}
	p.mtu = min(p.mtu, 65535)
}

// podPrefixes are the destinations that the kernel would deliver to the pod from outside: its addresses, and whatever else
// table local says, except loopback and link-local IPv6.
func (p *plan) podPrefixes(w *world, family uint8) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range p.addrs {
		if familyOf(a) == family {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	for _, r := range w.local {
		a := r.Dst.Addr()
		if r.Family == family && r.Type == unix.RTN_LOCAL && !a.IsLoopback() && (a.Is4() || !linkLocal6.Contains(a)) {
			out = append(out, r.Dst)
		}
	}
	slices.SortFunc(out, comparePrefix)
	return slices.Compact(out)
}

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func (p *plan) rulesFor(cfg *Config, w *world, family uint8) {
	add := func(r rule) {
		r.Family, r.Protocol = family, ourProtocol
		if r.Action == 0 {
			r.Action = nl.FR_ACT_TO_TBL
		}
		p.rules = append(p.rules, r)
	}
	const tcp, udp = unix.IPPROTO_TCP, unix.IPPROTO_UDP
	v6 := family == unix.AF_INET6

	add(rule{Priority: prioInjected, Iif: cfg.Device, Table: unix.RT_TABLE_LOCAL})
	for _, name := range cfg.VirtualInterfaces {
		add(rule{Priority: prioVirtual, Iif: name, IPProto: tcp, Table: captureTable})
	}
	for _, name := range cfg.VirtualInterfaces {
		add(rule{Priority: prioVirtualStop, Iif: name, IPProto: tcp, Action: nl.FR_ACT_BLACKHOLE})
	}
	pod := p.podPrefixes(w, family)
	each := func(f func(l link, to netip.Prefix)) {
		for _, l := range p.layer3 {
			for _, to := range pod {
				f(l, to)
			}
		}
	}
	each(func(l link, to netip.Prefix) {
		add(rule{Priority: prioSpoofed, Iif: l.Name, Src: to, Action: nl.FR_ACT_BLACKHOLE})
	})
	for _, l := range p.layer3 {
		if v6 {
			add(rule{Priority: prioInLinkLocal, Iif: l.Name, Dst: linkLocal6, IPProto: tcp, Action: nl.FR_ACT_BLACKHOLE})
		}
	}
	each(func(l link, to netip.Prefix) {
		add(rule{Priority: prioIn, Iif: l.Name, Dst: to, IPProto: tcp, Table: captureTable})
	})
	each(func(l link, to netip.Prefix) {
		add(rule{Priority: prioInStop, Iif: l.Name, Dst: to, IPProto: tcp, Action: nl.FR_ACT_BLACKHOLE})
	})
	for _, l := range p.layer3 {
		for _, header := range hiding {
			if v6 {
				add(rule{Priority: prioHidden, Iif: l.Name, IPProto: header, Action: nl.FR_ACT_BLACKHOLE})
			}
		}
	}
	add(rule{Priority: prioLocal, Table: unix.RT_TABLE_LOCAL})
	if !p.routes3(cfg, w, family) {
		for _, l := range p.layer3 {
			add(rule{Priority: prioRouter, Iif: l.Name, Action: nl.FR_ACT_BLACKHOLE})
		}
	}
	if v6 {
		add(rule{Priority: prioOutLinkLocal, Iif: loopback, Dst: linkLocal6, IPProto: tcp, Action: nl.FR_ACT_UNREACHABLE})
	}
	for _, l := range p.bindable {
		bound := rule{Priority: prioBound, Iif: loopback, Oif: l.Name, IPProto: tcp, Table: boundTable}
		if v6 {
			bound.Table, bound.Action = 0, nl.FR_ACT_UNREACHABLE
		}
		add(bound)
		if cfg.CaptureDNS {
			bound.IPProto, bound.DPort = udp, dnsPort
			add(bound)
		}
	}
	add(rule{Priority: prioOut, Iif: loopback, IPProto: tcp, Table: captureTable})
	if cfg.CaptureDNS {
		add(rule{Priority: prioDNS, Iif: loopback, IPProto: udp, DPort: dnsPort, Table: captureTable})
	}
	add(rule{Priority: prioOutStop, Iif: loopback, IPProto: tcp, Action: nl.FR_ACT_UNREACHABLE})
}

// loopback is what the kernel calls the incoming interface of packets that the pod itself sends.
const loopback = "lo"

// routes3 tells whether the pod forwards packets for itself: forwarding was on, or it has a bridge, a tunnel or a virtual interface.
func (p *plan) routes3(cfg *Config, w *world, family uint8) bool {
	if w.forwards[family] || len(cfg.VirtualInterfaces) > 0 {
		return true
	}
	return slices.ContainsFunc(p.bindable, func(l link) bool { return l.Kind == "bridge" || l.Kind == "tuntap" || l.Kind == "tun" })
}

func anyPrefix(family uint8) netip.Prefix {
	if family == unix.AF_INET6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// captureRoutes mirrors table main: the same prefixes, all to the device, each with the source that main would
// choose, and behind them an unreachable default.
func (p *plan) captureRoutes(w *world, family uint8, dev link) {
	best := map[netip.Prefix]route{anyPrefix(family): {Family: family}}
	for _, r := range w.main {
		if r.Family != family || r.Type != unix.RTN_UNICAST || r.Oif == dev.Index || !mirrored(r.Dst) {
			continue
		}
		if old, ok := best[r.Dst]; !ok || old.Type == 0 || r.Metric < old.Metric {
			best[r.Dst] = r
		}
	}
	scope := uint8(unix.RT_SCOPE_LINK)
	if family == unix.AF_INET6 {
		scope = unix.RT_SCOPE_UNIVERSE
	}
	for dst, r := range best {
		p.routes = append(p.routes, route{
			Family: family, Table: captureTable, Dst: dst, Type: unix.RTN_UNICAST, Oif: dev.Index, Src: w.sourceOf(r),
			Metric: captureMetric, Scope: scope, Protocol: ourProtocol,
		})
	}
	p.routes = append(p.routes, route{
		Family: family, Table: captureTable, Dst: anyPrefix(family), Type: unix.RTN_UNREACHABLE, Metric: backstopMetric, Protocol: ourProtocol,
	})
	slices.SortFunc(p.routes, func(a, b route) int {
		return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Table, b.Table), comparePrefix(a.Dst, b.Dst), cmp.Compare(a.Metric, b.Metric))
	})
}

func mirrored(dst netip.Prefix) bool {
	a := dst.Addr()
	if a.Is4() {
		return !a.IsMulticast() && !a.IsLoopback()
	}
	return !a.Is4In6() && !a.IsMulticast() && !a.IsLoopback() && !linkLocal6.Contains(a)
}

// sourceOf is the source address that the kernel would choose for a route of table main, or none where it can be left to it.
func (w *world) sourceOf(r route) netip.Addr {
	switch {
	case r.Type == 0:
		return netip.Addr{} // main has no such route
	case r.Src.IsValid():
		return r.Src
	case r.Family == unix.AF_INET:
		return w.source4(r)
	default:
		return w.source6(r)
	}
}

// source4 follows inet_select_addr (net/ipv4/devinet.c): the first primary address of the route's interface whose subnet has
// the gateway, or else the first, or else the first of any interface.
func (w *world) source4(r route) netip.Addr {
	var first netip.Addr
	for _, a := range w.addrs {
		if a.family() != unix.AF_INET || a.Link != r.Oif || a.Secondary || a.Scope > r.Scope {
			continue
		}
		if !r.Gw.Is4() || a.Prefix.Contains(r.Gw) {
			return a.Prefix.Addr()
		}
		if !first.IsValid() {
			first = a.Prefix.Addr()
		}
	}
	if first.IsValid() {
		return first
	}
	for _, a := range w.addrs {
		if a.family() == unix.AF_INET && !a.Secondary && a.Scope <= r.Scope && a.Scope != unix.RT_SCOPE_LINK {
			return a.Prefix.Addr()
		}
	}
	return netip.Addr{}
}

// source6 pins a source only where several interfaces have addresses. RFC 6724 prefers those of the outgoing interface
// (rule 5), which the device has none of; the rest of its rules the kernel applies as well to the device.
func (w *world) source6(r route) netip.Addr {
	var own []netip.Addr
	others := false
	for _, a := range w.addrs {
		ip := a.Prefix.Addr()
		switch {
		case a.family() != unix.AF_INET6 || ip.IsLoopback() || ip.IsLinkLocalUnicast():
		case a.Link == r.Oif:
			own = append(own, ip)
		default:
			others = true
		}
	}
	if !others || len(own) == 0 {
		return netip.Addr{}
	}
	// Rule 8, longest common prefix; own addresses come in the kernel's order.
	return slices.MaxFunc(own, func(a, b netip.Addr) int {
		return cmp.Compare(common(a, r.Dst), common(b, r.Dst))
	})
}

// common counts the leading bits that an address shares with a prefix.
func common(a netip.Addr, p netip.Prefix) int {
	for bits := p.Bits(); bits > 0; bits-- {
		if q, err := p.Addr().Prefix(bits); err == nil && q.Contains(a) {
			return bits
		}
	}
	return 0
}

// collision names something of others that would stand in our way, or is empty.
func (w *world) collision(cfg *Config) string {
	if l, ok := w.link(cfg.Device); ok && l.Kind != "tuntap" && l.Kind != "tun" {
		return fmt.Sprintf("a link %s of kind %s", cfg.Device, l.Kind)
	}
	for _, r := range w.tables {
		if r.Protocol != ourProtocol {
			return "an " + r.String()
		}
	}
	if foreign := w.foreignRules(); len(foreign) > 0 {
		return "an " + foreign[0].String()
	}
	return ""
}

// foreignRules are rules of others that come before capture, or that use our tables.
func (w *world) foreignRules() []rule {
	var out []rule
	for _, r := range w.rules {
		ours := r.Protocol == ourProtocol && r.Priority != 0
		if !ours && !(r.Priority == 0 && r.isLocal()) && (r.Priority <= prioOutStop || r.Table == captureTable || r.Table == boundTable) {
			out = append(out, r)
		}
	}
	return out
}

// touched tells whether anything of ours is in the namespace.
func (w *world) touched(cfg *Config) bool {
	_, ok := w.link(cfg.Device)
	return ok || len(w.tables) > 0 || slices.ContainsFunc(w.rules, func(r rule) bool { return r.Protocol == ourProtocol })
}

// validName is dev_valid_name of the kernel, without the names that the sysctl tree has itself.
func validName(name string) bool {
	return name != "" && len(name) < unix.IFNAMSIZ && name != "." && name != ".." && name != "all" && name != "default" &&
		!strings.ContainsAny(name, "/: \t\n\v\f\r")
}
