package meshtest

import (
	"net/netip"
	"os"
	"strconv"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
	"github.com/ztun/ztun/tun/tuntest"
)

// A Network is a bridge that joins pods, and their gateway.
type Network struct {
	NS     *netnstest.NS
	number byte // N of 10.N.0.0/16 and fd00:N::/64
}

func (m *Mesh) network(ns *netnstest.NS, number byte) *Network {
	n := &Network{NS: ns, number: number}
	ns.Bridge("br0")
	ns.Addr("br0", n.gateway().String()+"/16", n.gateway6().String()+"/64")
	return n
}

func (n *Network) addr(host byte) netip.Addr { return netip.AddrFrom4([4]byte{10, n.number, 0, host}) }
func (n *Network) addr6(host byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 3: n.number, 15: host})
}
func (n *Network) gateway() netip.Addr  { return n.addr(1) }
func (n *Network) gateway6() netip.Addr { return n.addr6(1) }

// Far makes a second network, which packets from and to the first reach over
// a Wire between the two gateways: AtoB is the way to the far network.
func (m *Mesh) Far(o tuntest.Options) (*Network, *tuntest.Wire) {
	m.T.Helper()
	far := m.network(netnstest.New(m.T, "far"), 2)
	near := m.near
	a, b := m.wireEnd(near, far), m.wireEnd(far, near)
	return far, tuntest.Join(m.T, a, b, o)
}

// wireEnd makes a TUN device in n's gateway that leads to the other network.
func (m *Mesh) wireEnd(n, to *Network) *tun.Device {
	m.T.Helper()
	const name, mtu = "wire0", 1500
	var file *os.File
	var offload bool
	var err error
	n.NS.Do(func() { file, offload, err = tun.Create(name, mtu) })
	if err != nil {
		m.T.Fatal(err)
	}
	dev, err := tun.New(file, tun.Options{MTU: mtu, Offload: offload})
	if err != nil {
		m.T.Fatal(err)
	}
	m.T.Cleanup(func() { dev.Close() })
	// A burst of more than txqueuelen packets would be a loss of the kernel's.
	if err := n.NS.Netlink().LinkSetTxQLen(n.NS.Link(name), 10_000); err != nil {
		m.T.Fatalf("txqueuelen of %s: %v", name, err)
	}
	n.NS.Up(name)
	n.NS.SetSysctl("net/ipv4/ip_forward", "1")
	n.NS.SetSysctl("net/ipv6/conf/all/forwarding", "1")
	n.NS.Route("10."+strconv.Itoa(int(to.number))+".0.0/16", "", name)
	n.NS.Route(to.addr6(0).String()+"/64", "", name)
	return dev
}

// NodeOn is Node for a node whose pods are on that network.
func (m *Mesh) NodeOn(net *Network, name string) *Node {
	m.T.Helper()
	n := m.Node(name)
	n.network = net
	return n
}

// BareOn is Bare for a pod of no node on that network.
func (m *Mesh) BareOn(net *Network, name string) *Pod {
	m.T.Helper()
	return m.bare(net, name, nil)
}
