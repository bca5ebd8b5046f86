package cluster

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A pair is one thing for IPv4 and one for IPv6, the cluster's first family first.
type pair[T any] [2]T

func (p pair[T]) v4() T { return p[0] }
func (p pair[T]) v6() T { return p[1] }

// hostAddresses are the control plane's, on the bridge.
var hostAddresses = pair[netip.Prefix]{netip.MustParsePrefix("172.31.250.254/24"), netip.MustParsePrefix("fd00:31::fe/64")}

var hostAddress = hostAddresses.v4().Addr().String()

const (
	podNetworks     = "10.244.0.0/16,fd00:44::/32"
	serviceNetworks = "10.96.0.0/16,fd00:96::/108"
	dnsService      = "10.96.0.10"
)

// nodeAddresses and nodePods are those of node i, which counts from 1.
func nodeAddresses(i byte) pair[netip.Prefix] {
	return pair[netip.Prefix]{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 31, 250, i}), 24),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x31, 15: i}), 64),
	}
}

func nodePods(i byte) pair[netip.Prefix] {
	return pair[netip.Prefix]{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, i, 0}), 24),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x44, 5: i}), 64),
	}
}

// addAddresses gives a link its addresses and sets it up. Nobody else on these
// wires can have them: no detection of duplicates, which takes a second.
func addAddresses(l netlink.Link, addresses pair[netip.Prefix]) error {
	for _, a := range addresses {
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(a), Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("address %v of %s: %w", a, l.Attrs().Name, err)
		}
	}
	return netlink.LinkSetUp(l)
}

func addRoute(to netip.Prefix, by netip.Addr) error {
	if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: by.AsSlice()}); err != nil {
		return fmt.Errorf("route to %v by %v: %w", to, by, err)
	}
	return nil
}

// forward lets packets of both families through this network namespace.
func forward() error {
	for _, file := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+file, []byte("1"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
