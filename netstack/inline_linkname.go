package netstack

import (
	"reflect"
	"unsafe" // also for go:linkname

	"gvisor.dev/gvisor/pkg/tcpip"
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

//go:linkname timeWaitTimerExpired gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).timeWaitTimerExpired
func timeWaitTimerExpired(e *tcp.Endpoint)

//go:linkname sendAck gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*sender).sendAck
func sendAck(unsafe.Pointer)

// senderAt is where an Endpoint keeps its sender, which has no exported name.
var senderAt = func() uintptr {
	f, ok := reflect.TypeFor[tcp.Endpoint]().FieldByName("snd")
	if !ok || f.Type.String() != "*tcp.sender" {
		panic("netstack: gVisor's Endpoint has no snd")
	}
	return f.Offset
}()

// senderOf returns e's sender, which a connected endpoint has.
func senderOf(e *tcp.Endpoint) unsafe.Pointer {
	return *(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(e), senderAt))
}

const allEvents = waiter.EventHUp | waiter.EventErr | waiter.ReadableEvents | waiter.WritableEvents

// finish handles what the batch queued for f, whose user lock the caller
// holds, and gives the lock back. It is handleConnected of gVisor's
// dispatcher.go, but for the pod leg: there the peer is the pod's
// own kernel, which is in order and loses nothing, and which reuses a source
// port at once; a TIME_WAIT there would swallow its SYN.
func (f *Flow) finish() {
	e := f.ep
	if !isConnected(e.EndpointState()) {
		e.UnlockUser()
		return
	}
	f.stack.link.handling.Store(f)
	err := handleSegmentsLocked(e)
	f.stack.link.handling.Store(nil)
	f.carried()
	if err != nil {
		resetConnectionLocked(e, err)
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

// isConnected is what gVisor's EndpointState.connected says of the states
// that handleConnected takes.
func isConnected(s tcp.EndpointState) bool {
	switch s {
	case tcp.StateEstablished, tcp.StateFinWait1, tcp.StateFinWait2, tcp.StateClosing, tcp.StateCloseWait, tcp.StateLastAck:
		return true
	}
	return false
}
