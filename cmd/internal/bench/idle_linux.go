package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// idlers hold connections on which nothing happens, as bare descriptors: what
// a runtime keeps for each would be measured too. They go with the process.
type idlers struct {
	mu sync.Mutex
	// mu guards the fields below.
	held []int
}

// idleOpeners is how many connections are opened at a time.
const idleOpeners = 16

// serve accepts connections and answers one byte on each with another.
func (i *idlers) serve() error {
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bench: socket: %w", err)
	}
	// The one of the round before has left connections that the kernel remembers.
	err = unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(l, &unix.SockaddrInet4{Port: portIdle})
	}
	if err == nil {
		err = unix.Listen(l, 4096)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("bench: listen on %d: %w", portIdle, err), unix.Close(l))
	}
	for range idleOpeners {
		go i.accept(l)
	}
	return nil
}

func (i *idlers) accept(l int) {
	for {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return
		}
		if err := exchange(fd, false); err != nil {
			unix.Close(fd)
			continue
		}
		i.hold(fd)
	}
}

func (i *idlers) hold(fd int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.held = append(i.held, fd)
}

// open opens connections and sees each of them work. It stops where one does
// not; the answer says why.
func (i *idlers) open(o order) (answer, error) {
	if o.Conns > maxConns {
		return answer{}, fmt.Errorf("bench: %d connections: out of bounds", o.Conns)
	}
	openers := idleOpeners
	if o.OneByOne {
		openers = 1
	}
	target := netip.AddrPortFrom(o.Addr.Addr(), portIdle)
	began, before := time.Now(), i.count()
	var failure atomic.Pointer[error] // The first.
	var all sync.WaitGroup
	for n := range openers {
		all.Go(func() {
			for range share(o.Conns, openers, n) {
				if err := i.openOne(target); err != nil {
					failure.CompareAndSwap(nil, &err)
					return
				}
			}
		})
	}
	all.Wait()
	a := answer{Open: i.count() - before, Took: time.Since(began)}
	if err := failure.Load(); err != nil {
		a.Failure = (*err).Error()
	}
	return a, nil
}

func (i *idlers) openOne(target netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bench: socket: %w", err)
	}
	// It ends with a reset: so many that wait for their ports to be forgotten
	// would leave none for the next round.
	err = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	if err == nil {
		err = connectWithin(fd, target)
	}
	if err == nil {
		err = exchange(fd, true)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("bench: idle connection to %v: %w", target, err), unix.Close(fd))
	}
	i.hold(fd)
	return nil
}

func (i *idlers) count() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.held)
}

// sweepTimeout bounds how long a byte may take over all connections.
const sweepTimeout = 30 * time.Second

// sweep moves a byte on each connection that is held: poke sends one, echo
// gets one and sends it back, hear gets it. It returns on how many that went.
func (i *idlers) sweep(do string) (went int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	left := slices.Clone(i.held)
	for deadline := time.Now().Add(sweepTimeout); len(left) > 0 && time.Now().Before(deadline); {
		waiting := left[:0]
		for _, fd := range left {
			err := error(nil)
			if do != "poke" {
				err = hear(fd)
			}
			if err == nil && do != "hear" {
				err = unix.Send(fd, []byte{'i'}, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			}
			switch {
			case err == nil:
				went++
			case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
				waiting = append(waiting, fd)
			}
		}
		if left = waiting; len(left) > 0 {
			time.Sleep(10 * time.Millisecond)
		}
	}
	return went
}

// hear gets the byte that is there.
func hear(fd int) error {
	n, _, err := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_DONTWAIT)
	if err == nil && n == 0 {
		err = io.EOF
	}
	return err
}

// connectWithin connects a non-blocking socket and makes it a blocking one.
// A blocking connect that a signal interrupts cannot be taken up again.
func connectWithin(fd int, target netip.AddrPort) error {
	err := unix.Connect(fd, &unix.SockaddrInet4{Addr: target.Addr().As4(), Port: int(target.Port())})
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	for deadline := time.Now().Add(connectTimeout); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return unix.ETIMEDOUT
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left/time.Millisecond)+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			break
		}
	}
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = unix.Errno(errno)
	}
	return errors.Join(err, unix.SetNonblock(fd, false))
}

// limit bounds how long reads and writes may block.
func limit(fd int) error {
	t := unix.NsecToTimeval(int64(connectTimeout / time.Nanosecond))
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &t); err != nil {
			return fmt.Errorf("bench: timeout: %w", err)
		}
	}
	return nil
}

// exchange sends a byte and waits for one, or the other way round.
func exchange(fd int, first bool) error {
	if err := limit(fd); err != nil {
		return err
	}
	b := []byte{'i'}
	if first {
		if _, err := unix.Write(fd, b); err != nil {
			return err
		}
	}
	for {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = errors.New("closed before it was answered")
		}
		if err != nil {
			return err
		}
		break
	}
	if first {
		return nil
	}
	_, err := unix.Write(fd, b)
	return err
}
