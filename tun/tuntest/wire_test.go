package tuntest_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
	"golang.org/x/sys/unix"
)

const patience = 30 * time.Second

// next reads a packet, or returns nil when none came within d. What it
// returns is valid until it is called again.
func next(t testing.TB, dev *tun.Device, d time.Duration) (tun.Header, []byte) {
	t.Helper()
	var v tun.Vector
	v.Set(0, room)
	deadline := time.Now().Add(d)
	for {
		n, h, err := dev.Read(&v)
		if err == nil {
			return h, room[:n]
		}
		if !errors.Is(err, tun.ErrEmpty) {
			t.Fatal(err)
		}
		left := time.Until(deadline)
		if left <= 0 {
			return h, nil
		}
		ts := unix.NsecToTimespec(int64(left))
		_, _ = unix.Ppoll([]unix.PollFd{{Fd: int32(dev.FD()), Events: unix.POLLIN}}, &ts, nil)
	}
}

var room = make([]byte, tun.MaxPacket)

// numbered is a packet that says which one it is.
func numbered(i int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(i)) }

// last ends a sequence of packets.
const last = 1 << 30

// send writes n packets and, until one gets through, the last.
func send(t testing.TB, w *tuntest.Wire, dev *tun.Device, n int) {
	t.Helper()
	for i := range n {
		write(t, dev, tun.Header{}, numbered(i))
	}
	arrived(t, w, uint64(n))
	w.Set(tuntest.Path{}, tuntest.Path{})
	write(t, dev, tun.Header{}, numbered(last))
}

func write(t testing.TB, dev *tun.Device, h tun.Header, b []byte) {
	t.Helper()
	deadline := time.Now().Add(patience)
	err := dev.Write(h, b)
	for errors.Is(err, unix.EAGAIN) && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
		err = dev.Write(h, b)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// arrived waits until n packets are on the way from a to b.
func arrived(t testing.TB, w *tuntest.Wire, n uint64) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if ab, _ := w.Stats(); ab.Packets >= n {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("%d of %d packets came to the wire", ab.Packets, n)
		}
	}
}

// collect reads numbers up to the last.
func collect(t testing.TB, dev *tun.Device) (got []int) {
	t.Helper()
	for {
		_, b := next(t, dev, patience)
		if b == nil {
			t.Fatalf("the last packet did not come, %d others did", len(got))
		}
		i := int(binary.BigEndian.Uint32(b))
		if i == last {
			return got
		}
		got = append(got, i)
	}
}

func TestWireCarriesBothWays(t *testing.T) {
	a, b, w := tuntest.WiredPair(t, tuntest.Options{})
	for i, way := range [][2]*tun.Device{{a, b}, {b, a}} {
		h := tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCPv4, GSOSize: 1448, HdrLen: 40, CsumStart: 20, CsumOffset: 16}
		big := make([]byte, tun.MaxPacket)
		big[100] = byte(i)
		write(t, way[0], h, big)
		if got, p := next(t, way[1], patience); got != h || !slices.Equal(p, big) {
			t.Errorf("way %d: %d bytes with %+v", i, len(p), got)
		}
		for j := range 10_000 {
			write(t, way[0], tun.Header{}, numbered(j))
			if _, p := next(t, way[1], patience); !slices.Equal(p, numbered(j)) {
				t.Fatalf("way %d: packet %d is %x", i, j, p)
			}
		}
	}
	ab, ba := w.Stats()
	if want := (tuntest.Stats{Packets: 10_001, Carried: 10_001}); ab != want || ba != want {
		t.Errorf("stats %+v and %+v", ab, ba)
	}
}

func TestWireWaitsForAFullEnd(t *testing.T) {
	a, b, w := tuntest.WiredPair(t, tuntest.Options{})
	n := fill(t, w, a)
	got := make(chan []int)
	go func() { got <- collect(t, b) }()
	write(t, a, tun.Header{}, numbered(n))
	write(t, a, tun.Header{}, numbered(last))
	if got := <-got; len(got) != n+1 || !slices.IsSorted(got) {
		t.Errorf("%d of %d packets came", len(got), n+1)
	}
}

// fill writes until neither dev nor the wire behind it takes more, and returns
// how many packets it was.
func fill(t *testing.T, w *tuntest.Wire, dev *tun.Device) (n int) {
	t.Helper()
	full, carried := time.Now(), uint64(0)
	for begin := full; time.Since(full) < 50*time.Millisecond; {
		if time.Since(begin) > patience {
			t.Fatalf("still room after %d packets", n)
		}
		if dev.Write(tun.Header{}, numbered(n)) == nil {
			n++
			full = time.Now()
		} else if ab, _ := w.Stats(); ab.Carried != carried {
			full, carried = time.Now(), ab.Carried
		}
	}
	return n
}

func TestWireRepeatsItsFates(t *testing.T) {
	run := func(seed uint64) string {
		a, b, w := tuntest.WiredPair(t, tuntest.Options{Seed: seed, AtoB: tuntest.Path{Loss: 0.1, Duplicate: 0.1, Delay: time.Millisecond}})
		send(t, w, a, 300)
		return fmt.Sprint(collect(t, b))
	}
	first := run(1)
	if again := run(1); again != first {
		t.Errorf("%s\nand then\n%s", first, again)
	}
	if run(2) == first {
		t.Error("two seeds, one fate")
	}
}

func TestWaysHaveFatesOfTheirOwn(t *testing.T) {
	lossy := tuntest.Path{Loss: 0.5}
	a, b, w := tuntest.WiredPair(t, tuntest.Options{AtoB: lossy, BtoA: lossy})
	for i := range 200 {
		write(t, a, tun.Header{}, numbered(i))
		write(t, b, tun.Header{}, numbered(i))
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if ab, ba := w.Stats(); ab.Packets+ba.Packets == 400 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%+v %+v", ab, ba)
		}
	}
	w.Set(tuntest.Path{}, tuntest.Path{})
	write(t, a, tun.Header{}, numbered(last))
	write(t, b, tun.Header{}, numbered(last))
	if ab, ba := collect(t, b), collect(t, a); slices.Equal(ab, ba) {
		t.Error("both ways lost the same packets")
	}
}

func TestWireDelays(t *testing.T) {
	const delay = 30 * time.Millisecond
	a, b, w := tuntest.WiredPair(t, tuntest.Options{AtoB: tuntest.Path{Delay: delay}})
	begin := time.Now()
	send(t, w, a, 1)
	if got := collect(t, b); time.Since(begin) < delay || len(got) != 1 {
		t.Errorf("%v after %v", got, time.Since(begin))
	}
}

func TestWireReordersWhatWaits(t *testing.T) {
	a, b, w := tuntest.WiredPair(t, tuntest.Options{Seed: 5, AtoB: tuntest.Path{Delay: time.Second, Reorder: 0.1}})
	send(t, w, a, 300)
	got := collect(t, b)
	// The very last may overtake some, too.
	for len(got) < 300 {
		_, p := next(t, b, patience)
		if p == nil {
			t.Fatalf("%d of 300 packets came", len(got))
		}
		got = append(got, int(binary.BigEndian.Uint32(p)))
	}
	if slices.IsSorted(got) {
		t.Error("all came in order")
	}
	slices.Sort(got)
	if got = slices.Compact(got); len(got) != 300 {
		t.Errorf("%d of 300 packets came", len(got))
	}
}

// segments counts how often a super-segment of 60 segments, sent n times,
// comes whole or in pieces.
func segments(t *testing.T, path tuntest.Path, n int) (whole, pieces int) {
	t.Helper()
	a, b, w := tuntest.WiredPair(t, tuntest.Options{Seed: 1, AtoB: path})
	ip := make([]byte, 40+60*1000)
	ip[0], ip[9], ip[20+12] = 4<<4|5, 6, 5<<4
	for range n {
		write(t, a, tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCPv4, GSOSize: 1000, HdrLen: 40, CsumStart: 20, CsumOffset: 16}, ip)
	}
	comes := n
	if path.Cut {
		comes *= 60
	}
	arrived(t, w, uint64(comes))
	w.Set(tuntest.Path{}, tuntest.Path{})
	write(t, a, tun.Header{}, numbered(last))
	for {
		switch _, p := next(t, b, patience); len(p) {
		case len(ip):
			whole++
		case 1040:
			pieces++
		case 4:
			return whole, pieces
		default:
			t.Fatalf("a packet of %d bytes", len(p))
		}
	}
}

func TestSuperSegmentsGoWholeOrCut(t *testing.T) {
	if whole, pieces := segments(t, tuntest.Path{}, 20); whole != 20 || pieces != 0 {
		t.Errorf("whole: %d, and %d pieces", whole, pieces)
	}
	if whole, pieces := segments(t, tuntest.Path{Cut: true}, 20); whole != 0 || pieces != 20*60 {
		t.Errorf("cut: %d, and %d pieces", whole, pieces)
	}
	if whole, _ := segments(t, tuntest.Path{Loss: 0.5}, 40); whole < 5 || whole > 35 {
		t.Errorf("whole with loss: %d of 40", whole)
	}
	if _, pieces := segments(t, tuntest.Path{Loss: 0.5, Cut: true}, 40); pieces < 1000 || pieces > 1400 || pieces%60 == 0 {
		t.Errorf("cut with loss: %d of 2400", pieces)
	}
}

func TestWireOutlivesItsEnds(t *testing.T) {
	a, b, w := tuntest.WiredPair(t, tuntest.Options{AtoB: tuntest.Path{Delay: 200 * time.Millisecond}})
	write(t, a, tun.Header{}, numbered(1))
	arrived(t, w, 1)
	a.Close()
	if _, p := next(t, b, patience); !slices.Equal(p, numbered(1)) {
		t.Errorf("%x came", p)
	}
	// The other way has nobody to carry to, and must not be in the way.
	write(t, b, tun.Header{}, numbered(2))
}

func BenchmarkRoundTrip(b *testing.B) {
	trip := func(b *testing.B, x, y *tun.Device) {
		for b.Loop() {
			write(b, x, tun.Header{}, numbered(1))
			_, _ = next(b, y, patience)
			write(b, y, tun.Header{}, numbered(2))
			_, _ = next(b, x, patience)
		}
	}
	b.Run("pair", func(b *testing.B) {
		x, y := tuntest.Pair(b, tun.Options{})
		trip(b, x, y)
	})
	b.Run("wire", func(b *testing.B) {
		x, y, _ := tuntest.WiredPair(b, tuntest.Options{})
		trip(b, x, y)
	})
}

func BenchmarkCut(b *testing.B) {
	x, y, _ := tuntest.WiredPair(b, tuntest.Options{AtoB: tuntest.Path{Cut: true}})
	ip := make([]byte, 40+43*1448)
	ip[0], ip[9], ip[20+12] = 4<<4|5, 6, 5<<4
	b.SetBytes(int64(len(ip)))
	for b.Loop() {
		write(b, x, tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCPv4, GSOSize: 1448, HdrLen: 40, CsumStart: 20, CsumOffset: 16}, ip)
		for range 43 {
			_, _ = next(b, y, patience)
		}
	}
}
