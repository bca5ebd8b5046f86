package netstack

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"unsafe"

	mathrand "math/rand"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// shared is what the stacks of one reader have in common. gVisor means a stack
// for a machine, and gives each what a machine may need; here a node has one
// for each of its pods. The figures are what it would take for each stack.
type shared struct {
	ipv4   stack.NetworkProtocolFactory // 8 KiB: the IDs of IPv4 packets
	tables stack.IPTables               // 7.6 KiB: iptables without a rule
	stats  tcpip.Stats                  // 2.6 KiB: counters that nobody reads
}

func newShared() *shared {
	return &shared{ipv4: ipv4.NewProtocolWithOptions(ipv4.Options{}), stats: tcpip.Stats{}.FillIn()}
}

// newGVisor makes the gVisor stack of a pod.
func (c *shared) newGVisor(cfg *StackConfig, clock tcpip.Clock) *stack.Stack {
	return stack.New(stack.Options{
		NetworkProtocols:   c.networks(cfg),
		TransportProtocols: []stack.TransportProtocolFactory{newTCP},
		Clock:              clock,
		IPTables:           &c.tables,
		Stats:              c.stats,
		RandSource:         randSource{}, // math/rand's has 5 KiB of state
	})
}

// networks are the IP versions that packets of the pod may have; each takes
// 8 KiB of a stack.
func (c *shared) networks(cfg *StackConfig) (list []stack.NetworkProtocolFactory) {
	has := func(is func(netip.Addr) bool) bool {
		for _, a := range slices.Concat(cfg.Addrs, cfg.Families) {
			if is(a.Unmap()) {
				return true
			}
		}
		return cfg.VirtualInterfaces
	}
	if has(netip.Addr.Is4) {
		list = append(list, c.ipv4)
	}
	if has(netip.Addr.Is6) {
		list = append(list, ipv6.NewProtocol)
	}
	return list
}

// families are the IP versions that the stack was made for.
func (s *Stack) families() (v4, v6 bool) {
	return s.gv.CheckNetworkProtocol(header.IPv4ProtocolNumber), s.gv.CheckNetworkProtocol(header.IPv6ProtocolNumber)
}

// randSource is the random numbers of the runtime, which have no state to keep
// and need no lock.
type randSource struct{}

var _ mathrand.Source64 = randSource{}

func (randSource) Int63() int64   { return rand.Int64() }
func (randSource) Uint64() uint64 { return rand.Uint64() }
func (randSource) Seed(int64)     {}

// processors is how many goroutines gVisor has for a stack. It makes one for
// each CPU, with 2.5 KiB each; here they see no segment of an established flow,
// and a pod is served by one thread at a time anyhow.
const processors = 1

// newTCP is tcp.NewProtocol with as many processors as we want.
func newTCP(s *stack.Stack) stack.TransportProtocol {
	p := tcp.NewProtocol(s)
	d := reflect.ValueOf(p).Elem().FieldByName("dispatcher")
	initDispatcher(unsafe.Pointer(d.UnsafeAddr()), s.InsecureRNG(), processors)
	return p
}

// initDispatcher ends the processors that a dispatcher has and starts others.
//
//go:linkname initDispatcher gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*dispatcher).init
func initDispatcher(d unsafe.Pointer, rng *mathrand.Rand, processors int)
