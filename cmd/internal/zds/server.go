package zds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// acceptRate bounds new connections, as Istio's agent does.
	acceptRate = 5 // A second.
	// maxConns bounds proxies connected at once. An upgrade needs two.
	maxConns = 16
	// nackRetry is how often a proxy that refused a pod is asked again: it
	// tries by itself, but cannot tell us unasked.
	nackRetry = 5 * time.Second
)

// ErrNoProxy says that no proxy is connected.
var ErrNoProxy = errors.New("zds: no proxy connection")

// ServerConfig is what a Server needs. The zero value of a field is the
// default named on it.
type ServerConfig struct {
	// Standin reads the devices that no proxy reads. Nil: nobody does.
	Standin Standin
	// Check says what is wrong with files that a proxy lends as those of a pod: it
	// is nobody to be believed. Nil: nothing is.
	Check func(uid string, files Files) error
	// Log. Nil: nothing is logged.
	Log *slog.Logger
}

// A Server tells the node's proxies which pods there are.
//
// A device has one reader at a time. The Server gives it to the proxy that
// started last, and to another only once the first has ended (its process,
// not its connection, which may come back), has acknowledged a Del, or has
// yielded it (handover.go). A proxy that connects meanwhile is told to Keep the
// pod, which it may not know.
//
// It holds every descriptor itself for as long as the pod is set. So a device
// stays open when a proxy dies, and the next proxy gets the same open device.
type Server struct {
	cfg ServerConfig
	// peer says which process is at the other end; tests have their own.
	peer  func(*net.UnixConn) (*process, error)
	retry time.Duration  // nackRetry, or what tests say.
	wg    sync.WaitGroup // Connections and waits for processes.

	// mu guards the fields below.
	mu      sync.Mutex
	closed  bool
	conns   []*serverConn // In the order they came; the last is the latest.
	procs   []*process    // Those that have connected and not ended.
	pods    map[string]*serverPod
	serial  uint64        // Of the last Set.
	changed chan struct{} // Closed and replaced at each change.
	// standing are the pods that the Standin may be reading, with their serial.
	standing map[string]uint64

	standWake chan struct{} // One slot: what stands in is to be looked at.
}

// serverPod is one pod that is set.
type serverPod struct {
	workload Workload
	files    Files  // No device: a proxy holds the only descriptor.
	serial   uint64 // Grows with each Set.

	// stale says that the older flows must be looked at again before another
	// proxy gets the device: one may have ended, and a proxied one taken its tuple.
	stale bool

	reader *process // Who may be reading device; nil: nobody.
	acked  uint64   // The serial that the reader took.
	nack   string   // Why it did not take this serial.

	handover
}

// NewServer makes a server. Serve starts it.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, peer: peerProcess, retry: nackRetry, pods: map[string]*serverPod{}, changed: make(chan struct{}),
		standing: map[string]uint64{}, standWake: make(chan struct{}, 1)}
}

// Set wants the pod served as described. The Server owns files from now on;
// there are none when the pod's proxy already has the only descriptor, and the
// pod is to be kept. Set does not wait: State tells what came of it.
func (s *Server) Set(w Workload, files Files) error {
	if err := errors.Join(w.Validate(), files.check()); err != nil {
		files.Close()
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		files.Close()
		return net.ErrClosed
	}
	p := s.pods[w.UID]
	if p == nil {
		p = &serverPod{}
		s.pods[w.UID] = p
	}
	s.serial++
	if files.Device == nil && p.files.Device != nil {
		w, files = w.onDevice(p.workload), p.files // It was lent to us meanwhile.
	} else {
		p.files.Close()
		p.dropEnd()
		p.older = nil
	}
	p.workload, p.files, p.serial, p.nack, p.stale = w, files, s.serial, "", false
	s.markLocked(w.UID)
	return nil
}

// Update says something else of a pod whose open device stays as it is: the
// device's ID and Offload are kept. It reports whether the pod is set with a
// device that the Server holds; if not, nothing changes.
func (s *Server) Update(w Workload) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[w.UID]
	if p == nil || p.files.Device == nil {
		return false, nil
	}
	w = w.onDevice(p.workload)
	if err := w.Validate(); err != nil {
		return false, err
	}
	p.stale = false
	if !w.Equal(p.workload) {
		s.serial++
		p.serial, p.nack = s.serial, ""
	}
	p.workload = w
	s.markLocked(w.UID)
	return true, nil
}

// Delete tells every proxy that the pod is gone, and waits until all that are
// connected have acknowledged it, and the Standin has stopped, or ctx ends. The Server closes its
// descriptors. An unknown uid is no error.
func (s *Server) Delete(ctx context.Context, uid string) error {
	s.mu.Lock()
	if p := s.pods[uid]; p != nil {
		p.files.Close()
		p.dropEnd()
		delete(s.pods, uid)
		s.markLocked(uid)
	}
	for {
		told := slices.ContainsFunc(s.conns, func(c *serverConn) bool { return c.knowsLocked(uid) })
		if _, stands := s.standing[uid]; stands {
			told = true
		}
		_, again := s.pods[uid]
		changed := s.changed
		s.mu.Unlock()
		if !told || again {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("zds: delete %s: %w", uid, context.Cause(ctx))
		case <-changed:
		}
		s.mu.Lock()
	}
}

// State is what a Server knows of one pod.
type State struct {
	Set    bool   // The pod is set.
	Device bool   // The Server holds its device.
	Served bool   // A proxy took it as last described.
	Serial uint64 // Grows each time that the pod is described otherwise.
	Kept   bool   // A proxy that cannot lend it may have the only descriptor of the device.
	Stale  bool   // No proxy gets it before Update (or Set) has said which older flows are left.
	Reader int    // The PID of the proxy that may read the device; 0: none, or not visible.
	Err    error
}

// State tells how it stands with a pod. Err is ErrNoProxy, the reason of a
// proxy that refused it, or nil.
func (s *Server) State(uid string) State {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[uid]
	if p == nil {
		return State{}
	}
	st := State{Set: true, Device: p.files.Device != nil, Stale: p.stale, Serial: p.serial}
	if p.reader != nil {
		st.Reader = p.reader.pid
		st.Served = p.acked == p.serial
	}
	if p.files.Device == nil {
		st.Kept = slices.ContainsFunc(s.conns, func(c *serverConn) bool { return c.knowsLocked(uid) && !c.proc.hello.ztun })
		st.Served = slices.ContainsFunc(s.conns, func(c *serverConn) bool { return c.knowsLocked(uid) })
	}
	switch {
	case p.nack != "":
		st.Err = fmt.Errorf("zds: proxy refused: %s", p.nack)
	case !st.Served && len(s.conns) == 0:
		st.Err = ErrNoProxy
	}
	return st
}

// Proxies is how many proxies are connected.
func (s *Server) Proxies() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Serve accepts proxies until ctx ends, and returns when every connection is
// closed. It owns l. A Server serves once.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer s.shutDown()
	defer cancel()
	defer stop()
	defer l.Close()
	if s.cfg.Standin != nil {
		s.wg.Go(func() { s.stand(ctx) })
	}
	limiter := rate.NewLimiter(acceptRate, acceptRate)
	for {
		conn, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return context.Cause(ctx)
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("zds: accept: %w", err)
			}
			s.cfg.Log.Error("accepting a proxy", "error", err) // Out of descriptors, for one.
		} else if c, err := s.admit(conn); err != nil {
			s.cfg.Log.Warn("proxy turned away", "error", err)
			_ = conn.Close()
		} else {
			s.wg.Go(func() { c.run(ctx) })
		}
		if err := limiter.Wait(ctx); err != nil {
			return context.Cause(ctx)
		}
	}
}

// shutDown closes what the Server holds. Proxies keep their descriptors.
func (s *Server) shutDown() {
	s.mu.Lock()
	s.closed = true
	for uid, p := range s.pods {
		p.files.Close()
		p.dropEnd()
		delete(s.pods, uid)
	}
	for _, p := range s.procs {
		p.close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// admit registers a connection before its hello, so that what changes from
// now on reaches it.
func (s *Server) admit(conn *net.UnixConn) (*serverConn, error) {
	proc, err := s.peer(conn)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= maxConns {
		proc.close()
		return nil, fmt.Errorf("zds: %d proxies are connected", len(s.conns))
	}
	proc = s.processLocked(proc)
	c := newServerConn(s, conn, proc)
	proc.conns++
	s.conns = append(s.conns, c)
	for uid := range s.pods {
		c.dirty[uid] = struct{}{}
	}
	s.standLocked()
	s.changedLocked()
	return c, nil
}

// processLocked returns the process that we already know, or watches p.
func (s *Server) processLocked(p *process) *process {
	for _, known := range s.procs {
		if known.same(p) {
			p.close()
			return known
		}
	}
	s.procs = append(s.procs, p)
	if p.pidfd != nil {
		s.wg.Go(func() { s.watch(p) })
	}
	return p
}

func (s *Server) watch(p *process) {
	p.wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLocked(p)
}

// endLocked frees what p was reading.
func (s *Server) endLocked(p *process) {
	if p.gone {
		return
	}
	p.gone = true
	p.close()
	s.procs = slices.DeleteFunc(s.procs, func(o *process) bool { return o == p })
	for _, c := range s.conns {
		if c.proc == p {
			_ = c.conn.Close() // Somebody else may have inherited the other end.
		}
	}
	for uid, pod := range s.pods {
		pod.older = slices.DeleteFunc(pod.older, func(o *process) bool { return o == p })
		if pod.reader == p {
			s.freeLocked(pod)
			pod.dropEnd()
			s.markLocked(uid)
		}
		s.settleLocked(uid, pod)
	}
	s.changedLocked()
}

// remove forgets a connection that has ended.
func (s *Server) remove(c *serverConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = slices.DeleteFunc(s.conns, func(o *serverConn) bool { return o == c })
	c.proc.conns--
	if c.proc.pidfd == nil && c.proc.conns == 0 {
		// Nothing will tell us of the process' end. Its connection must do.
		s.endLocked(c.proc)
	}
	for uid, p := range s.pods {
		s.settleLocked(uid, p)
		s.markLocked(uid) // An older connection may be the latest now.
	}
	s.changedLocked()
}

// markLocked makes every connection look at the pod again.
func (s *Server) markLocked(uid string) {
	for _, c := range s.conns {
		c.markLocked(uid)
	}
	s.standLocked()
}

func (s *Server) changedLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Changed returns a channel that is closed when a proxy has taken or refused a
// pod, connected, disconnected, or ended. Ask for it before State.
func (s *Server) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// targetLocked is the connection that is to be told of p: one of its reader,
// who alone may have it, else the latest.
func (s *Server) targetLocked(p *serverPod) *serverConn {
	return s.latestLocked(func(c *serverConn) bool {
		if p.reader != nil {
			return c.proc == p.reader
		}
		return !c.proc.hello.leaving && (len(p.older) == 0 || p.canSucceed(c.proc))
	})
}

// latestLocked is the connection of the process that started last, and its
// latest. Those that do not say when they started count as they came.
func (s *Server) latestLocked(ok func(*serverConn) bool) (latest *serverConn) {
	for _, c := range s.conns {
		if !c.proc.gone && ok(c) && (latest == nil || c.proc.hello.started >= latest.proc.hello.started) {
			latest = c
		}
	}
	return latest
}
