package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// busy is how long after the last packet the reader waits outside the Go
	// scheduler: -14 % CPU per request, since a thread in an ordinary syscall
	// keeps sysmon awake and pays for giving its P away and taking it back.
	busy = 2 * time.Millisecond
	// rawWait bounds one such wait, in milliseconds: timers set on this thread
	// live on its P and are late by as much.
	rawWait = 2
	// longWait bounds a wait with a deadline: epoll counts in 32 bits.
	longWait = time.Hour
)

// wait returns the number of r.events that are ready. It does not wait while
// work is queued. Others may run the loop while it waits. After an error the
// reader cannot go on.
func (r *reader) wait() (int, error) {
	r.sleeping.Store(true)
	defer r.sleeping.Store(false)
	if !r.idle() {
		return r.rawPoll(0)
	}
	if r.started {
		// A goroutine made by this thread sits in its P's queue.
		r.started = false
		runtime.Gosched()
	}
	if len(r.acks.soon) > 0 {
		if n, err := r.rawPoll(0); n > 0 || err != nil {
			return n, err
		}
		r.acks.sendSoon()
	}
	now := time.Now()
	limit := -1 // milliseconds
	r.until = now.Add(longWait)
	if d, ok := r.next(now); ok {
		d = min(d, longWait)
		limit = int((d + time.Millisecond - 1) / time.Millisecond)
		r.until = now.Add(d)
	}
	wasBusy := now.Sub(r.lastPacket) < busy
	r.turns.Unlock()
	defer r.turns.Lock()
	return r.poll(limit, wasBusy)
}

// next returns how long it is until the next deadline, and false if there is
// none.
func (r *reader) next(now time.Time) (d time.Duration, ok bool) {
	d, ok = r.acks.next(now)
	if t, timed := r.timers.next(now); timed && (!ok || t < d) {
		d, ok = t, true
	}
	return d, ok
}

// poll waits for up to limit milliseconds; without end if that is negative.
func (r *reader) poll(limit int, wasBusy bool) (int, error) {
	if wasBusy {
		ms := rawWait
		if limit >= 0 {
			ms = min(ms, limit)
		}
		if n, err := r.rawPoll(ms); n > 0 || ms == limit || err != nil {
			return n, err
		}
	}
	n, err := unix.EpollWait(r.epfd, r.events[:], limit)
	return polled(n, err)
}

// polled is what a wait came to. A signal is no error.
func polled(n int, err error) (int, error) {
	if errors.Is(err, unix.EINTR) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("netstack: epoll wait: %w", err)
	}
	return n, nil
}

// rawPoll waits for up to ms milliseconds without telling the scheduler, which
// sees a request to stop only at the next function call with a stack check. A
// loop of nothing but raw waits held up collections for 4-60 s; here one that
// finds nothing is followed by an ordinary wait, any other by the work it found.
func (r *reader) rawPoll(ms int) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(r.epfd), uintptr(unsafe.Pointer(&r.events)), uintptr(len(r.events)), uintptr(ms), 0, 0)
	if errno != 0 {
		return polled(0, errno)
	}
	return int(n), nil
}

// wake gets the reader out of its wait, if it is in one.
func (r *reader) wake() {
	if r.sleeping.Swap(false) {
		r.signal()
	}
}

func (r *reader) signal() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.evfd >= 0 {
		unix.RawSyscall(unix.SYS_WRITE, uintptr(r.evfd), uintptr(unsafe.Pointer(&one)), 8)
	}
}

func (r *reader) drainWakeups() {
	var n [8]byte
	unix.RawSyscall(unix.SYS_READ, uintptr(r.evfd), uintptr(unsafe.Pointer(&n)), 8)
}
