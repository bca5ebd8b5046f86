package netnstest

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Veth joins two namespaces with a pair of interfaces, both up. a and b may be the same.
func Veth(t testing.TB, a *NS, aName string, b *NS, bName string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = aName
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: netlink.NsFd(b.file.Fd())}
	if err := a.link.LinkAdd(veth); err != nil {
		t.Fatalf("netnstest: join %s and %s: %v", a.name, b.name, err)
	}
	a.Up(aName)
	b.Up(bName)
}

// Bridge makes a bridge, up, with the named interfaces of the namespace as its ports.
func (ns *NS) Bridge(name string, ports ...string) {
	ns.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := ns.link.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		ns.t.Fatalf("netnstest: bridge %s in %s: %v", name, ns.name, err)
	}
	ns.Up(name)
	for _, p := range ports {
		ns.Port(name, p)
	}
}

// Port makes an interface a port of a bridge.
func (ns *NS) Port(bridge, port string) {
	ns.t.Helper()
	if err := ns.link.LinkSetMaster(ns.Link(port), ns.Link(bridge)); err != nil {
		ns.t.Fatalf("netnstest: port %s of %s in %s: %v", port, bridge, ns.name, err)
	}
}

// Link finds an interface by name.
func (ns *NS) Link(name string) netlink.Link {
	ns.t.Helper()
	l, err := ns.link.LinkByName(name)
	if err != nil {
		ns.t.Fatalf("netnstest: interface %s in %s: %v", name, ns.name, err)
	}
	return l
}

// Up brings an interface up.
func (ns *NS) Up(name string) {
	ns.t.Helper()
	if err := ns.link.LinkSetUp(ns.Link(name)); err != nil {
		ns.t.Fatalf("netnstest: %s up in %s: %v", name, ns.name, err)
	}
}

// Down takes an interface down.
func (ns *NS) Down(name string) {
	ns.t.Helper()
	if err := ns.link.LinkSetDown(ns.Link(name)); err != nil {
		ns.t.Fatalf("netnstest: %s down in %s: %v", name, ns.name, err)
	}
}

// SetMTU sets the MTU of an interface.
func (ns *NS) SetMTU(name string, mtu int) {
	ns.t.Helper()
	if err := ns.link.LinkSetMTU(ns.Link(name), mtu); err != nil {
		ns.t.Fatalf("netnstest: MTU of %s in %s: %v", name, ns.name, err)
	}
}

// Addr gives an interface addresses ("10.0.0.1/24", "fd00::1/64"), usable at once.
func (ns *NS) Addr(link string, cidrs ...string) {
	ns.t.Helper()
	for _, c := range cidrs {
		n := ipNet(ns.t, c)
		a := &netlink.Addr{IPNet: n}
		if n.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := ns.link.AddrAdd(ns.Link(link), a); err != nil {
			ns.t.Fatalf("netnstest: address %s on %s in %s: %v", c, link, ns.name, err)
		}
	}
}

// Settled waits until every IPv6 address of the interfaces that are up can be used: the kernel finishes them, and the
// link-local ones that it makes itself, in its own time.
func (ns *NS) Settled() {
	ns.t.Helper()
	Eventually(ns.t, "IPv6 addresses of "+ns.name, func() bool {
		local, err := ns.link.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return false
		}
		reached := map[string]bool{}
		for _, r := range local {
			if r.Dst != nil {
				reached[r.Dst.IP.String()] = true
			}
		}
		links, err := ns.link.LinkList()
		if err != nil {
			return false
		}
		for _, l := range links {
			addrs, err := ns.link.AddrList(l, netlink.FAMILY_V6)
			if err != nil {
				return false
			}
			for _, a := range addrs {
				if a.Flags&unix.IFA_F_TENTATIVE != 0 || !reached[a.IP.String()] && l.Attrs().OperState != netlink.OperDown {
					return false
				}
			}
		}
		return true
	})
}

// DelAddr takes an address away from an interface.
func (ns *NS) DelAddr(link, cidr string) {
	ns.t.Helper()
	if err := ns.link.AddrDel(ns.Link(link), &netlink.Addr{IPNet: ipNet(ns.t, cidr)}); err != nil {
		ns.t.Fatalf("netnstest: delete address %s on %s in %s: %v", cidr, link, ns.name, err)
	}
}

// Route adds a route to table main. via may be empty (the destination is on the link).
func (ns *NS) Route(cidr, via, link string) {
	ns.t.Helper()
	r := &netlink.Route{Dst: ipNet(ns.t, cidr), LinkIndex: ns.Link(link).Attrs().Index}
	if via != "" {
		r.Gw = net.ParseIP(via)
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	if r.Dst.IP.To4() == nil {
		r.Scope = netlink.SCOPE_UNIVERSE
	}
	if via != "" && link != "" {
		r.Flags = int(netlink.FLAG_ONLINK)
	}
	if err := ns.link.RouteAdd(r); err != nil {
		ns.t.Fatalf("netnstest: route %s via %q dev %s in %s: %v", cidr, via, link, ns.name, err)
	}
}

// LinkLocal is the IPv6 link-local address of an interface.
func (ns *NS) LinkLocal(link string) netip.Addr {
	ns.t.Helper()
	addrs, err := ns.link.AddrList(ns.Link(link), netlink.FAMILY_V6)
	if err != nil {
		ns.t.Fatalf("netnstest: addresses of %s in %s: %v", link, ns.name, err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.IsLinkLocalUnicast() {
			return ip
		}
	}
	ns.t.Fatalf("netnstest: %s in %s has no link-local address", link, ns.name)
	return netip.Addr{}
}

func ipNet(t testing.TB, cidr string) *net.IPNet {
	t.Helper()
	p, err := netip.ParsePrefix(cidr)
	if err != nil {
		t.Fatalf("netnstest: %v", err)
	}
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
