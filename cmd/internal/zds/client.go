package zds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// exchange bounds each message and each answer, on both sides.
	exchange = 5 * time.Second
	// startRetry is how often a pod that could not be started is tried again.
	startRetry = 5 * time.Second
	// maxPods bounds what one agent can make a proxy hold.
	maxPods = 4096

	connectBackoffMin  = 20 * time.Millisecond
	announceBackoffMin = 500 * time.Millisecond
	backoffMax         = 15 * time.Second
)

// A Starter runs the proxies of pods. Its methods are called by one goroutine
// at a time and must return within a few seconds.
type Starter interface {
	// Start serves a pod on its files, which it owns from now on, also when it
	// fails.
	Start(w Workload, files Files) (Proxy, error)
}

// A Proxy serves one pod.
type Proxy interface {
	// Stop cuts what the pod has open, and returns once nobody reads the
	// device any more. It closes the files.
	Stop()
}

// A Yielder is a Proxy that can be replaced by another process' without a cut.
// ClientConfig.Yields says that all are.
type Yielder interface {
	Proxy
	// Yield returns once nobody of this process reads the device any more; what
	// it would have read comes from packets, which it owns unless there is an
	// error. When that is closed at its other end the device is read again.
	Yield(packets *os.File) error
	// Predecessor returns another descriptor of Files.Predecessor, or nil if that
	// one has ended.
	Predecessor() *os.File
	// Lend returns other descriptors of the device and the ICMP sockets if the
	// proxy reads the device, or none. yielded says that it will read it again
	// when its successor ends.
	Lend() (f Files, yielded bool, err error)
}

// An Updater is a Proxy that takes a change of its pod without a cut.
type Updater interface {
	Proxy
	// Update serves the pod as w says from now on; its device is the same. After an
	// error nothing has changed, and the pod is started again.
	Update(w Workload) error
}

// ClientConfig is what a Client needs. The zero value of a field is the
// default named on it.
type ClientConfig struct {
	Socket  string // Where the agent listens. Required.
	Starter Starter
	// Yields says that all that Starter starts are Yielders.
	Yields bool
	// Ready is told whether every pod of a complete snapshot is served. It
	// starts as not ready, and stays what it is while there is no agent: its pods go
	// on, and a rolling update deletes a proxy that is not ready before the next one
	// has its pods. Nil: nobody is told.
	Ready func(bool)
	// Log. Nil: nothing is logged.
	Log *slog.Logger
}

// A Client keeps the proxies of a node's pods as the node agent wants them.
// They go on while the agent is away.
type Client struct {
	cfg   ClientConfig
	retry time.Duration // startRetry, or what tests say.

	// Owned by Run.
	snapshot map[string]struct{} // UIDs named since the hello; nil after the snapshot.
	ready    bool
	retryAt  time.Time
	part     int // Of the ports, as the agent said; 0: it has not.

	started uint64 // Nanoseconds since boot.

	// mu guards the fields below. Only Run changes them.
	mu      sync.Mutex
	running map[string]runningPod
	pending map[string]pendingPod
	stats   ClientStats
	leaving bool
	conn    *net.UnixConn // As long as the agent thinks that we stay.
}

type runningPod struct {
	workload Workload
	proxy    Proxy
}

// pendingPod could not be started, and is tried again while we are connected.
type pendingPod struct {
	workload Workload
	files    Files
	err      error
}

// ClientStats counts over the life of a Client.
type ClientStats struct {
	Active, Pending  int
	Started, Stopped uint64
	Connected        bool   // To an agent, now.
	Connections      uint64 // With an agent that took our hello.
	ProtocolErrors   uint64
}

// PodStatus tells of one pod.
type PodStatus struct {
	Workload Workload
	Proxy    Proxy // nil while pending.
	Err      error // Why it is pending.
}

// NewClient makes a client. Run starts it.
func NewClient(cfg ClientConfig) *Client {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Ready == nil {
		cfg.Ready = func(bool) {}
	}
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // It cannot fail.
	return &Client{cfg: cfg, retry: startRetry, started: uint64(now.Nano()), running: map[string]runningPod{}, pending: map[string]pendingPod{}}
}

// Stats returns the counts as they are now.
func (c *Client) Stats() ClientStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Active, s.Pending = len(c.running), len(c.pending)
	return s
}

// Pods tells of every pod, in the order of their UIDs.
func (c *Client) Pods() []PodStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []PodStatus
	for uid, p := range c.pending {
		if _, ok := c.running[uid]; !ok {
			out = append(out, PodStatus{Workload: p.workload, Err: p.err})
		}
	}
	for _, p := range c.running {
		out = append(out, PodStatus{Workload: p.workload, Proxy: p.proxy})
	}
	slices.SortFunc(out, func(a, b PodStatus) int { return strings.Compare(a.Workload.UID, b.Workload.UID) })
	return out
}

// Run connects to the agent, again whenever the connection is lost, and obeys
// it until ctx ends. The pods that are running then are the caller's to stop;
// Pods names them.
func (c *Client) Run(ctx context.Context) error {
	connect, announce := backoff{min: connectBackoffMin}, backoff{min: announceBackoffMin}
	defer c.dropPending()
	for ctx.Err() == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unixpacket", c.cfg.Socket)
		if err != nil {
			if connect.waits() == 1 && ctx.Err() == nil {
				c.cfg.Log.Warn("node agent cannot be reached; trying on", "socket", c.cfg.Socket, "error", err)
			}
			connect.wait(ctx)
			continue
		}
		connect.reset()
		wasReady, err := c.serve(ctx, conn.(*net.UnixConn))
		if ctx.Err() != nil {
			break
		}
		c.cfg.Log.Warn("connection to the node agent ended; pods go on as they are", "error", err)
		if wasReady {
			announce.reset()
			continue
		}
		announce.wait(ctx) // An agent that hangs up at once is not asked in a loop.
	}
	return context.Cause(ctx)
}

// serve runs one connection. It returns whether the snapshot was complete.
func (c *Client) serve(ctx context.Context, conn *net.UnixConn) (complete bool, err error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer conn.Close()

	h := hello{}
	if c.cfg.Yields {
		h = hello{ztun: true, started: c.started, leaving: c.begun(conn), part: c.part}
	}
	msg, err := encodeHello(h)
	if err != nil {
		return false, err
	}
	if err := send(conn, msg, nil, time.Now().Add(exchange)); err != nil {
		return false, fmt.Errorf("zds: announce: %w", err)
	}
	c.begin()
	defer c.end()
	buf := make([]byte, maxPacket)
	for {
		msg, files, err := c.next(conn, buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			c.retryPending()
			continue
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
			return c.snapshot == nil, io.EOF
		case errors.Is(err, errTruncated), errors.Is(err, errFiles):
			return false, c.protocolError(conn, err)
		case err != nil:
			return c.snapshot == nil, fmt.Errorf("zds: read: %w", err)
		}
		req, err := decodeRequest(msg)
		if err == nil {
			err = c.check(req, len(files))
		}
		if err != nil {
			closeAll(files)
			return false, c.protocolError(conn, err)
		}
		if err := c.answer(conn, req, filesOf(files, req.predecessor)); err != nil {
			return c.snapshot == nil, err
		}
		c.tellReady()
	}
}

// next reads one message; while pods are pending, no longer than until they
// are to be tried again.
func (c *Client) next(conn *net.UnixConn, buf []byte) ([]byte, []*os.File, error) {
	deadline := time.Time{}
	if len(c.pending) > 0 {
		deadline = c.retryAt
	}
	if err := conn.SetReadDeadline(deadline); err != nil {
		return nil, nil, err
	}
	if c.isLeaving() && c.isOpen(conn) {
		return nil, nil, net.ErrClosed
	}
	return receive(conn, buf)
}

// answer obeys a request and says so.
func (c *Client) answer(conn *net.UnixConn, req request, files Files) error {
	problem := c.obey(req, files)
	if problem != nil || !req.lend {
		return reply(conn, problem, holding{}, Files{})
	}
	h, lent, err := c.lend(req.workload.UID)
	defer lent.Close()
	return reply(conn, err, h, lent)
}

// lend says what we have of a pod, and returns it.
func (c *Client) lend(uid string) (h holding, lent Files, err error) {
	p := c.running[uid]
	y, ok := p.proxy.(Yielder)
	if !ok || p.workload.Device == nil || p.workload.Device.ID == "" {
		return h, lent, nil
	}
	lent, h.yielded, err = y.Lend()
	if lent.Device != nil {
		h.reads, h.icmp = true, len(lent.ICMP)
		h.deviceID, h.offload = p.workload.Device.ID, p.workload.Device.Offload
	}
	return h, lent, err
}

func reply(conn *net.UnixConn, problem error, h holding, lent Files) error {
	r := response{holding: h}
	if problem != nil {
		r, lent = response{text: problem.Error()}, Files{}
	}
	msg, err := encodeResponse(r)
	if err == nil {
		err = send(conn, msg, lent.list(), time.Now().Add(exchange))
	}
	if err != nil {
		return fmt.Errorf("zds: answer: %w", err)
	}
	return nil
}

// protocolError answers with what is wrong. The caller closes the connection:
// a new one starts from a clean slate, and the pods never notice.
func (c *Client) protocolError(conn *net.UnixConn, problem error) error {
	c.mu.Lock()
	c.stats.ProtocolErrors++
	c.mu.Unlock()
	_ = reply(conn, problem, holding{}, Files{})
	return problem
}

// begin forgets what an earlier connection said; running pods stay.
func (c *Client) begin() {
	c.dropPending()
	c.snapshot = map[string]struct{}{}
	c.mu.Lock()
	c.stats.Connections++
	c.stats.Connected = true
	c.mu.Unlock()
}

func (c *Client) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Connected = false
}

func (c *Client) tellReady() {
	if c.snapshot != nil {
		return // What the last one said holds.
	}
	ready := len(c.pending) == 0
	if ready != c.ready {
		c.ready = ready
		c.cfg.Ready(ready)
	}
}

// check finds what breaks the protocol before anything is done.
func (c *Client) check(r request, files int) error {
	switch {
	case files != r.files():
		return fmt.Errorf("zds: %v %s with %d descriptors, not %d", r.kind, r.workload.UID, files, r.files())
	case c.snapshot == nil && (r.kind == kindKeep || r.kind == kindSnapshotSent):
		return fmt.Errorf("zds: %v after the snapshot", r.kind)
	}
	return nil
}

// obey does what a request asks. An error is for the agent; the connection
// stays.
func (c *Client) obey(r request, files Files) error {
	uid := r.workload.UID
	switch r.kind {
	case kindAdd:
		if r.part > 0 {
			c.part = r.part
			r.workload.Device.PortPart = r.part
		}
		if len(c.running)+len(c.pending) >= maxPods && !c.knows(uid) {
			files.Close()
			return fmt.Errorf("zds: more than %d pods", maxPods)
		}
		c.name(uid)
		return c.add(r.workload, files)
	case kindYield:
		return c.yield(uid, files.Device)
	case kindKeep:
		c.name(uid)
	case kindDel:
		delete(c.snapshot, uid)
		c.forgetPending(uid)
		if c.snapshot == nil {
			c.stop(uid)
		} // Else the end of the snapshot stops it.
	case kindSnapshotSent:
		for uid := range c.running {
			if _, ok := c.snapshot[uid]; !ok {
				c.stop(uid)
			}
		}
		c.snapshot = nil
	}
	return nil
}

func (c *Client) knows(uid string) bool {
	_, running := c.running[uid]
	_, pending := c.pending[uid]
	return running || pending
}

var errLeaving = errors.New("zds: the proxy is about to end")

// Leave tells the agent that the process is about to end: it is given no more
// pods, and yields those that it has as soon as another proxy can take them.
// Run goes on. It may be called from anywhere.
func (c *Client) Leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaving = true
	if c.conn != nil {
		// Only a hello says so. A request that is being obeyed is answered before:
		// the agent would take back what it asked for.
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// begun notes the connection and reports whether the process is about to end.
func (c *Client) begun(conn *net.UnixConn) (leaving bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving {
		c.conn = nil
	} else {
		c.conn = conn
	}
	return c.leaving
}

// isOpen reports whether the agent thinks of conn that we stay.
func (c *Client) isOpen(conn *net.UnixConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn == conn
}

func (c *Client) isLeaving() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.leaving
}

// yield lets another process read the pod's device. It owns packets.
func (c *Client) yield(uid string, packets *os.File) error {
	p, ok := c.running[uid]
	if !ok {
		c.forgetPending(uid) // Nobody has begun to read it.
		_ = packets.Close()
		return nil
	}
	y, ok := p.proxy.(Yielder)
	if !ok {
		_ = packets.Close()
		return errors.New("zds: the pod's proxy cannot yield")
	}
	if err := y.Yield(packets); err != nil {
		_ = packets.Close()
		return err
	}
	c.cfg.Log.Info("pod's new connections are another proxy's", "pod", p.workload.Namespace+"/"+p.workload.Name, "uid", uid)
	return nil
}

// name puts uid into the snapshot, while there is one.
func (c *Client) name(uid string) {
	if c.snapshot != nil {
		c.snapshot[uid] = struct{}{}
	}
}

// backoff doubles from min to backoffMax, with a fifth of jitter.
type backoff struct {
	min  time.Duration
	next time.Duration
	n    int
}

func (b *backoff) reset()     { b.next, b.n = 0, 0 }
func (b *backoff) waits() int { b.n++; return b.n }

func (b *backoff) wait(ctx context.Context) {
	b.next = min(max(b.next*2, b.min), backoffMax)
	jitter := 0.8 + 0.4*rand.Float64()
	t := time.NewTimer(min(time.Duration(float64(b.next)*jitter), backoffMax))
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
