package netstack

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tun"
)

// A proxy is replaced without a cut: a device has one reader, but whoever holds
// it may write. The old proxy's stack yields the device and reads from a packet
// socket instead (Stack.Yield); the new one's has the socket's other end
// (StackConfig.Predecessor), takes every SYN, and sends there, virtio header and
// all, what belongs to no flow of its own. The old one answers straight into the
// device. The SYNs that it had not answered it sends back.
//
// When the new one ends, the socket does, and the old one reads the device
// again. When the old one ends first, what belongs to no flow gets its RST. An
// old one may have a predecessor itself, to which it hands on in the same way,
// so that the flows of a third generation live as long as those between do.

// Yield gives the device to another reader and returns once this one has left
// it for good; from now on it reads packets, which a stack sends whose Predecessor
// the other end is. No SYN is answered any more; those that wait for an answer go
// to that one. Flows live on and still write. When the other end is closed, the
// device is read again. The Stack owns packets unless there is an error,
// ErrClosed for one.
func (s *Stack) Yield(packets *os.File) error {
	err := errClosed
	s.onLoop(func() { err = s.yield(packets) })
	return err
}

func (s *Stack) yield(packets *os.File) error {
	if s.closed {
		return errClosed
	}
	source, err := s.packetSocket(packets)
	if err != nil {
		return err
	}
	if err := s.reader.watch(source.FD()); err != nil {
		return err
	}
	s.reader.unwatch(s)
	s.unwatchICMP()
	if s.source != s.dev {
		s.source.Close()
	}
	s.source = source
	s.reader.watched[source.FD()] = s
	for _, r := range s.pending {
		if !r.over {
			s.handBack(r)
		}
	}
	for _, b := range s.heldTunnels {
		if unix.Send(source.FD(), b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL) != nil {
			s.counters.handOnFailed.Add(1)
		}
	}
	s.held, s.heldTunnels = nil, nil
	return nil
}

// packetSocket adopts a socket whose messages are packets as the device has them.
func (s *Stack) packetSocket(f *os.File) (*tun.Device, error) {
	d, err := tun.New(f, tun.Options{MTU: s.dev.MTU(), Offload: s.dev.Offload()})
	if err != nil {
		return nil, fmt.Errorf("netstack: packet socket: %w", err)
	}
	typ, err := unix.GetsockoptInt(d.FD(), unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, fmt.Errorf("netstack: packet socket: %w", err)
	}
	if typ != unix.SOCK_SEQPACKET { // Any other does not tell of the other end's end.
		return nil, fmt.Errorf("netstack: packet socket: descriptor is of type %d", typ)
	}
	return d, nil
}

// maxHeldTunnels bounds the SYNs to the TunnelPort that are held.
const maxHeldTunnels = 256

// holdTunnel keeps the SYN in the reader's buffers for the successor. It may be
// lost: its sender repeats it.
func (s *Stack) holdTunnel(h tun.Header, n int) {
	if n > headRoom || len(s.heldTunnels) >= maxHeldTunnels {
		return
	}
	b := make([]byte, tun.HeaderSize, tun.HeaderSize+n)
	if h.ChecksumVouched() {
		b[0] = tun.DataValid
	}
	s.reader.peekViews(n, func(part []byte) { b = append(b, part...) })
	s.heldTunnels = append(s.heldTunnels, b)
}

// handBack leaves a SYN to the successor.
func (s *Stack) handBack(r *Request) {
	var h tun.Header
	if r.pkt.RXChecksumValidated {
		h.Flags = tun.DataValid
	}
	t := transmits.Get().(*transmit)
	defer transmits.Put(t)
	t.Reset(h)
	t.append(r.pkt)
	if t.Send(s.source.FD()) != nil {
		s.counters.handOnFailed.Add(1) // Its sender repeats it.
	}
	r.drop()
}

// resume reads the device again: the successor has ended.
func (s *Stack) resume() {
	r := s.reader
	r.unwatch(s)
	s.source.Close()
	s.source = s.dev
	r.watched[s.dev.FD()] = s
	if err := errors.Join(r.watch(s.dev.FD()), s.watchICMP()); err != nil {
		s.failed(err)
		return
	}
	r.engine.log.Warn("the proxy that had taken the device over has left it; it is read again", "pod", s.cfg.Name)
	if s.cfg.Resumed != nil {
		r.Post(s.cfg.Resumed)
	}
}

// passedError handles an ICMP error that the successor sent: the packet in the
// reader's buffers, if it is one.
func (s *Stack) passedError(n int) bool {
	b := s.reader.scratch[:0]
	if n > icmpSize {
		return false
	}
	s.reader.peekViews(n, func(part []byte) { b = append(b, part...) })
	// HandleError takes the endpoint's lock.
	s.finishBatch()
	switch {
	case len(b) >= ipv4HeaderMin && b[0]>>4 == 4 && b[9] == protoICMP:
		s.deliverError(b, header.IPv4ProtocolNumber, ipv4Quote)
	case len(b) >= ipv6Header && b[0]>>4 == 6 && b[6] == protoICMPv6:
		s.deliverError(b, header.IPv6ProtocolNumber, ipv6Quote)
	default:
		return false
	}
	return true
}

// adopt takes StackConfig.Predecessor.
func (s *Stack) adopt(f *os.File) (err error) {
	if f != nil {
		s.before, err = s.packetSocket(f)
	}
	return err
}

// watchPredecessor reads what the predecessor sends from now on, on the loop.
func (s *Stack) watchPredecessor() error {
	if s.before == nil {
		return nil
	}
	fd := s.before.FD()
	if err := s.reader.watch(fd); err != nil {
		return err
	}
	s.reader.errors[fd] = s.readPredecessor
	return nil
}

func (s *Stack) unwatchPredecessor() {
	if s.before != nil {
		delete(s.reader.errors, s.before.FD())
		unix.EpollCtl(s.reader.epfd, unix.EPOLL_CTL_DEL, s.before.FD(), nil)
	}
}

// readPredecessor takes the SYNs that the predecessor did not answer, or
// notices that it has ended.
func (s *Stack) readPredecessor() {
	r := s.reader
	for range turnPackets {
		r.fillViews()
		n, h, err := s.before.Read(&r.vector)
		if errors.Is(err, tun.ErrEmpty) {
			break
		}
		var bad *tun.HeaderError
		switch {
		case errors.As(err, &bad):
			s.counters.badHeader.Add(1)
			continue
		case err != nil:
			s.finishBatch()
			s.forgetPredecessor()
			return
		}
		first := r.views[0].AsSlice()
		// Nothing else: what was sent there must not come back for ever.
		if p := parsePacket(first[:min(n, len(first))], n); p.class == classTCP && p.isSYN() {
			s.segment(&p, h, n)
		} else {
			s.counters.malformed.Add(1)
		}
	}
	s.finishBatch()
}

// forgetPredecessor: what belongs to no flow gets a RST from now on.
func (s *Stack) forgetPredecessor() {
	s.unwatchPredecessor()
	s.before.Close()
	s.before = nil
	r := s.reader
	for _, done := range s.alone {
		r.Post(done)
	}
	s.alone = nil
}

// Lend returns other descriptors of the device and the ICMP sockets if this
// stack reads the device. yielded says that it has yielded it. It waits for the
// loop.
func (s *Stack) Lend() (device *os.File, icmp []*os.File, yielded bool, err error) {
	s.onLoop(func() {
		if yielded = s.source != s.dev; yielded || s.closed {
			return
		}
		list := []int{s.dev.FD()}
		for _, sock := range s.icmp {
			list = append(list, sock.fd)
		}
		var files []*os.File
		for _, fd := range list {
			var d int
			if d, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
				for _, f := range files {
					f.Close()
				}
				return
			}
			files = append(files, os.NewFile(uintptr(d), "lent"))
		}
		device, icmp = files[0], files[1:]
	})
	return device, icmp, yielded, err
}

// ErrClosed says that the stack is closed.
var ErrClosed = errClosed

// isStray says that the segment, which is of no Flow and no SYN, belongs to
// no connection here at all. Those whose handshake is under way at a listener
// only gVisor knows. A cookie it would know too, and is lost: a peer that is
// answered with one while a proxy is replaced tries again.
func (s *Stack) isStray(p *packet) bool {
	if p.tuple.dstPort != TunnelPort || !s.isPod(p.tuple.dst) {
		return true
	}
	from, to := fullAddress(p.tuple.source()), fullAddress(p.tuple.destination())
	id := stack.TransportEndpointID{
		LocalAddress: to.Addr, LocalPort: to.Port, RemoteAddress: from.Addr, RemotePort: from.Port,
	}
	ep := s.gv.FindTransportEndpoint(networkProtocol(p.tuple.destination().Addr()), tcp.ProtocolNumber, id, nicID)
	e, ok := ep.(*tcp.Endpoint)
	return !ok || e.EndpointState() == tcp.StateListen
}

// handOn sends the packet in the reader's buffers to the predecessor. It
// reports false if that one is no more.
func (s *Stack) handOn(h tun.Header, n int) bool {
	t := transmits.Get().(*transmit)
	defer transmits.Put(t)
	t.Reset(h)
	s.reader.peekViews(n, func(b []byte) { t.Append(b) })
	return s.sendOn(t)
}

// handOnError sends an ICMP error to the predecessor.
func (s *Stack) handOnError(b []byte) {
	t := transmits.Get().(*transmit)
	defer transmits.Put(t)
	t.Reset(noOffload)
	t.Append(b)
	s.sendOn(t)
}

func (s *Stack) sendOn(t *transmit) bool {
	err := t.Send(s.before.FD())
	switch {
	case err == nil:
		s.counters.handedOn.Add(1)
	case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		s.forgetPredecessor()
		return false
	default:
		s.counters.handOnFailed.Add(1) // No room: as on any wire, TCP sends it again.
	}
	return true
}

// Predecessor returns another descriptor of the socket to the predecessor, or
// nil if there is none any more. It waits for the loop.
func (s *Stack) Predecessor() (f *os.File) {
	s.onLoop(func() {
		if s.before == nil || s.closed {
			return
		}
		if fd, err := unix.FcntlInt(uintptr(s.before.FD()), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			f = os.NewFile(uintptr(fd), "predecessor")
		}
	})
	return f
}

// Alone returns a channel that is closed once there is no predecessor, whose
// packets come through this stack. It waits for the loop.
func (s *Stack) Alone() <-chan struct{} {
	ch := make(chan struct{})
	s.onLoop(func() {
		if s.before == nil || s.closed {
			close(ch)
			return
		}
		s.alone = append(s.alone, func() { close(ch) })
	})
	return ch
}

// closeSockets closes what connects the stack with others. The device must
// have been left before: the predecessor reads it again.
func (s *Stack) closeSockets() {
	if s.source != s.dev {
		s.source.Close()
	}
	if s.before != nil {
		s.forgetPredecessor()
	}
}
