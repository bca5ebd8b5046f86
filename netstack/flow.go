package netstack

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/ztun/ztun/tunnel/splice"
)

var errClosed = errors.New("netstack: stack is closed")

// A Flow is one TCP connection of a pod's stack, as a splice.End. Its methods
// run on the stack's Loop.
type Flow struct {
	// Set when the flow is made, read-only after.
	stack *Stack
	ep    *tcp.Endpoint
	queue *waiter.Queue // the endpoint's; wq, but for a listener's
	wq    waiter.Queue
	entry waiter.Entry
	key   tuple // as packets from the peer show it
	local bool  // the peer is the pod's own kernel: the app leg
	size  int64 // buffer capacity reserved for one direction

	queued atomic.Bool   // in the reader's wakers
	acked  atomic.Uint32 // the last that a packet of ours acknowledged
	// reading: the loop is in gVisor's Read. Goroutines of gVisor's that send for
	// the flow meanwhile look at it.
	reading atomic.Bool

	// Owned by the loop.
	locked            bool // this batch holds the endpoint's lock
	notify            func()
	opening           *opening // while its handshake is under way
	wroteFIN, readFIN bool
	over              bool // Close or Reset was called
	released          bool // no longer counts
	ack               ackState
	burst             int64 // bytes read since there was nothing to read
	moved             int64 // bytes read or written since the buffers last grew
}

var (
	_ splice.End    = (*Flow)(nil)
	_ splice.Failer = (*Flow)(nil)
)

// newFlow makes a Flow with no endpoint yet. peer and own are the ends as the
// peer's packets show them.
func (s *Stack) newFlow(peer, own netip.AddrPort, size int64) *Flow {
	f := &Flow{stack: s, key: tupleOf(peer, own), size: size}
	f.queue = &f.wq
	f.local = s.isPod(f.key.src)
	f.entry.Init((*flowEvents)(f), allEvents)
	s.counters.flows.Add(1)
	return f
}

// Remote is the peer's address, Local ours: the one the peer sees.
func (f *Flow) Remote() netip.AddrPort { return f.key.source() }
func (f *Flow) Local() netip.AddrPort  { return f.key.destination() }

// flowEvents is a Flow as gVisor's listener: a function would take 48 bytes more.
type flowEvents Flow

func (f *flowEvents) NotifyEvent(waiter.EventMask) { (*Flow)(f).changed() }

// changed is gVisor's call that something happened. It comes from any
// goroutine, with locks held.
func (f *Flow) changed() {
	if !f.queued.Swap(true) {
		f.stack.reader.ready(f)
	}
}

// woken runs on the loop after changed.
func (f *Flow) woken() {
	f.queued.Store(false)
	if f.opening != nil {
		f.opening.progress()
		return
	}
	if f.over {
		f.leave()
		return
	}
	if f.notify != nil {
		f.notify()
	}
}

// establish sets a connection up whose handshake is complete.
func (f *Flow) establish() {
	f.ep.SocketOptions().SetDelayOption(false)
	f.stack.reader.engine.cfg.TCP.control(f.ep, f.local)
	setKeepalive(f.ep, &f.stack.reader.engine.cfg.Keepalive)
	if !f.local {
		// Also where ICMP is read (StackConfig.ICMP): not every router sends it,
		// and a path that takes smaller packets may cut these. No router is on
		// the way to the app, and a packet that is not to be cut needs no ID.
		f.ep.SetSockOptInt(tcpip.MTUDiscoverOption, int(tcpip.PMTUDiscoveryDont))
	}
	f.resize()
}

// lock makes gVisor queue the flow's segments until the batch is finished.
func (f *Flow) lock() {
	f.ep.LockUser()
	f.locked = true
	f.stack.reader.locked = append(f.stack.reader.locked, f)
}

// pastEnd reports that a SYN came for a connection that is over but for
// TIME_WAIT, and ends it, so that the SYN starts a new one.
func (f *Flow) pastEnd(p *packet) bool {
	if !p.isSYN() || f.opening != nil {
		return false
	}
	if f.locked {
		// What ends the connection may be in this very batch.
		f.stack.finishBatch()
	}
	switch f.ep.EndpointState() {
	case tcp.StateTimeWait:
		timeWaitTimerExpired(f.ep)
	case tcp.StateClose, tcp.StateError:
	default:
		return false
	}
	f.drop()
	return true
}

// Read implements splice.End.
func (f *Flow) Read(p []byte) (int, error) {
	sink := &f.stack.reader.sink
	*sink = p
	f.stack.link.writing.Store(f) // It may tell that the window is open again.
	f.reading.Store(true)
	res, err := f.ep.Read(sink, tcpip.ReadOptions{})
	f.reading.Store(false)
	f.stack.link.writing.Store(nil)
	f.carried()
	*sink = nil
	if err == nil {
		// The window is half the buffer: it was about full. However little is
		// asked for at a time, what comes at once counts.
		f.moved += int64(res.Count)
		if f.burst += int64(res.Count); f.burst >= f.size/4 {
			f.grow()
		}
		return res.Count, nil
	}
	switch err.(type) {
	case *tcpip.ErrWouldBlock:
		f.burst = 0
		return 0, splice.ErrAgain
	case *tcpip.ErrClosedForReceive:
		if err := f.Failure(); err != nil {
			return 0, err
		}
		f.readFIN = true
		return 0, io.EOF
	}
	return 0, flowError("read", err)
}

// Write implements splice.End.
func (f *Flow) Write(p []byte) (int, error) {
	source := &f.stack.reader.source
	defer source.Reset(nil)
	f.speaks()
	done := 0
	for done < len(p) {
		source.Reset(p[done:])
		f.stack.link.writing.Store(f)
		n, err := f.ep.Write(source, tcpip.WriteOptions{})
		f.stack.link.writing.Store(nil)
		f.carried()
		done += int(n)
		f.moved += n
		switch err.(type) {
		case nil:
			if n == 0 {
				return done, splice.ErrAgain
			}
		case *tcpip.ErrWouldBlock:
			if f.grow() {
				continue
			}
			return done, splice.ErrAgain
		case *tcpip.ErrClosedForSend:
			if f.wroteFIN {
				return done, io.ErrClosedPipe
			}
			return done, fmt.Errorf("netstack: write: %w", splice.ErrReset)
		default:
			return done, flowError("write", err)
		}
	}
	return done, nil
}

// Failure implements splice.Failer: it returns the error that ended the
// connection, nil while it lives or after a clean end.
func (f *Flow) Failure() error {
	switch f.ep.EndpointState() {
	case tcp.StateError:
		if _, err := f.ep.Write(&f.stack.reader.source, tcpip.WriteOptions{}); err != nil {
			return flowError("connection", err)
		}
	case tcp.StateClose:
		// gVisor keeps a RST that comes after the peer's FIN to itself.
		if !f.wroteFIN {
			return fmt.Errorf("netstack: %w", splice.ErrReset)
		}
	}
	return nil
}

// CloseWrite implements splice.End: it sends a FIN behind what was written.
func (f *Flow) CloseWrite() error {
	if f.wroteFIN {
		return nil
	}
	f.wroteFIN = true
	f.stack.link.writing.Store(f)
	err := f.ep.Shutdown(tcpip.ShutdownWrite)
	f.stack.link.writing.Store(nil)
	f.carried()
	if err != nil {
		return flowError("close", err)
	}
	return nil
}

// Reset implements splice.End: it sends a RST.
func (f *Flow) Reset(error) {
	if f.over {
		return
	}
	f.over = true
	f.ack.answer, f.ack.soon = 0, false
	f.ep.Abort()
	f.leave()
}

// Close implements splice.End.
func (f *Flow) Close() {
	if f.over {
		return
	}
	if !f.wroteFIN || !f.readFIN {
		f.Reset(nil)
		return
	}
	f.over = true
	f.ep.Close()
	f.leave()
}

// Notify implements splice.End.
func (f *Flow) Notify(ready func()) {
	f.notify = ready
	f.changed()
}

// leave takes the flow out of the table once its endpoint is through; until
// then its last segments are handled here.
func (f *Flow) leave() {
	switch f.ep.EndpointState() {
	case tcp.StateClose, tcp.StateError:
		f.drop()
	case tcp.StateTimeWait:
		if !f.released {
			f.release()
			f.stack.holdTimeWait(f)
		}
	}
}

// maxTimeWait bounds the endpoints in TIME_WAIT of one pod; beyond it the
// oldest ends early, as tcp_max_tw_buckets does.
const maxTimeWait = 1024

// holdTimeWait keeps f, which only waits for TIME_WAIT to end.
func (s *Stack) holdTimeWait(f *Flow) {
	s.timeWaits = append(s.timeWaits, f)
	if len(s.timeWaits) > maxTimeWait {
		oldest := s.timeWaits[0]
		s.timeWaits[0] = nil
		s.timeWaits = s.timeWaits[1:]
		timeWaitTimerExpired(oldest.ep)
		oldest.drop()
	}
}

// drop forgets the flow.
func (f *Flow) drop() {
	if f.stack.flows[f.key] == f {
		delete(f.stack.flows, f.key)
	}
	f.ack.answer, f.ack.soon = 0, false
	if f.over {
		f.queue.EventUnregister(&f.entry)
		f.notify = nil
	}
	f.release()
}

// release gives the flow's share of the budgets back.
func (f *Flow) release() {
	if f.released {
		return
	}
	f.released = true
	f.stack.take(-2 * f.size)
	f.stack.counters.flows.Add(-1)
}

// flowError translates gVisor's error into the ones the rest understands:
// splice.ErrReset, or a syscall.Errno.
func flowError(op string, err tcpip.Error) error {
	var e error
	switch err.(type) {
	case *tcpip.ErrConnectionReset, *tcpip.ErrConnectionAborted, *tcpip.ErrAborted, *tcpip.ErrClosedForSend:
		e = splice.ErrReset
	case *tcpip.ErrConnectionRefused:
		e = syscall.ECONNREFUSED
	case *tcpip.ErrTimeout:
		e = syscall.ETIMEDOUT
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		e = syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable, *tcpip.ErrNoNet:
		e = syscall.ENETUNREACH
	case *tcpip.ErrPortInUse, *tcpip.ErrBadLocalAddress, *tcpip.ErrNoPortAvailable:
		e = syscall.EADDRINUSE
	default:
		return fmt.Errorf("netstack: %s: %s", op, err)
	}
	return fmt.Errorf("netstack: %s: %w", op, e)
}
