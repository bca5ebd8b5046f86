package netstack

import (
	"reflect"
	"time"
	"unsafe" // also for go:linkname

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// gVisor hands every segment to a processor goroutine of its own. Half of the
// CPU of a small request then goes into waking it (design.md section 3). We
// own every accept and dial, so the reader knows the endpoint a segment is
// for, holds its user lock over the batch, which makes gVisor queue the
// segment only, and then does what the processor would have done. The
// functions below are not exported; inline_test.go hashes the source of what
// finish mirrors, so that an upgrade of gVisor fails loudly.

//go:linkname handleSegmentsLocked gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).handleSegmentsLocked
func handleSegmentsLocked(e *tcp.Endpoint) tcpip.Error

//go:linkname resetConnectionLocked gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).resetConnectionLocked
func resetConnectionLocked(e *tcp.Endpoint, err tcpip.Error)

//go:linkname drainClosingSegmentQueue gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).drainClosingSegmentQueue
func drainClosingSegmentQueue(e *tcp.Endpoint)

//go:linkname startTimeWait gvisor.dev/gvisor/pkg/tcpip/transport/tcp.startTimeWait
func startTimeWait(e *tcp.Endpoint)

//go:linkname transitionToStateCloseLocked gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).transitionToStateCloseLocked
func transitionToStateCloseLocked(e *tcp.Endpoint)

//go:linkname setEndpointState gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).setEndpointState
func setEndpointState(e *tcp.Endpoint, state tcp.EndpointState)

//go:linkname timeWaitTimerExpired gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).timeWaitTimerExpired
func timeWaitTimerExpired(e *tcp.Endpoint)

//go:linkname sendAck gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*sender).sendAck
func sendAck(unsafe.Pointer)

//go:linkname sendData gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*sender).sendData
func sendData(unsafe.Pointer)

//go:linkname newIncomingSegment gvisor.dev/gvisor/pkg/tcpip/transport/tcp.newIncomingSegment
func newIncomingSegment(id stack.TransportEndpointID, clock tcpip.Clock, pkt *stack.PacketBuffer) (unsafe.Pointer, error)

//go:linkname parseSynSegmentOptions gvisor.dev/gvisor/pkg/tcpip/transport/tcp.parseSynSegmentOptions
func parseSynSegmentOptions(segment unsafe.Pointer) header.TCPSynOptions

//go:linkname decRef gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*segment).DecRef
func decRef(segment unsafe.Pointer)

//go:linkname startHandshake gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*listenContext).startHandshake
func startHandshake(listen, segment unsafe.Pointer, opts header.TCPSynOptions, q *waiter.Queue, owner tcpip.PacketOwner) (handshake unsafe.Pointer, err tcpip.Error)

//go:linkname processSegments gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*handshake).processSegments
func processSegments(handshake unsafe.Pointer) tcpip.Error

//go:linkname handshakeFailed gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).handshakeFailed
func handshakeFailed(e *tcp.Endpoint, err tcpip.Error)

// Where what has no exported name is, by the field's name.
var (
	senderType = fieldOf(reflect.TypeFor[tcp.Endpoint](), "snd").Type.Elem()

	senderAt    = offsetOf(reflect.TypeFor[tcp.Endpoint](), "snd", "*tcp.sender")
	handshakeAt = offsetOf(reflect.TypeFor[tcp.Endpoint](), "h", "*tcp.handshake")
	sackAt      = offsetOf(reflect.TypeFor[tcp.Endpoint](), "sack", "tcp.SACKInfo")
	stateAt     = offsetOf(senderType, "TCPSenderState", "tcp.TCPSenderState")
	finSentAt   = offsetOf(senderType, "finSent", "bool")
	rttAt       = offsetOf(senderType, "rtt", "tcp.rtt") + offsetOf(fieldOf(senderType, "rtt").Type, "TCPRTTState", "tcp.TCPRTTState")
	repeatedAt  = offsetOf(fieldOf(reflect.TypeFor[tcp.Endpoint](), "h").Type.Elem(), "sampleRTTWithTSOnly", "bool")
	listenAt    = offsetOf(reflect.TypeFor[tcp.Forwarder](), "listen", "*tcp.listenContext")
	endpointAt  = offsetOf(fieldOf(reflect.TypeFor[tcp.Endpoint](), "h").Type.Elem(), "ep", "*tcp.Endpoint")
)

func fieldOf(t reflect.Type, name string) reflect.StructField {
	f, ok := t.FieldByName(name)
	if !ok {
		panic("netstack: gVisor's " + t.String() + " has no " + name)
	}
	return f
}

func offsetOf(t reflect.Type, name, typ string) uintptr {
	f := fieldOf(t, name)
	if f.Type.String() != typ {
		panic("netstack: gVisor's " + t.String() + "." + name + " is a " + f.Type.String())
	}
	return f.Offset
}

// at returns the pointer that an object keeps at an offset.
func at(object unsafe.Pointer, offset uintptr) unsafe.Pointer {
	return *(*unsafe.Pointer)(unsafe.Add(object, offset))
}

// senderOf returns e's sender, which a connected endpoint has.
func senderOf(e *tcp.Endpoint) unsafe.Pointer { return at(unsafe.Pointer(e), senderAt) }

// sentOf returns what the sender of e knows of itself.
func sentOf(e *tcp.Endpoint) *tcp.TCPSenderState {
	return (*tcp.TCPSenderState)(unsafe.Add(senderOf(e), stateAt))
}

// finAcked says that the peer of e, which is locked, has our FIN, and so all
// that was sent.
func finAcked(e *tcp.Endpoint) bool {
	sent := sentOf(e)
	return *(*bool)(unsafe.Add(senderOf(e), finSentAt)) && sent.SndUna == sent.SndNxt
}

// mendWindow keeps all that e, which is locked, has sent within the window that
// it knows. gVisor takes the window of an old ACK that was overtaken; where that
// is less than a segment it sends nothing, now or at a timeout, and sets no timer.
// "The sender MAY also retransmit old data beyond SND.UNA+SND.WND" (RFC 9293
// section 3.8.6). A window of 0 is probed.
func mendWindow(e *tcp.Endpoint) {
	sent := sentOf(e)
	if flying := sent.SndUna.Size(sent.SndNxt); sent.SndWnd > 0 && sent.SndWnd < flying && int(sent.SndWnd) < sent.MaxPayloadSize {
		sent.SndWnd = flying
		if !sent.FastRecovery.Active {
			sendData(senderOf(e))
		}
	}
}

// sackOf returns what has come to e, which is locked, behind a hole.
func sackOf(e *tcp.Endpoint) []header.SACKBlock {
	s := (*tcp.SACKInfo)(unsafe.Add(unsafe.Pointer(e), sackAt))
	return s.Blocks[:s.NumBlocks]
}

// noSampleRTO is the RTO after a handshake that gave no sample: "If the timer
// expires awaiting the ACK of a SYN segment [...] the RTO MUST be re-initialized
// to 3 seconds when data transmission begins" (RFC 6298 section 5.7).
const noSampleRTO = 3 * time.Second

// forgetHandshake frees what an established connection, which has sent nothing
// yet, keeps of its handshake: 240 bytes. gVisor repeats a SYN with the timestamp
// of the first, so that what it takes for the round trip then contains the wait
// of a second and more, and it forgets that slowly: no sample is better.
func forgetHandshake(e *tcp.Endpoint) {
	e.LockUser()
	defer e.UnlockUser()
	h := at(unsafe.Pointer(e), handshakeAt)
	if h == nil {
		return
	}
	if *(*bool)(unsafe.Add(h, repeatedAt)) && isConnected(e.EndpointState()) {
		*(*tcp.TCPRTTState)(unsafe.Add(senderOf(e), rttAt)) = tcp.TCPRTTState{}
		sent := sentOf(e)
		sent.RTTState, sent.RTO = tcp.TCPRTTState{}, noSampleRTO
	}
	*(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(e), handshakeAt)) = nil
}

// answer sends the SYN-ACK for a SYN and returns the endpoint, which is
// connecting and has a receive buffer of size bytes. It is CreateEndpoint of
// gVisor's forwarder.go and accept.go, but for the goroutine that would wait for
// the app's ACK.
func (s *Stack) answer(id stack.TransportEndpointID, syn *stack.PacketBuffer, q *waiter.Queue, size int64) (*tcp.Endpoint, tcpip.Error) {
	segment, err := newIncomingSegment(id, s.gv.Clock(), syn)
	if err != nil {
		return nil, &tcpip.ErrMalformedHeader{}
	}
	defer decRef(segment)
	h, e := startHandshake(at(unsafe.Pointer(s.forwarder(size)), listenAt), segment, parseSynSegmentOptions(segment), q, nil)
	if e != nil {
		return nil, e
	}
	return (*tcp.Endpoint)(at(h, endpointAt)), nil
}

const allEvents = waiter.EventHUp | waiter.EventErr | waiter.ReadableEvents | waiter.WritableEvents

// finish handles what the batch queued for f, whose user lock the caller
// holds, and gives the lock back. It is handleConnecting and handleConnected of gVisor's
// dispatcher.go, but for the pod leg: there the peer is the pod's
// own kernel, which is in order and loses nothing, and which reuses a source
// port at once; a TIME_WAIT there would swallow its SYN.
func (f *Flow) finish() {
	e := f.ep
	if isConnecting(e.EndpointState()) {
		// handleConnecting, of an endpoint without a listener.
		if err := processSegments(at(unsafe.Pointer(e), handshakeAt)); err != nil {
			handshakeFailed(e, err)
			e.UnlockUser()
			drainClosingSegmentQueue(e)
			f.queue.Notify(allEvents)
			return
		}
	}
	if !isConnected(e.EndpointState()) {
		e.UnlockUser()
		return
	}
	f.stack.link.handling.Store(f)
	err := handleSegmentsLocked(e)
	f.stack.link.handling.Store(nil)
	f.carried()
	if err == nil {
		mendWindow(e)
	}
	if err != nil {
		resetConnectionLocked(e, err)
	} else if e.EndpointState() == tcp.StateClosing && finAcked(e) {
		// gVisor ends CLOSING at the segment that acknowledges our FIN, but not
		// where that one overtook the peer's: nobody sends any more then.
		setEndpointState(e, tcp.StateTimeWait)
	}
	switch state := e.EndpointState(); {
	case err != nil || state == tcp.StateClose:
		e.UnlockUser()
		drainClosingSegmentQueue(e)
		f.queue.Notify(allEvents)
	case state == tcp.StateTimeWait && f.local:
		// What timeWaitTimerExpired does, under the same lock: what is left in the
		// queue, a FIN that came twice, would go to gVisor's processor with the
		// lock, which counts on the timer that startTimeWait sets, and panics.
		transitionToStateCloseLocked(e)
		e.UnlockUser()
		drainClosingSegmentQueue(e)
		f.queue.Notify(allEvents)
	case state == tcp.StateTimeWait:
		startTimeWait(e)
		e.UnlockUser()
	default:
		e.UnlockUser()
	}
}

// isConnecting is what gVisor's EndpointState.connecting says.
func isConnecting(s tcp.EndpointState) bool {
	return s == tcp.StateConnecting || s == tcp.StateSynSent || s == tcp.StateSynRecv
}

// isConnected is what gVisor's EndpointState.connected says of the states
// that handleConnected takes.
func isConnected(s tcp.EndpointState) bool {
	switch s {
	case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateClosing, tcp.StateCloseWait, tcp.StateLastAck:
		return true
	}
	return false
}
