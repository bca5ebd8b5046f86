package netstack

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tunnel/splice"
)

// nicID is the only interface of every stack.
const nicID = 1

// timeWait is how long a network leg that closed first stays in TIME_WAIT, as
// Linux does; the pod leg has none (see finish). Ports are reused before it ends.
const timeWait = 60 * time.Second

// Stack is the TCP of one pod. It belongs to one reader, its Loop.
type Stack struct {
	// Set before the device is read, read-only after.
	cfg     StackConfig
	limits  Limits
	handler Handler
	reader  *reader
	dev     *tun.Device // where packets go, and come from but for a Yield
	gv      *stack.Stack
	link    *link
	addrs   [][16]byte
	icmp    []*icmpSocket

	counters counters

	// Owned by the loop.
	fwds      [4]*tcp.Forwarder // see forwarder
	flows     map[tuple]*Flow
	pending   map[tuple]*Request
	perSource map[[16]byte]int
	inbound   int // pending inbound requests
	asked     []*Request
	askTask   splice.Task
	bypass    forwarded
	listeners []*listener
	reserved  int64
	port      uint32  // of the last dial without one, from firstPort on
	timeWaits []*Flow // oldest first
	quiet     bool    // answers no SYN
	// heldTunnels are SYNs to the TunnelPort, headers first.
	heldTunnels [][]byte
	noTunnels   bool       // nor one to the TunnelPort
	held        []*Request // those of a quiet stack, and some that are over
	closed      bool
	source      *tun.Device // what is read: dev, or what the successor sends
	before      *tun.Device // the predecessor's socket; nil: there is none
	alone       []func()    // wait for there to be none
}

func newStack(r *reader, dev *tun.Device, cfg StackConfig) (*Stack, error) {
	s := &Stack{
		cfg: cfg, limits: cfg.Limits.withDefaults(), reader: r, dev: dev, source: dev,
		port:      rand.N(uint32(lastPort - firstPort + 1)),
		flows:     map[tuple]*Flow{},
		pending:   map[tuple]*Request{},
		perSource: map[[16]byte]int{},
	}
	s.askTask.Run = s.ask
	for _, a := range cfg.Addrs {
		s.addrs = append(s.addrs, a.As16())
	}
	for _, f := range cfg.ICMP {
		sock, err := newICMPSocket(f)
		if err != nil {
			return nil, err
		}
		s.icmp = append(s.icmp, sock)
	}
	if err := s.adopt(cfg.Predecessor); err != nil {
		return nil, err
	}
	s.bypass.init(cfg.Older)
	s.link = &link{stack: s}
	s.gv = r.shared.newGVisor(&s.cfg, &r.timers)
	if err := s.configure(); err != nil {
		s.gv.Destroy()
		return nil, err
	}
	return s, nil
}

// configure sets the stack up. Handlers come before the interface, and the
// interface answers for every address, since the peers of both legs are
// spoken for here.
func (s *Stack) configure() error {
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: firstBuffer, Max: maxTunnelBuffer}
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: firstBuffer, Max: maxBuffer}
	// On, so that the window scale of the handshake allows for the largest.
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	reuse := tcpip.TCPTimeWaitReuseGlobal
	choices := s.reader.engine.cfg.TCP.options()
	for _, o := range append(choices, &rcv, &snd, &moderate, &wait, &reuse) {
		if err := s.gv.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("netstack: option %T: %s", o, err)
		}
	}
	s.gv.SetTransportProtocolHandler(tcp.ProtocolNumber, s.handleSegment)
	if err := s.gv.CreateNICWithOptions(nicID, s.link, stack.NICOptions{QDisc: s.link}); err != nil {
		return fmt.Errorf("netstack: interface: %s", err)
	}
	if err := s.gv.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("netstack: promiscuous: %s", err)
	}
	if err := s.gv.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("netstack: spoofing: %s", err)
	}
	s.gv.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return nil
}

// Loop runs everything of this pod.
func (s *Stack) Loop() splice.Loop { return s.reader }

// Close resets every flow, drops every request and gives the device back. It
// returns when the reader no longer touches the device.
func (s *Stack) Close() { s.onLoop(s.closeOnLoop) }

// onLoop runs f on the loop and waits for it. Once the reader has ended there
// is nothing left to do.
func (s *Stack) onLoop(f func()) {
	done := make(chan struct{})
	s.reader.Post(func() {
		f()
		close(done)
	})
	select {
	case <-done:
	case <-s.reader.done:
	}
}

// Hold leaves every SYN without an answer from now on, but for those to the
// TunnelPort: it waits for Yield, which hands it to whoever reads the device
// next, or for its sender to repeat it. Flows live on.
func (s *Stack) Hold() {
	s.onLoop(func() { s.quiet = true })
}

// StopAccepting is Hold for all SYNs.
func (s *Stack) StopAccepting() {
	s.onLoop(func() { s.quiet, s.noTunnels = true, true })
}

// Accept undoes Hold and StopAccepting. It runs on the loop.
func (s *Stack) Accept() {
	s.quiet, s.noTunnels = false, false
	held := s.held
	s.held, s.heldTunnels = nil, nil // The latter come again.
	for _, r := range held {
		if !r.over {
			s.handler.HandleTCP(r)
		}
	}
}

// StopReading leaves the device to another reader. It returns once this one
// has left it for good; flows live on and still write.
func (s *Stack) StopReading() { s.onLoop(func() { s.reader.unwatch(s) }) }

func (s *Stack) closeOnLoop() {
	if s.closed {
		return
	}
	s.closed = true
	for _, r := range s.pending {
		r.drop()
	}
	for _, f := range s.flows {
		f.Reset(errClosed)
	}
	for _, l := range s.listeners {
		l.close()
	}
	s.reader.remove(s)
	s.unwatchICMP()
	s.closeSockets()
	s.destroy()
}

// destroy ends gVisor's goroutines, which may take a moment, and then closes
// the device.
func (s *Stack) destroy() {
	s.reader.engine.wg.Go(func() {
		s.gv.Destroy()
		s.dev.Close()
		for _, sock := range s.icmp {
			sock.file.Close()
		}
	})
}

// isPod says that a is one of the pod's addresses.
func (s *Stack) isPod(a [16]byte) bool { return slices.Contains(s.addrs, a) }

func fullAddress(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

func addrPortOf(a tcpip.Address, port uint16) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(ip, port)
}

func networkProtocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
