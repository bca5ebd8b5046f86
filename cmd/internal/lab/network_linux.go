package lab

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A network is the lab's fabric: a bridge that joins the nodes and the
// control plane, and routes between the nodes' pod subnets.
//
//	fabric   br0 (172.30.0.1) -- m1 control, m10.. nodes
//	node     eth0 (fabric), cni0 (10.240.8.1, the next node's 10.240.16.1 ...) -- p0, p1 ...
//	pod      eth0 (10.240.8.2 ...), default via cni0
type network struct {
	dir    string // Where namespaces are mounted.
	fabric *space
	ipv6   bool
}

func newNetwork(dir string) (*network, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	_, err := os.Stat("/proc/sys/net/ipv6")
	n := &network{dir: dir, ipv6: err == nil}
	n.fabric, err = newSpace(filepath.Join(dir, "fabric"))
	if err != nil {
		return nil, err
	}
	if err := n.forward(n.fabric); err != nil {
		return nil, err
	}
	err = n.fabric.link(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := n.addAddrs(h, lo, outsidePrefixes); err != nil {
			return err
		}
		return n.addBridge(h, "br0", []netip.Prefix{
			netip.PrefixFrom(host(fabricPrefix4, 1), fabricPrefix4.Bits()),
			netip.PrefixFrom(host(fabricPrefix6, 1), fabricPrefix6.Bits()),
		})
	})
	return n, err
}

// forward makes a namespace a router.
func (n *network) forward(s *space) error {
	if err := s.sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if n.ipv6 {
		return s.sysctl("net/ipv6/conf/all/forwarding", "1")
	}
	return nil
}

// addMachine makes a namespace with an eth0 on the fabric.
func (n *network) addMachine(name string, index int) (*space, error) {
	s, err := newSpace(filepath.Join(n.dir, name))
	if err != nil {
		return nil, err
	}
	err = n.join(cable{
		bridgeSide: n.fabric, bridge: "br0", port: fmt.Sprintf("m%d", index),
		far:      s,
		prefixes: []netip.Prefix{netip.PrefixFrom(fabricAddrs(index)[0], fabricPrefix4.Bits()), netip.PrefixFrom(fabricAddrs(index)[1], fabricPrefix6.Bits())},
		gateways: fabricAddrs(fabricRouter),
	})
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// addNode makes a node: a machine that bridges and routes its pods.
func (n *network) addNode(name string, node int) (*space, error) {
	s, err := n.addMachine("node-"+name, fabricNodes+node)
	if err != nil {
		return nil, err
	}
	if err := n.forward(s); err != nil {
		return nil, err
	}
	err = s.link(func(h *netlink.Handle) error {
		var prefixes []netip.Prefix
		for i, p := range podSubnets(node) {
			prefixes = append(prefixes, netip.PrefixFrom(gateways(node)[i], p.Bits()))
		}
		return n.addBridge(h, "cni0", prefixes)
	})
	if err != nil {
		return nil, err
	}
	return s, n.fabric.link(func(h *netlink.Handle) error {
		for i, p := range podSubnets(node) {
			if err := n.addRoute(h, p, fabricAddrs(fabricNodes + node)[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

// addPod makes a pod's namespace on a node.
func (n *network) addPod(name string, nodeSpace *space, node, pod int) (*space, error) {
	addrs, err := podAddrs(node, pod)
	if err != nil {
		return nil, err
	}
	s, err := newSpace(filepath.Join(n.dir, name))
	if err != nil {
		return nil, err
	}
	c := cable{bridgeSide: nodeSpace, bridge: "cni0", port: portName(pod), far: s, gateways: gateways(node)}
	for i, p := range podSubnets(node) {
		c.prefixes = append(c.prefixes, netip.PrefixFrom(addrs[i], p.Bits()))
	}
	err = n.join(c)
	if err == nil {
		err = n.introduce(s, nodeSpace, node, addrs)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// introduce tells a pod and its node each other's hardware addresses, for good.
// The kernel bounds what all namespaces of the machine learn together, to some
// 1,000 neighbours: with hundreds of pods it forgets some that are in use.
func (n *network) introduce(pod, nodeSpace *space, node int, addrs []netip.Addr) error {
	var bridge, eth0 netlink.Link
	err := nodeSpace.link(func(h *netlink.Handle) (err error) {
		bridge, err = h.LinkByName("cni0")
		return err
	})
	if err != nil {
		return err
	}
	err = pod.link(func(h *netlink.Handle) (err error) {
		if eth0, err = h.LinkByName("eth0"); err != nil {
			return err
		}
		return n.addNeighbours(h, eth0, gateways(node), bridge.Attrs().HardwareAddr)
	})
	if err != nil {
		return err
	}
	return nodeSpace.link(func(h *netlink.Handle) error {
		return n.addNeighbours(h, bridge, addrs, eth0.Attrs().HardwareAddr)
	})
}

func (n *network) addNeighbours(h *netlink.Handle, link netlink.Link, addrs []netip.Addr, at net.HardwareAddr) error {
	for _, a := range addrs {
		if a.Is6() && !n.ipv6 {
			continue
		}
		neigh := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: at}
		if err := h.NeighSet(neigh); err != nil {
			return fmt.Errorf("add neighbour %s: %w", a, err)
		}
	}
	return nil
}

// removePod takes away what a node has of a pod whose namespace is given up:
// the next one of that place has another hardware address.
func (n *network) removePod(nodeSpace *space, node, pod int) error {
	addrs, err := podAddrs(node, pod)
	if err != nil {
		return err
	}
	return nodeSpace.link(func(h *netlink.Handle) error {
		bridge, err := h.LinkByName("cni0")
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if a.Is6() && !n.ipv6 {
				continue
			}
			err := h.NeighDel(&netlink.Neigh{LinkIndex: bridge.Attrs().Index, IP: a.AsSlice()})
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("forget neighbour %s: %w", a, err)
			}
		}
		port, err := h.LinkByName(portName(pod))
		if err != nil {
			return nil // It went with the namespace.
		}
		if err := h.LinkDel(port); !errors.Is(err, unix.ENODEV) {
			return err
		}
		return nil // As above, just now.
	})
}

// portName is the port of a node's bridge that its n-th pod is at.
func portName(pod int) string { return fmt.Sprintf("p%d", pod) }

// A cable joins a bridge to a far namespace, as its eth0.
type cable struct {
	bridgeSide   *space
	bridge, port string
	far          *space
	prefixes     []netip.Prefix // Of eth0.
	gateways     []netip.Addr   // Default routes of the far namespace.
}

func (n *network) join(c cable) error {
	err := c.bridgeSide.link(func(h *netlink.Handle) error {
		bridge, err := h.LinkByName(c.bridge)
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = c.port
		attrs.MasterIndex = bridge.Attrs().Index
		attrs.Flags = net.FlagUp
		return h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(c.far.file.Fd())})
	})
	if err != nil {
		return err
	}
	return c.far.link(func(h *netlink.Handle) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := n.addAddrs(h, eth0, c.prefixes); err != nil {
			return err
		}
		if err := h.LinkSetUp(eth0); err != nil {
			return err
		}
		for _, gw := range c.gateways {
			if err := n.addRoute(h, netip.PrefixFrom(zeroOf(gw), 0), gw); err != nil {
				return err
			}
		}
		return nil
	})
}

func zeroOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func (n *network) addBridge(h *netlink.Handle, name string, prefixes []netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	// One of its own: else it is the least of its ports', and changes with them.
	attrs.HardwareAddr = make(net.HardwareAddr, 6)
	rand.Read(attrs.HardwareAddr)
	attrs.HardwareAddr[0] = attrs.HardwareAddr[0]&^1 | 2 // Not multicast, and nobody's.
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	bridge, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	if err := n.addAddrs(h, bridge, prefixes); err != nil {
		return err
	}
	return h.LinkSetUp(bridge)
}

func (n *network) addAddrs(h *netlink.Handle, link netlink.Link, prefixes []netip.Prefix) error {
	for _, p := range prefixes {
		if p.Addr().Is6() && !n.ipv6 {
			continue
		}
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
	}
	return nil
}

func (n *network) addRoute(h *netlink.Handle, to netip.Prefix, via netip.Addr) error {
	if to.Addr().Is6() && !n.ipv6 {
		return nil
	}
	route := &netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}
	if err := h.RouteAdd(route); err != nil {
		return fmt.Errorf("add route %s via %s: %w", to, via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
