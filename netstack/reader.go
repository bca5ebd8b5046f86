package netstack

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tunnel/splice"
)

// ladder are the sizes of the buffers a packet is read into, in order, in
// bytes. A small packet takes a small buffer, a super-segment all of them;
// the buffers that were filled become the packet.
var ladder = [...]int{headRoom, 1 << 10, 4 << 10, 16 << 10, 64 << 10}

// A reader is one thread that owns many pods, and their Loop. Another reader's
// thread may run the loop while this one sleeps (help.go).
type reader struct {
	// Set by newReader, read-only after.
	engine *Engine
	index  int
	epfd   int
	evfd   int
	done   chan struct{}
	shared *shared
	timers timers

	pods     atomic.Int64 // stacks, for leastLoaded
	sleeping atomic.Bool  // about to wait, or waiting
	thread   atomic.Int32 // the TID of whoever runs the loop

	// turns is held by the thread that runs the loop, and guards what is owned
	// by it.
	turns sync.Mutex

	// mu guards the fields below.
	mu     sync.Mutex
	closed bool
	posted []func()
	wakers []waker

	// Owned by the loop.
	sparePosted []func()
	spareWakers []waker
	soon, last  tasks
	stacks      map[*Stack]struct{}
	watched     map[int]*Stack // by descriptor
	errors      map[int]func() // by descriptor: reads ICMP
	scratch     []byte
	views       [len(ladder)]*buffer.View
	vector      tun.Vector
	started     bool // this pass started a goroutine
	events      [64]unix.EpollEvent
	now         time.Time // when the last wait ended
	lastPacket  time.Time
	until       time.Time // the deadline that the thread sleeps for
	handed      []*reader // were given work and may not have done it
	more        bool      // a device had more than its turn allowed
	alone       int       // passes without waking others
	acks        waitingACKs
	locked      []*Flow // flows whose endpoint lock the batch holds
	// What a Flow's Read and Write hand to gVisor; empty but during the call.
	sink   tcpip.SliceWriter
	source bytes.Reader
}

func newReader(e *Engine, index int) (*reader, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("netstack: epoll: %w", err)
	}
	evfd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("netstack: eventfd: %w", err)
	}
	r := &reader{
		engine: e, index: index, epfd: epfd, evfd: evfd,
		done:    make(chan struct{}),
		shared:  newShared(),
		stacks:  map[*Stack]struct{}{},
		watched: map[int]*Stack{},
		errors:  map[int]func(){},
		acks:    waitingACKs{delay: ackDelay, limit: maxUnacked},
		scratch: make([]byte, splice.ScratchSize),
	}
	r.timers.init(r)
	if err := r.watch(evfd); err != nil {
		unix.Close(epfd)
		unix.Close(evfd)
		return nil, err
	}
	return r, nil
}

func (r *reader) watch(fd int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	if err := unix.EpollCtl(r.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("netstack: epoll: %w", err)
	}
	return nil
}

// isCaller reports whether the thread that runs the loop asks. It is a system call.
func (r *reader) isCaller() bool { return int(r.thread.Load()) == unix.Gettid() }

// run is the reader's thread.
func (r *reader) run() {
	runtime.LockOSThread()
	r.thread.Store(int32(unix.Gettid()))
	r.turns.Lock()
	defer r.turns.Unlock()
	defer r.end()
	for {
		n, err := r.wait()
		if err != nil && !r.isClosed() {
			r.fail(err)
			return
		}
		r.now = time.Now()
		r.acks.sendDue(r.now)
		if r.isClosed() {
			return
		}
		r.timers.run(r.now)
		r.more = false
		for i := range n {
			fd := int(r.events[i].Fd)
			if fd == r.evfd {
				r.drainWakeups()
			} else if s := r.watched[fd]; s != nil {
				s.turn()
			} else if read := r.errors[fd]; read != nil {
				read()
			}
		}
		r.pass()
		r.settle()
	}
}

// add starts to read s. It runs on the loop; after an error s is not known.
func (r *reader) add(s *Stack) error {
	r.stacks[s] = struct{}{}
	err := s.listen(s.cfg.Addrs)
	if err == nil {
		if s.before == nil {
			s.drain()
		} // Else it is for that one, or for this.
		r.engine.noteLacks(s.cfg.Name, s.dev.Lacks())
		r.watched[s.dev.FD()] = s
		err = errors.Join(r.watch(s.dev.FD()), s.watchICMP(), s.watchPredecessor())
	}
	if err != nil {
		s.unwatchICMP()
		s.unwatchPredecessor()
		r.remove(s)
	}
	return err
}

// remove forgets s. It runs on the loop.
func (r *reader) remove(s *Stack) {
	r.unwatch(s)
	if _, ok := r.stacks[s]; ok {
		delete(r.stacks, s)
		r.pods.Add(-1)
	}
}

// unwatch stops reading s.
func (r *reader) unwatch(s *Stack) {
	fd := s.source.FD()
	if r.watched[fd] != s {
		return
	}
	delete(r.watched, fd)
	// The descriptor may be shared with another process: closing it alone
	// would leave it in the set.
	unix.EpollCtl(r.epfd, unix.EPOLL_CTL_DEL, fd, nil)
}

func (r *reader) isClosed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}

// fail tells that the thread ends: nothing would wake it any more, or nothing else.
func (r *reader) fail(err error) {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.engine.log.Error("a reader ends, and its pods' connections", "pods", len(r.stacks), "error", err)
	if f := r.engine.cfg.Failed; f != nil {
		go f(err)
	}
}

// close makes run return.
func (r *reader) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.signal()
}

// end runs when the thread leaves its loop.
func (r *reader) end() {
	for s := range r.stacks {
		s.closeOnLoop()
	}
	close(r.done)
	for _, v := range r.views {
		if v != nil {
			v.Release()
		}
	}
	unix.Close(r.epfd)
	r.mu.Lock()
	defer r.mu.Unlock()
	unix.Close(r.evfd)
	r.evfd = -1
	r.posted, r.wakers = nil, nil
}
