package netstack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tunnel/splice"
)

// A Request is a SYN that has not been answered. Exactly one of Accept or
// Refuse must be called, on the loop; a Request that is left alone is dropped
// after Limits.Withheld, and calls after that do nothing but fail.
type Request struct {
	stack *Stack
	key   tuple
	id    stack.TransportEndpointID
	pkt   *stack.PacketBuffer // the SYN
	head  []byte              // its first bytes, for ICMP
	seq   uint32
	in    bool // to the pod
	over  bool // accepted, refused or dropped
	stop  func()
}

// Src is who opens the connection, Dst whom it dialled.
func (r *Request) Src() netip.AddrPort { return r.key.source() }
func (r *Request) Dst() netip.AddrPort { return r.key.destination() }

// Inbound says that the connection comes to the pod, in plaintext.
func (r *Request) Inbound() bool { return r.in }

// maxSYNData is the data that a SYN may carry, in bytes: a SYN is held until it
// is answered, and must not hold a super-segment with it.
const maxSYNData = 1500

// handleSegment is gVisor's question what to do with a segment of no known
// endpoint. It runs on the reader, within a batch: a SYN is only noted here.
// Whatever else is stray gets a RST from gVisor: after a crash of the proxy
// the app's bytes must neither hang nor leave as plaintext.
func (s *Stack) handleSegment(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < tcpHeaderMin || h[13]&(flagSYN|flagACK|flagRST) != flagSYN {
		s.counters.stray.Add(1)
		return false
	}
	key := tupleOf(addrPortOf(id.RemoteAddress, id.RemotePort), addrPortOf(id.LocalAddress, id.LocalPort))
	if s.pending[key] != nil {
		return true // the app repeats its SYN
	}
	if pkt.Data().Size() > maxSYNData {
		s.counters.malformed.Add(1)
		return true
	}
	if !pkt.RXChecksumValidated && !synChecksumOK(id, h, pkt) {
		s.counters.badChecksum.Add(1)
		return true
	}
	in := s.isPod(key.dst)
	if !s.admit(key, in) {
		s.counters.limitPending.Add(1)
		return true
	}
	r := &Request{stack: s, key: key, id: id, in: in, seq: binary.BigEndian.Uint32(h[4:])}
	network := pkt.NetworkHeader().Slice()
	r.head = append(append(r.head, network...), h[:8]...)
	r.pkt = pkt.Clone()
	s.hold(r)
	s.asked = append(s.asked, r)
	s.reader.Soon(&s.askTask)
	return true
}

func synChecksumOK(id stack.TransportEndpointID, h header.TCP, pkt *stack.PacketBuffer) bool {
	return h.IsChecksumValid(id.RemoteAddress, id.LocalAddress, pkt.Data().Checksum(), uint16(pkt.Data().Size()))
}

// admit checks the limits of pending requests.
func (s *Stack) admit(key tuple, in bool) bool {
	if !in {
		return len(s.pending)-s.inbound < s.limits.PendingOutbound
	}
	return s.inbound < s.limits.PendingInbound && s.perSource[key.src] < s.limits.PendingPerSource
}

func (s *Stack) hold(r *Request) {
	s.pending[r.key] = r
	s.counters.pending.Add(1)
	if r.in {
		s.inbound++
		s.perSource[r.key.src]++
	}
	r.stop = s.reader.AfterFunc(s.limits.Withheld, func() {
		s.counters.expired.Add(1)
		r.drop()
	})
}

// unhold takes r out of the pending ones.
func (s *Stack) unhold(r *Request) {
	if s.pending[r.key] != r {
		return
	}
	delete(s.pending, r.key)
	s.counters.pending.Add(-1)
	r.stop()
	if r.in {
		s.inbound--
		if s.perSource[r.key.src]--; s.perSource[r.key.src] == 0 {
			delete(s.perSource, r.key.src)
		}
	}
}

// ask hands the batch's SYNs to the Handler, but for those that may be probes.
func (s *Stack) ask() {
	for len(s.asked) > 0 {
		asked := s.asked
		s.asked = nil
		for _, r := range asked {
			switch {
			case r.over, s.probing(r):
			case s.quiet:
				s.holdBack(r)
			default:
				s.handler.HandleTCP(r)
			}
		}
	}
}

// holdBack keeps a request of a quiet stack for Yield or Accept.
func (s *Stack) holdBack(r *Request) {
	if len(s.held) > 2*len(s.pending) {
		s.held = slices.DeleteFunc(s.held, func(r *Request) bool { return r.over })
	}
	s.held = append(s.held, r)
}

// drop forgets the request without an answer.
func (r *Request) drop() {
	if r.over {
		return
	}
	r.over = true
	r.pkt.DecRef()
	r.stack.unhold(r)
}

// Refuse answers the SYN as why says.
func (r *Request) Refuse(why Refusal) {
	if r.over {
		return
	}
	from, to := r.Dst(), r.Src()
	s := r.stack
	switch why {
	case RefuseReset:
		s.inject(appendRST(nil, from, to, r.seq+1))
	case RefuseUnreachable, RefuseProhibited:
		s.inject(appendUnreachable(nil, from.Addr(), to.Addr(), why == RefuseProhibited, r.head))
	case RefuseSilent:
		if s.quiet {
			s.holdBack(r) // Whoever reads the device next decides anew.
			return
		}
	}
	r.drop()
}

// inject writes a packet made here.
func (s *Stack) inject(b []byte) {
	t := transmits.Get().(*transmit)
	defer transmits.Put(t)
	t.Reset(noOffload)
	t.Append(b)
	if s.dev.WriteVector(&t.Writer) != nil {
		s.counters.writeFailed.Add(1)
		return
	}
	s.counters.packetsOut.Add(1)
	s.counters.bytesOut.Add(uint64(len(b)))
}

var errLimit = errors.New("netstack: connection limit reached")

// Accept completes the TCP handshake. done is called on the loop, once and
// after Accept has returned, with the flow, or with the error that kept it from being established: the app
// gave up, or a limit was reached (then the app sees a RST). The caller owns
// the flow.
func (r *Request) Accept(done func(splice.End, error)) {
	s := r.stack
	if r.over {
		s.reader.Post(func() { done(nil, syscall.ECONNABORTED) })
		return
	}
	size := s.newSize(minBuffer)
	if size == 0 {
		r.Refuse(RefuseReset)
		s.reader.Post(func() { done(nil, errLimit) })
		return
	}
	r.over = true
	r.stop()
	f := s.newFlow(r.Src(), r.Dst(), size)
	ep, err := s.answer(r.id, r.pkt, &f.wq, size)
	r.pkt.DecRef()
	r.pkt = nil
	ended := func(end splice.End, err error) {
		s.unhold(r)
		done(end, err)
	}
	if err != nil {
		f.release()
		s.reader.Post(func() { ended(nil, flowError("accept", err)) })
		return
	}
	f.ep = ep
	f.begin("accept", handshakeTimeout, ended)
}

// newSize takes a share of the budgets for one more flow, with buffers of smallest
// bytes at least, or returns 0.
func (s *Stack) newSize(smallest int64) int64 {
	if s.closed {
		return 0
	}
	if s.counters.flows.Load() >= int64(s.limits.Connections) {
		s.counters.limitConnections.Add(1)
		return 0
	}
	size := s.reserve(smallest)
	if size == 0 {
		s.counters.limitConnections.Add(1)
	}
	return size
}

// handshakeTimeout bounds how long a peer may leave a SYN-ACK unanswered.
const handshakeTimeout = 4 * time.Second

// enter puts an established flow into the table.
func (s *Stack) enter(f *Flow) {
	forgetHandshake(f.ep)
	f.establish()
	s.flows[f.key] = f
	f.queue.EventRegister(&f.entry)
}

// setKeepalive arms what finds out that the peer is gone.
func setKeepalive(ep *tcp.Endpoint, k *Keepalive) {
	if k.UserTimeout > 0 {
		timeout := tcpip.TCPUserTimeoutOption(k.UserTimeout)
		ep.SetSockOpt(&timeout)
	}
	if k.Off {
		return
	}
	idle, interval := tcpip.KeepaliveIdleOption(k.Idle), tcpip.KeepaliveIntervalOption(k.Interval)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, k.Count)
	ep.SocketOptions().SetKeepAlive(true)
}
