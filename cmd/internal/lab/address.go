package lab

import (
	"fmt"
	"net/netip"
)

// The lab's address plan. Nodes and the control plane are on one fabric, and
// each node routes a subnet of pods, in both families.
var (
	fabricPrefix4 = netip.MustParsePrefix("172.30.0.0/16")
	fabricPrefix6 = netip.MustParsePrefix("fd00:30::/64")
	podPrefix4    = netip.MustParsePrefix("10.240.0.0/12")
	podPrefix6    = netip.MustParsePrefix("fd00:244::/32")
	// outsidePrefixes are on the far side of the fabric: not in the mesh and
	// not in the cluster.
	outsidePrefixes = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")}
)

const (
	maxNodes = 200
	// maxPodsPerNode is what a bridge has ports for.
	maxPodsPerNode = 1020
)

// host returns the n-th address of a prefix.
func host(p netip.Prefix, n int) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	b[len(b)-1] += byte(n)
	b[len(b)-2] += byte(n >> 8)
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

// fabricAddrs returns the addresses of the fabric's n-th machine. Zero is the
// fabric's own router, 1 the control plane, nodes follow from 10.
func fabricAddrs(n int) []netip.Addr {
	return []netip.Addr{host(fabricPrefix4, n+1), host(fabricPrefix6, n+1)}
}

const (
	fabricRouter  = 0
	fabricControl = 1
	fabricNodes   = 10
)

// podSubnets returns the pod prefixes of the n-th node, counted from 0.
func podSubnets(n int) []netip.Prefix {
	b4 := podPrefix4.Addr().As4()
	b4[1] += byte((n + 1) >> 5)
	b4[2] = byte((n + 1) << 3)
	b6 := podPrefix6.Addr().As16()
	b6[5] = byte(n + 1)
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4(b4), 21),
		netip.PrefixFrom(netip.AddrFrom16(b6), 64),
	}
}

// podAddrs returns the addresses of a node's n-th pod, counted from 0. The
// first address of each subnet is the node's own.
func podAddrs(node, n int) ([]netip.Addr, error) {
	if node >= maxNodes || n >= maxPodsPerNode {
		return nil, fmt.Errorf("lab: more than %d nodes or %d pods on one node", maxNodes, maxPodsPerNode)
	}
	var addrs []netip.Addr
	for _, p := range podSubnets(node) {
		addrs = append(addrs, host(p, n+2))
	}
	return addrs, nil
}

// gateways returns the node's own address in each of its pod subnets.
func gateways(node int) []netip.Addr {
	var addrs []netip.Addr
	for _, p := range podSubnets(node) {
		addrs = append(addrs, host(p, 1))
	}
	return addrs
}
