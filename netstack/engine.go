// Package netstack terminates the TCP of pods. An Engine has a few readers;
// each owns the devices and gVisor stacks of many pods and runs each packet to
// completion: what arrives on a device is read in batches, handled by the
// stack, moved by whatever runs on the reader's Loop, and written to a device,
// all on one thread and without waking another.
//
// A SYN becomes a Request that must be accepted or refused exactly once; no
// SYN-ACK leaves before. Established flows are splice.Ends that never block.
// Nothing here knows what a flow is for.
//
// # How a packet travels
//
//  1. reader.wait: the thread waits for its devices (wait_linux.go).
//  2. Stack.turn: up to 32 packets are read (turn.go); each is parsed
//     (packet.go), forwarded at L3, dropped, or given to the pod's gVisor stack.
//  3. A segment of an established flow is only queued by gVisor, since the
//     reader holds the endpoint's lock; after the batch finish handles all of
//     them at once (inline_linkname.go).
//  4. Endpoints that changed wake their Flow (flow.go), which runs what its
//     owner set with Notify: the splice reads, the tunnel encrypts.
//  5. At the end of the pass the tunnels flush; gVisor hands the segments to
//     link.WritePackets (link.go), one writev each.
//
// # What it needs of Linux and Go
//
// Package tun says what a device may lack and what is done then; an Engine
// logs each lack once. The rest is always there, or its absence is noticed
// before anything runs:
//
//	epoll_pwait, eventfd2,   Linux 2.6.32 at most; Go itself needs 3.2, and
//	SO_DOMAIN                its poller the first two
//	raw ICMP sockets         may be left out (StackConfig.ICMP)
//	raw system calls do not  else a wait costs more CPU: no other harm
//	tell Go's scheduler
//	a function's prologue    TestReadersDoNotHoldUpTheCollector fails without
//	lets the collector in
//	linknames into gVisor    where Go refuses them, or gVisor has no such
//	                         function, the build fails; where gVisor changed
//	                         one, TestMirroredFunctionsAreUnchanged does
//
// # Concurrency
//
// Handler methods, Request, Flow and Dial belong to the stack's Loop. Add,
// Close and Loop.Post may be called from anywhere. A loop runs on one thread at
// a time: its reader's, or, while that sleeps, on another's that has work for it
// (help.go).
package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tunnel/splice"
)

// TunnelPort is where a pod's stack accepts HBONE.
const TunnelPort = 15008

// Config configures an Engine.
type Config struct {
	// Readers is the number of reader threads. Default: GOMAXPROCS-2, at least 1.
	// GOMAXPROCS has to be at least Readers+2: a reader that waits briefly does
	// so without telling the scheduler, and keeps its processor.
	Readers int
	// Memory bounds the buffers that all flows together may come to hold, in
	// bytes; capacity counts, not use. Default 4 GiB.
	Memory int64
	// Keepalive of every flow.
	Keepalive Keepalive
	// TCP is how losses are found and answered.
	TCP TCP
	// Failed is told, from a goroutine of its own, that a reader cannot wait for its
	// devices any more and has closed its stacks. The process should end: the pods'
	// devices are read by nobody. May be nil.
	Failed func(error)
	// Log takes what a human needs to know. Default: nothing.
	Log *slog.Logger
}

// Keepalive says how a peer that vanished is found out (facts/ztunnel.md
// section 14). Zero fields take their defaults.
type Keepalive struct {
	// Off sends no probes.
	Off bool
	// Idle is the silence before the first probe, Interval that between
	// probes. Default 180 s each.
	Idle, Interval time.Duration
	// Count is the number of probes without an answer. Default 9.
	Count int
	// UserTimeout bounds how long sent data may stay unacknowledged; 0: the
	// stack's own retransmission limit.
	UserTimeout time.Duration
}

func (k Keepalive) withDefaults() Keepalive {
	if k.Idle == 0 {
		k.Idle = 180 * time.Second
	}
	if k.Interval == 0 {
		k.Interval = 180 * time.Second
	}
	if k.Count == 0 {
		k.Count = 9
	}
	return k
}

// Tuple is a TCP connection as the pod sees it.
type Tuple struct{ Local, Remote netip.AddrPort }

// StackConfig describes one pod.
type StackConfig struct {
	// Name is for logs: namespace/pod.
	Name string
	// Addrs are the pod's addresses; at least one.
	Addrs []netip.Addr
	// Families are addresses of whatever IP versions Update may bring, besides
	// those of Addrs. Each version takes memory, and none can be added later.
	Families []netip.Addr
	// BypassInbound forwards plaintext inbound connections at L3.
	BypassInbound bool
	// VirtualInterfaces lets packets through whose addresses are not the pod's:
	// they come from a bridge or virtual machine inside and are outbound.
	VirtualInterfaces bool
	// CaptureDNS hands datagrams to port 53 to the Handler; otherwise they are
	// forwarded at L3.
	CaptureDNS bool
	// Older are the connections that were established when the pod was
	// attached. They are forwarded at L3 until they end.
	Older []Tuple
	// ICMP are raw ICMP and ICMPv6 sockets of the pod's namespace, from which
	// errors about the stack's connections are read; the Stack owns them once
	// Add has succeeded. Without them an unreachable host looks like one that
	// does not answer, and a path MTU below the interface's is not learnt.
	ICMP []*os.File
	// Predecessor is a packet socket to the proxy that read the device before and
	// still has flows; nil: there is none. What belongs to no flow of this stack
	// goes there (handover.go). The Stack owns it once Add has succeeded.
	Predecessor *os.File
	// PortPart, 1 to PortParts, is the part of the ephemeral ports that dials take
	// first: two proxies that both have flows of the pod must not dial the same
	// peer from the same port. 0: any port.
	PortPart int
	// Resumed is called on the loop when the stack reads the device again, which
	// it had yielded (Stack.Yield). May be nil.
	Resumed func()
	// Limits of this pod; zero fields take their defaults.
	Limits Limits
	// IsProbe asks whether an inbound plaintext connection is the kubelet's and is
	// to be forwarded at L3. It reports false for one that cannot be. Else it
	// calls answer once, whenever it knows and from anywhere; until then the SYN
	// is held like a Request. Called on the loop, must not block. May be nil.
	IsProbe func(src, dst netip.AddrPort, answer func(bool)) (asked bool)
	// Gone is called on the loop, once, when the device cannot be read any
	// more. May be nil.
	Gone func(error)
}

// Handler answers what a pod's stack asks. Its methods run on the stack's
// Loop and must not block.
type Handler interface {
	// HandleTCP takes a connection that an app of the pod opens (outbound) or
	// that somebody opens to the pod in plaintext (inbound).
	HandleTCP(*Request)
	// HandleTunnel takes a connection accepted on the pod's TunnelPort.
	HandleTunnel(end splice.End, remote, local netip.AddrPort)
	// HandleUDP takes a captured datagram.
	HandleUDP(*Datagram)
}

// Engine runs the stacks of all pods of a node.
type Engine struct {
	cfg     Config
	readers []*reader
	log     *slog.Logger
	// reserved is the buffer capacity of all flows, in bytes.
	reserved atomic.Int64
	// lacks has a bit for each tun.Feature whose absence was logged.
	lacks atomic.Uint32

	// mu guards the fields below.
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup // readers, and stacks that end
}

// New starts the readers.
func New(cfg Config) (*Engine, error) {
	if cfg.Readers == 0 {
		cfg.Readers = max(1, runtime.GOMAXPROCS(0)-2)
	}
	if cfg.Readers < 0 || cfg.Readers > 1024 {
		return nil, fmt.Errorf("netstack: %d readers", cfg.Readers)
	}
	if cfg.Memory == 0 {
		cfg.Memory = 4 << 30
	}
	cfg.Keepalive = cfg.Keepalive.withDefaults()
	cfg.TCP = cfg.TCP.withDefaults()
	if err := cfg.TCP.validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Engine{cfg: cfg, log: cfg.Log}
	if procs := runtime.GOMAXPROCS(0); procs < cfg.Readers+2 {
		e.log.Warn("too few processors for the readers: other goroutines will have to wait", "GOMAXPROCS", procs, "readers", cfg.Readers)
	}
	for i := range cfg.Readers {
		r, err := newReader(e, i)
		if err != nil {
			e.Close()
			return nil, err
		}
		e.readers = append(e.readers, r)
		e.wg.Go(r.run)
	}
	return e, nil
}

// Close ends every stack and waits for the readers.
func (e *Engine) Close() {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	for _, r := range e.readers {
		r.close()
	}
	e.wg.Wait()
}

// Add makes a stack for the pod behind dev and starts to read. What waits in
// the device is dropped: it was sent to somebody else, and TCP sends it again.
// serve makes the Handler, given the Stack it is for, before anything is read.
// The Stack owns dev once Add has succeeded.
func (e *Engine) Add(dev *tun.Device, cfg StackConfig, serve func(*Stack) (Handler, error)) (*Stack, error) {
	if len(cfg.Addrs) == 0 {
		return nil, fmt.Errorf("netstack: pod %s has no address", cfg.Name)
	}
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil, errors.New("netstack: engine is closed")
	}
	e.mu.Unlock()
	r := e.leastLoaded()
	s, err := newStack(r, dev, cfg)
	if err == nil {
		if s.handler, err = serve(s); err != nil {
			s.gv.Destroy()
		}
	}
	if err != nil {
		r.pods.Add(-1)
		return nil, err
	}
	done := make(chan error, 1)
	r.Post(func() { done <- r.add(s) })
	select {
	case err = <-done:
	case <-r.done:
		err = errors.New("netstack: engine is closed")
	}
	if err != nil {
		s.gv.Destroy()
		return nil, err
	}
	return s, nil
}

// leastLoaded picks the reader with the fewest pods.
func (e *Engine) leastLoaded() *reader {
	best := e.readers[0]
	for _, r := range e.readers[1:] {
		if r.pods.Load() < best.pods.Load() {
			best = r
		}
	}
	best.pods.Add(1)
	return best
}
