package hbone

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
)

var (
	// ErrHandshakeTimeout ends a TLS handshake that took too long.
	ErrHandshakeTimeout = errors.New("hbone: tls handshake timed out")
	// ErrBusy refuses a handshake for which there is no room in the queue.
	ErrBusy = errors.New("hbone: too many tls handshakes")
	// ErrClosed is what pending work gets when its owner is closed.
	ErrClosed = errors.New("hbone: closed")
)

// IsAlert reports whether err is the peer's TLS alert. In TLS 1.3 a client has
// completed its handshake before the server judges its certificate, so that an
// alert may be the answer to the first CONNECT.
func IsAlert(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error"
}

// maxBridge bounds what a handshake keeps unread: a certificate message is at
// most 256 KiB, and crypto/tls takes it in parts.
const maxBridge = 64 << 10

// rejectLinger is how long a rejected peer has to take the alert that says why.
const rejectLinger = time.Second

// Handshakes runs TLS handshakes on a bounded set of goroutines, since
// crypto/tls cannot resume one that was interrupted. It is safe for use by
// many loops at once.
type Handshakes struct {
	// Set by NewHandshakes, read-only after.
	max     int
	timeout time.Duration
	jobs    chan *handshake
	quit    chan struct{}
	done    sync.WaitGroup

	// mu guards the fields below.
	mu      sync.Mutex
	workers int
	idle    int // workers that wait, less the jobs that wait for them
	closed  bool
	running map[*handshake]struct{}
}

// HandshakesConfig bounds Handshakes. A zero field means its default.
type HandshakesConfig struct {
	Workers int           // at once; 1024
	Queue   int           // waiting for a worker; 4096
	Timeout time.Duration // of each, from its start; 10 s
}

// keepWorkers is how many goroutines stay for the next handshake. Each has a
// stack that its last one has grown to 16 KiB and more; the others end.
const keepWorkers = 16

// NewHandshakes returns a runner that starts its goroutines as they are needed
// and keeps a few until Close.
func NewHandshakes(cfg HandshakesConfig) *Handshakes {
	if cfg.Workers <= 0 {
		cfg.Workers = 1024
	}
	if cfg.Queue <= 0 {
		cfg.Queue = 4096
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	return &Handshakes{
		max:     cfg.Workers,
		timeout: cfg.Timeout,
		jobs:    make(chan *handshake, cfg.Queue),
		quit:    make(chan struct{}),
		running: make(map[*handshake]struct{}),
	}
}

// Close fails every handshake and returns when the goroutines are gone.
func (h *Handshakes) Close() {
	h.mu.Lock()
	if !h.closed {
		h.closed = true
		close(h.quit)
	}
	running := make([]*handshake, 0, len(h.running))
	for s := range h.running {
		running = append(running, s)
	}
	h.mu.Unlock()
	for _, s := range running {
		s.expire(ErrClosed)
	}
	h.done.Wait()
}

// Role is the side of a handshake.
type Role uint8

// The sides of a handshake.
const (
	AsClient Role = iota
	AsServer
)

// Start begins a handshake over end, which it owns from now on. done runs on
// loop exactly once and never before Start has returned, unless cancel was
// called before; then end has been reset. A server's handshake takes a
// goroutine only once the client has sent something.
func (h *Handshakes) Start(loop splice.Loop, end splice.End, role Role, cfg *tls.Config, local, remote netip.AddrPort, done func(*TLS, error)) (cancel func()) {
	s := &handshake{owner: h, loop: loop, role: role, done: done}
	s.cond.L = &s.mu
	s.mem = &memory{
		end:    end,
		addrs:  [2]net.Addr{net.TCPAddrFromAddrPort(local), net.TCPAddrFromAddrPort(remote)},
		bridge: s,
	}
	if role == AsServer {
		s.conn = tls.Server(s.mem, cfg)
	} else {
		s.conn = tls.Client(s.mem, cfg)
	}
	s.timer = time.AfterFunc(h.timeout, func() { s.expire(ErrHandshakeTimeout) })
	end.Notify(s.onReady)
	return s.cancel
}

// submit finds a goroutine for s.
func (h *Handshakes) submit(s *handshake) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return ErrClosed
	}
	if h.idle <= 0 && h.workers < h.max {
		h.workers++
		h.running[s] = struct{}{}
		h.done.Go(func() { h.work(s) })
		return nil
	}
	select {
	case h.jobs <- s:
		h.idle--
		h.running[s] = struct{}{}
		return nil
	default:
		return ErrBusy
	}
}

// work runs handshakes, first s, until there are enough others or Close.
func (h *Handshakes) work(s *handshake) {
	for {
		s.run()
		h.mu.Lock()
		delete(h.running, s)
		if h.idle >= keepWorkers {
			h.workers--
			h.mu.Unlock()
			return
		}
		h.idle++
		h.mu.Unlock()
		select {
		case s = <-h.jobs:
		case <-h.quit:
			return
		}
	}
}

// A handshake is the bridge between a worker, whose Read blocks, and the loop
// that owns the end. The worker never touches the end.
type handshake struct {
	// Set by Start, read-only after.
	owner *Handshakes
	loop  splice.Loop
	role  Role
	conn  *tls.Conn
	mem   *memory
	timer *time.Timer

	// Owned by the loop.
	done      func(*TLS, error)
	over      bool
	submitted bool

	// mu guards the fields below.
	mu      sync.Mutex
	cond    sync.Cond
	in      []byte // received, for the worker
	out     []byte // from the worker, to be sent
	err     error  // what Read returns once in is empty, and Write at once
	stalled bool   // the loop stopped reading because in is full
	posted  bool   // the loop will flush
}

// run performs the handshake on a worker.
func (s *handshake) run() {
	err := s.conn.Handshake()
	s.loop.Post(func() { s.finish(err) })
}

// read is the transport's Read on the worker.
func (s *handshake) read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.in) == 0 && s.err == nil {
		s.cond.Wait()
	}
	if len(s.in) == 0 {
		return 0, s.err
	}
	n := copy(p, s.in)
	s.in = s.in[n:]
	if s.stalled && len(s.in) < maxBridge/2 {
		s.stalled = false
		s.loop.Post(s.onReady)
	}
	return n, nil
}

// write is the transport's Write on the worker.
func (s *handshake) write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil && s.err != io.ErrUnexpectedEOF {
		return 0, s.err
	}
	s.out = append(s.out, p...)
	if !s.posted {
		s.posted = true
		s.loop.Post(s.onReady)
	}
	return len(p), nil
}

// abort makes the worker return with err.
func (s *handshake) abort(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
		s.cond.Broadcast()
	}
}

// expire ends the handshake from any goroutine. The worker is released even
// if the loop is gone.
func (s *handshake) expire(err error) {
	s.abort(err)
	s.loop.Post(func() { s.fail(err) })
}

// onReady moves bytes between the end and the worker.
func (s *handshake) onReady() {
	if s.over {
		return
	}
	if err := s.flush(); err != nil {
		s.fail(fmt.Errorf("hbone: handshake: %w", err))
		return
	}
	s.fill()
	if !s.submitted && (s.role == AsClient || s.started()) {
		s.submitted = true
		if err := s.owner.submit(s); err != nil {
			s.fail(err)
		}
	}
}

func (s *handshake) started() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.in) > 0 || s.err != nil
}

func (s *handshake) flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.posted = false
	if len(s.out) == 0 {
		return nil
	}
	n, err := s.mem.end.Write(s.out)
	s.out = s.out[n:]
	if errors.Is(err, splice.ErrAgain) {
		return nil
	}
	return err
}

func (s *handshake) fill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil {
		room := maxBridge - len(s.in)
		if room <= 0 {
			s.stalled = true
			return
		}
		buf := s.loop.Scratch()
		n, err := s.mem.end.Read(buf[:min(room, len(buf))])
		s.in = append(s.in, buf[:n]...)
		switch {
		case errors.Is(err, splice.ErrAgain):
			s.cond.Broadcast()
			return
		case err == io.EOF:
			s.err = io.ErrUnexpectedEOF
		case err != nil:
			s.err = err
		}
	}
	s.cond.Broadcast()
}

// finish takes the worker's result on the loop.
func (s *handshake) finish(err error) {
	if s.over {
		return
	}
	switch {
	case errors.Is(err, ErrHandshakeTimeout), errors.Is(err, ErrClosed):
		// The worker heard of expire before the loop did: crypto/tls found
		// nothing wrong, so there is no alert to wait for.
		s.fail(err)
		return
	case err != nil:
		s.reject(fmt.Errorf("hbone: handshake: %w", err))
		return
	}
	s.over = true
	s.timer.Stop()
	s.mu.Lock()
	in, out := s.in, s.out
	s.in, s.out = nil, nil
	s.mu.Unlock()
	s.mem.bridge = nil
	s.mem.preload(in, out)
	s.done(newTLS(s.loop, s.conn, s.mem), nil)
}

// fail ends the handshake at once.
func (s *handshake) fail(err error) {
	if s.over {
		return
	}
	s.settle(err)
	s.mem.end.Reset(err)
	s.mem.end.Close()
	s.done(nil, err)
}

// reject ends a handshake that crypto/tls found wrong: the alert that it wrote
// goes out before the connection does.
func (s *handshake) reject(err error) {
	s.settle(err)
	end := s.mem.end
	if s.flush() != nil || end.CloseWrite() != nil {
		end.Reset(err)
		end.Close()
		s.done(nil, err)
		return
	}
	var stop func()
	closed := false
	finish := func() {
		if !closed {
			closed = true
			stop()
			end.Reset(err)
			end.Close()
		}
	}
	stop = s.loop.AfterFunc(rejectLinger, finish)
	end.Notify(func() {
		for !closed {
			if _, e := end.Read(s.loop.Scratch()); errors.Is(e, splice.ErrAgain) {
				return
			} else if e != nil {
				finish()
			}
		}
	})
	s.done(nil, err)
}

// cancel ends the handshake without a call of done.
func (s *handshake) cancel() {
	if s.over {
		return
	}
	s.settle(ErrClosed)
	s.mem.end.Reset(ErrClosed)
	s.mem.end.Close()
}

func (s *handshake) settle(err error) {
	s.over = true
	s.timer.Stop()
	s.abort(err)
}
