package main

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// connectTimeout bounds how long a connection may take to come up.
	connectTimeout = 10 * time.Second
	// drainTimeout is how long paced requests may stay unanswered at the end,
	// but no longer than they were sent.
	drainTimeout = 3 * time.Second
	// maxConns and maxWindow bound an order.
	maxConns  = 200_000
	maxWindow = 10 * time.Minute
)

// request is what a client sends; a fresh one has nothing after it.
const (
	request      = "GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\n\r\n"
	freshRequest = "GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\nConnection: close\r\n\r\n"
)

// runRequests drives requests at a server from a few threads.
func runRequests(o order) (*load, error) {
	if o.Conns < 1 || o.Conns > maxConns || o.Warm+o.For > maxWindow {
		return nil, fmt.Errorf("bench: requests: %d connections, %v: out of bounds", o.Conns, o.Warm+o.For)
	}
	// The client must neither be the limit on a large machine nor crowd out
	// the rest on a small one.
	threads := min(o.Conns, max(1, runtime.NumCPU()/2), 8)
	results, errs := make([]*load, threads), make([]error, threads)
	var all sync.WaitGroup
	for i := range threads {
		all.Go(func() {
			d := &driver{
				fresh: o.Fresh, target: netip.AddrPortFrom(o.Addr.Addr(), portHTTP), conns: make([]conn, share(o.Conns, threads, i)), inFlight: share(o.InFlight, threads, i),
				warm: o.Warm, end: o.Warm + o.For,
			}
			for j := range d.conns {
				c := &d.conns[j]
				c.index = int32(j)
				if len(o.From) > 0 {
					c.netns = o.From[(i+j*threads)%len(o.From)]
				}
			}
			if o.Rate > 0 {
				d.interval = time.Second * time.Duration(threads) / time.Duration(o.Rate)
				d.offset = d.interval * time.Duration(i) / time.Duration(threads)
			}
			results[i], errs[i] = d.run()
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	sum := &load{}
	for _, l := range results {
		sum.merge(l)
	}
	return sum, nil
}

// share is the i-th of n nearly equal parts of a whole.
func share(whole, n, i int) int { return (whole + n - 1 - i) / n }

// A driver keeps requests in flight on connections of its own, from one
// thread that waits in epoll: it costs little, and it wakes in time.
type driver struct {
	// Set before run, read-only after.
	fresh            bool // A connection for each request.
	target           netip.AddrPort
	inFlight         int           // So many requests at once; 0: one on each connection.
	interval, offset time.Duration // Between two requests; 0: as fast as it goes.
	warm, end        time.Duration // When requests begin to count, and no more are sent.

	epoll, timer int
	began        time.Time
	conns        []conn
	opened       int // Connections that open has begun with.
	connected    int
	ticks        int
	due          []time.Duration // When requests were to be sent that wait for a connection.
	free         []*conn         // Connections without a request, where requests wait for their time or turn.
	result       load
}

// A conn is a connection with at most one request in flight.
type conn struct {
	index int32
	netns string // Where it is made, by path. Empty: here.
	fd    int
	state connState
	due   time.Duration
	got   int
	buf   [1024]byte
}

type connState uint8

const (
	connClosed connState = iota
	connConnecting
	connIdle
	connWaiting // For the answer.
)

const timerEvent = -1

// now is the time since run began to send.
func (d *driver) now() time.Duration { return time.Since(d.began) }

func (d *driver) run() (*load, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var err error
	if d.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("bench: epoll: %w", err)
	}
	defer unix.Close(d.epoll)
	defer d.closeAll()
	d.began = time.Now()
	if !d.fresh {
		if err := d.open(); err != nil {
			return nil, err
		}
	}
	if err := d.start(); err != nil {
		return nil, err
	}
	if err := d.until(func() bool { return d.now() >= d.end && (d.interval == 0 || d.drained()) }); err != nil {
		return nil, err
	}
	d.giveUp()
	d.result.Window = d.end - d.warm
	return &d.result, nil
}

// open connects all connections, as many at once as requests will be in flight.
func (d *driver) open() error {
	first := len(d.conns)
	if d.inFlight > 0 {
		first = min(first, d.inFlight)
	}
	for range first {
		if err := d.openNext(); err != nil {
			return err
		}
	}
	if err := d.until(func() bool { return d.connected == len(d.conns) || d.now() > connectTimeout }); err != nil {
		return err
	}
	if d.connected < len(d.conns) {
		return fmt.Errorf("bench: connect to %v: %d of %d connections after %v", d.target, d.connected, len(d.conns), connectTimeout)
	}
	return nil
}

// openNext begins to connect the next connection, if there is one.
func (d *driver) openNext() error {
	if d.opened == len(d.conns) {
		return nil
	}
	d.opened++
	return d.connect(&d.conns[d.opened-1])
}

// start sends the first requests, or winds up the clock that does.
func (d *driver) start() error {
	d.began = time.Now()
	if d.interval == 0 {
		for i := range d.conns {
			if d.inFlight > 0 && i >= d.inFlight {
				d.free = append(d.free, &d.conns[i])
			} else if err := d.begin(&d.conns[i], 0); err != nil {
				return err
			}
		}
		return nil
	}
	for i := range d.conns {
		d.free = append(d.free, &d.conns[i])
	}
	var err error
	if d.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC); err != nil {
		return fmt.Errorf("bench: timer: %w", err)
	}
	every := unix.ItimerSpec{
		Value:    unix.NsecToTimespec(int64(d.interval + d.offset)),
		Interval: unix.NsecToTimespec(int64(d.interval)),
	}
	if err := unix.TimerfdSettime(d.timer, 0, &every, nil); err != nil {
		return fmt.Errorf("bench: timer: %w", err)
	}
	return d.control(unix.EPOLL_CTL_ADD, d.timer, unix.EPOLLIN, timerEvent)
}

func (d *driver) control(op, fd int, events uint32, index int32) error {
	if err := unix.EpollCtl(d.epoll, op, fd, &unix.EpollEvent{Events: events, Fd: index}); err != nil {
		return fmt.Errorf("bench: epoll: %w", err)
	}
	return nil
}

// until handles events until done says so.
func (d *driver) until(done func() bool) error {
	events := make([]unix.EpollEvent, 128)
	for !done() {
		n, err := unix.EpollWait(d.epoll, events, 20)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("bench: epoll: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if e.Fd == timerEvent {
				err = d.tick()
			} else {
				err = d.ready(&d.conns[e.Fd])
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// tick notes the requests whose time has come, and sends what can be sent.
func (d *driver) tick() error {
	var count [8]byte
	if _, err := unix.Read(d.timer, count[:]); err != nil {
		return nil // Spurious.
	}
	for now := d.now(); ; d.ticks++ {
		due := d.offset + d.interval*time.Duration(d.ticks+1)
		if due > now || due >= d.end {
			break
		}
		d.due = append(d.due, due)
	}
	for len(d.due) > 0 && len(d.free) > 0 {
		c := d.free[0]
		d.free = d.free[1:]
		if err := d.next(c); err != nil {
			return err
		}
	}
	return nil
}

// next sends the request that waits longest.
func (d *driver) next(c *conn) error {
	due := d.due[0]
	d.due = d.due[1:]
	return d.begin(c, due)
}

// begin sends a request, on a new connection if each has its own.
func (d *driver) begin(c *conn, due time.Duration) error {
	c.due = due
	if d.fresh {
		return d.connect(c)
	}
	return d.send(c, request)
}

// drained says that nothing is left to wait for.
func (d *driver) drained() bool {
	return d.now() > d.end+min(drainTimeout, d.end) || len(d.due) == 0 && len(d.free) == len(d.conns)
}

// giveUp counts what is still unanswered of paced requests with the time that
// it has taken so far.
func (d *driver) giveUp() {
	if d.interval == 0 {
		return
	}
	for i := range d.conns {
		if c := &d.conns[i]; c.state == connWaiting || c.state == connConnecting {
			d.due = append(d.due, c.due)
		}
	}
	for _, due := range d.due {
		if due >= d.warm {
			d.result.Latency.record(d.now() - due)
		}
	}
}

func (d *driver) closeAll() {
	for i := range d.conns {
		d.close(&d.conns[i])
	}
	if d.timer > 0 {
		unix.Close(d.timer)
	}
}
