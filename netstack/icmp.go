package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// icmpBatch bounds how many errors are read from a socket at a time.
const icmpBatch = 16

// icmpSize is how much of an error is read, in bytes: no error is longer.
// https://www.rfc-editor.org/rfc/rfc4443#section-3.1
const icmpSize = 1280

// An icmpSocket is a raw ICMP socket of the pod's namespace. Only TCP crosses
// the device, so ICMP errors about the connections made here reach the pod's
// kernel; without a copy of them an unreachable host would look like one that
// does not answer.
type icmpSocket struct {
	file *os.File
	fd   int
	v6   bool
}

func newICMPSocket(f *os.File) (*icmpSocket, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("netstack: ICMP socket: %w", err)
	}
	s := &icmpSocket{file: f}
	var domain, typ int
	cerr := rc.Control(func(fd uintptr) {
		s.fd = int(fd)
		if domain, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil {
			typ, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TYPE)
		}
	})
	if err := errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("netstack: ICMP socket: %w", err)
	}
	if typ != unix.SOCK_RAW || domain != unix.AF_INET && domain != unix.AF_INET6 {
		return nil, fmt.Errorf("netstack: ICMP socket: descriptor is of domain %d, type %d", domain, typ)
	}
	s.v6 = domain == unix.AF_INET6
	return s, nil
}

// watchICMP reads the sockets of StackConfig.ICMP from now on, on the loop.
func (s *Stack) watchICMP() error {
	for _, sock := range s.icmp {
		if err := s.reader.watch(sock.fd); err != nil {
			return err
		}
		s.reader.errors[sock.fd] = func() { s.readICMP(sock) }
	}
	return nil
}

func (s *Stack) unwatchICMP() {
	for _, sock := range s.icmp {
		delete(s.reader.errors, sock.fd)
		unix.EpollCtl(s.reader.epfd, unix.EPOLL_CTL_DEL, sock.fd, nil)
	}
}

// readICMP takes what waits in a socket.
func (s *Stack) readICMP(sock *icmpSocket) {
	buf := s.reader.scratch[:icmpSize]
	for range icmpBatch {
		n, from, err := unix.Recvfrom(sock.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			return
		}
		s.counters.icmp.Add(1)
		switch a := from.(type) {
		case *unix.SockaddrInet4:
			s.deliverError(buf[:n], header.IPv4ProtocolNumber, ipv4Quote)
		case *unix.SockaddrInet6:
			// The kernel keeps the IPv6 header to itself: the error is about a
			// packet of the pod, so that is whom it was sent to.
			if b := s.withIPv6Header(buf[:n], netip.AddrFrom16(a.Addr)); b != nil {
				s.deliverError(b, header.IPv6ProtocolNumber, ipv6Quote)
			}
		}
	}
}

// Where the quoted packet begins.
func ipv4Quote(b []byte) int {
	if len(b) < ipv4HeaderMin {
		return len(b)
	}
	return int(b[0]&0xf)*4 + 8
}
func ipv6Quote([]byte) int { return ipv6Header + 8 }

func (s *Stack) withIPv6Header(icmp []byte, from netip.Addr) []byte {
	if len(icmp) < 8+ipv6Header {
		return nil
	}
	to := netip.AddrFrom16([16]byte(icmp[8+8 : 8+24]))
	b := appendIP(nil, from, to, protoICMPv6, len(icmp))
	return append(b, icmp...)
}

// deliverError hands an ICMP error to gVisor if it quotes a segment of a flow
// of this stack. Everything else that the pod's kernel hears is its own.
func (s *Stack) deliverError(b []byte, proto tcpip.NetworkProtocolNumber, quote func([]byte) int) {
	at := quote(b)
	if len(b) < at {
		return
	}
	key, ok := quotedTuple(b[at:])
	if !ok {
		return
	}
	if s.flows[key.reverse()] == nil {
		if s.before != nil {
			s.handOnError(b)
		}
		return
	}
	// HandleError takes the endpoint's lock. None is held: this runs between batches.
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	s.link.vouched.Store(false)
	s.link.dispatcher.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

// quotedTuple reads the flow of a packet of which an ICMP error quotes at
// least the first 8 bytes of the transport header.
func quotedTuple(b []byte) (t tuple, ok bool) {
	var at int
	switch {
	case len(b) >= ipv4HeaderMin && b[0]>>4 == 4:
		at = int(b[0]&0xf) * 4
		if at < ipv4HeaderMin || b[9] != protoTCP || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return t, false
		}
		t.src, t.dst = v4prefix, v4prefix
		copy(t.src[12:], b[12:16])
		copy(t.dst[12:], b[16:20])
	case len(b) >= ipv6Header && b[0]>>4 == 6:
		at = ipv6Header
		if b[6] != protoTCP {
			return t, false
		}
		copy(t.src[:], b[8:24])
		copy(t.dst[:], b[24:40])
	default:
		return t, false
	}
	if len(b) < at+8 {
		return t, false
	}
	t.srcPort, t.dstPort = binary.BigEndian.Uint16(b[at:]), binary.BigEndian.Uint16(b[at+2:])
	return t, true
}
