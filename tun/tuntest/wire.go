package tuntest

import (
	"encoding/binary"
	"errors"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun"
)

// Options of a Wire.
type Options struct {
	// Seed of all that is drawn.
	Seed uint64
	// Device are the options of the devices that WiredPair makes.
	Device tun.Options
	// AtoB and BtoA are the paths to begin with.
	AtoB, BtoA Path
}

// A Wire carries packets between two Devices, with the delay, the loss and the
// order of its two Paths. The same seed and packets meet the same fates.
type Wire struct {
	// Set by Join, read-only after.
	begin time.Time
	stop  int // eventfd
	done  chan struct{}

	// mu guards the lines of both ways.
	mu sync.Mutex

	// Owned by run, but for the lines.
	ways [2]way
}

// A way is one direction.
type way struct {
	from, to *tun.Device
	line     line
	blocked  bool // the far end has not taken the packet in writer
	gone     bool // nothing more comes
	sending  packet
	writer   tun.Writer
}

// WiredPair returns two Devices with a Wire between them. They are closed with
// the test. Needs no privilege. Where nothing is to be lost or late, Pair is
// the shorter way: a round trip of under 20 us, without a thread in between.
func WiredPair(t testing.TB, o Options) (a, b *tun.Device, w *Wire) {
	t.Helper()
	a, x := Pair(t, o.Device)
	y, b := Pair(t, o.Device)
	return a, b, Join(t, x, y, o)
}

// Join carries packets between two Devices, such as TUN devices of two network
// namespaces, until the end of the test. Nobody else may read them.
func Join(t testing.TB, a, b *tun.Device, o Options) *Wire {
	t.Helper()
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatalf("tuntest: eventfd: %v", err)
	}
	w := &Wire{begin: time.Now(), stop: stop, done: make(chan struct{})}
	// Seeds of the ways lie apart, or both would meet the same fates.
	w.ways[0] = way{from: a, to: b, line: line{seed: o.Seed, path: o.AtoB}}
	w.ways[1] = way{from: b, to: a, line: line{seed: o.Seed ^ 0x5bf0_3635_d1f1_9a2b, path: o.BtoA}}
	go w.run()
	t.Cleanup(w.close)
	return w
}

// Set changes the paths for the packets to come. Those on the wire go on.
func (w *Wire) Set(aToB, bToA Path) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ways[0].line.path, w.ways[1].line.path = aToB, bToA
}

// Stats counts what happened so far.
func (w *Wire) Stats() (aToB, bToA Stats) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ways[0].line.stats, w.ways[1].line.stats
}

func (w *Wire) close() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(w.stop, one[:])
	<-w.done
	_ = unix.Close(w.stop)
}

// batch is how many packets of one way are taken before those that are due go.
const batch = 64

// run is the wire's thread.
func (w *Wire) run() {
	defer close(w.done)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The kernel's timers are 50 us late otherwise; 0 sets the default again.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) }()
	in := newIntake()
	for w.wait() {
		for i := range w.ways {
			y := &w.ways[i]
			for n := 0; n < batch && !y.blocked && w.receive(y, in); n++ {
			}
			for w.depart(y, in) {
			}
		}
	}
}

// wait returns when a packet came or is due, or false at the end.
func (w *Wire) wait() bool {
	a, b := &w.ways[0], &w.ways[1]
	fds := [...]unix.PollFd{a.pollFd(b), b.pollFd(a), {Fd: int32(w.stop), Events: unix.POLLIN}}
	_, err := unix.Ppoll(fds[:], w.timeout(), nil)
	if err != nil && err != unix.EINTR {
		return false
	}
	return fds[2].Revents == 0
}

// timeout says how long nothing has to be done if nothing comes; nil is for ever.
func (w *Wire) timeout() *unix.Timespec {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Since(w.begin)
	left := int64(-1)
	for i := range w.ways {
		y := &w.ways[i]
		if due, ok := y.line.due(); ok && !y.blocked {
			ns := max(0, int64(due-now))
			if left < 0 || ns < left {
				left = ns
			}
		}
	}
	if left < 0 {
		return nil
	}
	ts := unix.NsecToTimespec(left)
	return &ts
}

// pollFd says what to wait for at y's source, to which back carries.
func (y *way) pollFd(back *way) unix.PollFd {
	p := unix.PollFd{Fd: int32(y.from.FD())}
	if !y.gone && !y.blocked {
		p.Events |= unix.POLLIN
	}
	if back.blocked {
		p.Events |= unix.POLLOUT
	}
	if p.Events == 0 {
		p.Fd = -1 // or its end would be told for ever
	}
	return p
}

// receive takes a packet from y's source, if one waits.
func (w *Wire) receive(y *way, in *intake) bool {
	if y.gone {
		return false
	}
	n, h, err := y.from.Read(&in.vector)
	if errors.Is(err, tun.ErrEmpty) {
		return false
	}
	bad := new(tun.HeaderError)
	switch {
	case err == nil:
		w.put(y, packet{h, in.room[:n]}, in)
	case !errors.As(err, &bad), *bad == tun.HeaderError{Field: "length"}:
		y.gone = true // an error, or the end of a socket
	}
	return !y.gone
}

// put puts a packet on the line; p.b is used again.
func (w *Wire) put(y *way, p packet, in *intake) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Since(w.begin)
	take := func(p packet) {
		p.b = in.copy(p.b)
		if !y.line.put(now, p, in.copy) {
			in.free(p.b)
		}
	}
	if !y.line.path.Cut {
		take(p)
	} else if !cut(p, in.scratch, take) {
		y.line.stats.Refused++
	}
}

// depart sends a packet that is due, and reports whether another may follow.
func (w *Wire) depart(y *way, in *intake) bool {
	if !y.blocked {
		w.mu.Lock()
		p, ok := y.line.next(time.Since(w.begin))
		if ok {
			y.line.stats.Carried++
		}
		w.mu.Unlock()
		if !ok {
			return false
		}
		y.sending = p
		y.writer.Reset(p.h)
		y.writer.Append(p.b)
	}
	err := y.to.WriteVector(&y.writer)
	// A full end is waited for: losing is for Path.Loss to do.
	if y.blocked = errors.Is(err, unix.EAGAIN); y.blocked {
		return false
	}
	if err != nil {
		w.mu.Lock()
		y.line.stats.Carried--
		y.line.stats.Refused++
		w.mu.Unlock()
	}
	in.free(y.sending.b)
	return true
}

// An intake is what packets are read into, and kept in.
type intake struct {
	room    []byte
	vector  tun.Vector
	scratch []byte
	small   [][]byte
}

func newIntake() *intake {
	in := &intake{room: make([]byte, tun.MaxPacket), scratch: make([]byte, 0, tun.MaxPacket)}
	in.vector.Set(0, in.room)
	return in
}

// smallBuffer holds a segment; larger packets have buffers of their own.
const smallBuffer = 2 << 10

func (in *intake) copy(b []byte) []byte {
	n := len(in.small)
	switch {
	case len(b) > smallBuffer:
		return append([]byte(nil), b...)
	case n > 0:
		c := in.small[n-1]
		in.small = in.small[:n-1]
		return append(c, b...)
	}
	return append(make([]byte, 0, smallBuffer), b...)
}

// free keeps a small buffer for later.
func (in *intake) free(b []byte) {
	if cap(b) == smallBuffer && len(in.small) < 4096 {
		in.small = append(in.small, b[:0])
	}
}
