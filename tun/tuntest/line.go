package tuntest

import (
	"slices"
	"time"

	"github.com/ztun/ztun/tun"
)

// A Path is what a Wire does to the packets of one direction. The zero value
// carries everything at once and in order.
type Path struct {
	// Delay is what every packet takes, Jitter at most what one takes on top,
	// drawn evenly. Neither changes the order.
	Delay, Jitter time.Duration
	// Loss, Duplicate and Reorder are a packet's chances, 0 to 1, to vanish, to
	// come twice, and to be overtaken by up to eight others.
	Loss, Duplicate, Reorder float64
	// Late bounds how long a packet waits to be overtaken. Default 2 ms.
	Late time.Duration
	// Rate bounds what passes, in bytes a second; 0: no bound. Queue is how many
	// bytes may wait for it, what comes on top is lost. Default 256 KiB.
	Rate, Queue int64
	// Cut cuts super-segments into the segments that a network would see, each
	// with a fate of its own. Without it one fate is the whole super-segment's.
	Cut bool
}

// Stats count the packets of one direction; a super-segment that is cut counts
// by its segments.
type Stats struct {
	Packets    uint64 // came
	Carried    uint64 // went, duplicates included
	Lost       uint64 // by Path.Loss
	Duplicated uint64
	Reordered  uint64 // picked to be overtaken
	Overflowed uint64 // found no room to wait
	Refused    uint64 // not taken by the device at the far end, or not fit to be cut
}

const (
	defaultLate  = 2 * time.Millisecond
	defaultQueue = 256 << 10
	// maxOvertakes is how many packets may overtake one.
	maxOvertakes = 8
	// maxHeld is how many wait at a time to be overtaken.
	maxHeld = 64
	// maxWaiting bounds the bytes on a direction of the wire.
	maxWaiting = 128 << 20
)

// A packet is an IP packet and its virtio header.
type packet struct {
	h tun.Header
	b []byte
}

// An item is a packet on the wire.
type item struct {
	packet
	due      time.Duration // when it may go; for a held one, when it must
	overtake int           // how many are still to overtake it
}

// A line is one direction of a wire without its descriptors. Times are since
// any one moment. What happens to the n-th packet follows from the seed, n and
// the path that is set, however the packets are spaced.
type line struct {
	seed    uint64
	path    Path
	n       uint64        // packets so far
	free    time.Duration // when all that waits for Rate is through
	queue   []item        // goes in order, so none before the first is due
	held    []item        // taken from the queue, to be overtaken
	waiting int           // bytes in both
	stats   Stats
}

// Numbers of a packet's draws, so that one chance does not move another.
const (
	drawLoss = iota
	drawDuplicate
	drawReorder
	drawOvertakes
	drawJitter
	draws
)

// draw returns the k-th number of the n-th packet, at least 0 and below 1. It
// is splitmix64, https://prng.di.unimi.it/splitmix64.c.
func (l *line) draw(k uint64) float64 {
	z := l.seed + (l.n*draws+k+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return float64((z^z>>31)>>11) / (1 << 53)
}

// put decides about a packet, of which it keeps b; it reports false if the
// packet is lost, so that b may be used again. twin makes a copy of b.
func (l *line) put(now time.Duration, p packet, twin func([]byte) []byte) bool {
	l.n++
	l.stats.Packets++
	path := &l.path
	if l.draw(drawLoss) < path.Loss {
		l.stats.Lost++
		return false
	}
	due, ok := l.pass(now, int64(len(p.b)))
	if !ok || l.waiting+len(p.b) > maxWaiting {
		l.stats.Overflowed++
		return false
	}
	due += path.Delay + time.Duration(l.draw(drawJitter)*float64(path.Jitter))
	it := item{packet: p, due: due}
	if l.draw(drawReorder) < path.Reorder {
		l.stats.Reordered++
		it.overtake = 1 + int(l.draw(drawOvertakes)*maxOvertakes)
	}
	l.push(it)
	if l.draw(drawDuplicate) < path.Duplicate {
		l.stats.Duplicated++
		l.push(item{packet: packet{p.h, twin(p.b)}, due: due})
	}
	return true
}

// pass says when the last of size bytes is through the bottleneck.
func (l *line) pass(now time.Duration, size int64) (time.Duration, bool) {
	rate, queue := l.path.Rate, l.path.Queue
	if rate <= 0 {
		return now, true
	}
	if queue == 0 {
		queue = defaultQueue
	}
	start := max(now, l.free)
	if float64(start-now)/float64(time.Second)*float64(rate) > float64(queue) {
		return 0, false
	}
	l.free = start + time.Duration(float64(size)/float64(rate)*float64(time.Second))
	return l.free, true
}

func (l *line) push(it item) {
	l.queue = append(l.queue, it)
	l.waiting += len(it.b)
}

// next returns a packet that is to go now.
func (l *line) next(now time.Duration) (packet, bool) {
	for {
		for i := range l.held {
			if it := l.held[i]; it.overtake <= 0 || it.due <= now || len(l.held) > maxHeld {
				l.held = append(l.held[:i], l.held[i+1:]...)
				return l.leave(it), true
			}
		}
		if len(l.queue) == 0 || l.queue[0].due > now {
			return packet{}, false
		}
		it := l.queue[0]
		l.queue[0] = item{}
		l.queue = l.queue[1:]
		if it.overtake > 0 {
			late := l.path.Late
			if late == 0 {
				late = defaultLate
			}
			it.due = now + late
			l.held = append(l.held, it)
			continue
		}
		for i := range l.held {
			l.held[i].overtake--
		}
		return l.leave(it), true
	}
}

func (l *line) leave(it item) packet {
	l.waiting -= len(it.b)
	return it.packet
}

// due returns when next has something, if nothing is put before.
func (l *line) due() (at time.Duration, ok bool) {
	if len(l.queue) > 0 {
		at, ok = l.queue[0].due, true
	}
	for _, it := range l.held {
		if !ok || it.due < at {
			at, ok = it.due, true
		}
	}
	return at, ok
}

// A Line is one direction of a Wire without devices, for tests that keep time
// themselves. Times are since any one moment. Not for use by several goroutines.
type Line struct {
	line    line
	scratch []byte
}

// NewLine returns an empty line.
func NewLine(seed uint64, p Path) *Line {
	return &Line{line: line{seed: seed, path: p}, scratch: make([]byte, 0, tun.MaxPacket)}
}

// Set changes the path for the packets to come.
func (l *Line) Set(p Path) { l.line.path = p }

// Put sends a copy of a packet on its way.
func (l *Line) Put(now time.Duration, h tun.Header, b []byte) {
	put := func(p packet) {
		p.b = slices.Clone(p.b)
		l.line.put(now, p, slices.Clone)
	}
	if p := (packet{h, b}); !l.line.path.Cut {
		put(p)
	} else if !cut(p, l.scratch, put) {
		l.line.stats.Refused++
	}
}

// Next returns a packet that is through by now.
func (l *Line) Next(now time.Duration) (h tun.Header, b []byte, ok bool) {
	p, ok := l.line.next(now)
	if ok {
		l.line.stats.Carried++
	}
	return p.h, p.b, ok
}

// Due is when Next has a packet, if none is put before.
func (l *Line) Due() (at time.Duration, ok bool) { return l.line.due() }

// Stats counts what happened so far.
func (l *Line) Stats() Stats { return l.line.stats }
