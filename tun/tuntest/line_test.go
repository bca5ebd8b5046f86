package tuntest

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"
)

const ms = time.Millisecond

// carry puts n numbered packets on a line, one each gap, and returns the
// numbers and times of what comes out.
func carry(l *line, n int, gap time.Duration) (order []int, at []time.Duration) {
	now := time.Duration(0)
	// until lets time pass to end.
	until := func(end time.Duration) {
		for {
			for p, ok := l.next(now); ok; p, ok = l.next(now) {
				order, at = append(order, int(p.b[0])|int(p.b[1])<<8), append(at, now)
			}
			due, ok := l.due()
			if !ok || due > end {
				return
			}
			now = due
		}
	}
	for i := range n {
		now = time.Duration(i) * gap
		until(now)
		l.put(now, packet{b: []byte{byte(i), byte(i >> 8)}}, slices.Clone)
		until(now)
		until(now + gap)
	}
	until(math.MaxInt64)
	return order, at
}

func TestEmptyPathCarriesAllAtOnceInOrder(t *testing.T) {
	l := &line{seed: 1}
	order, at := carry(l, 1000, 0)
	if len(order) != 1000 || !slices.IsSorted(order) || at[999] != 0 {
		t.Errorf("%d packets, last at %v", len(order), at[len(at)-1])
	}
}

func TestChancesAreKept(t *testing.T) {
	const n = 40_000
	for _, c := range []float64{0, 0.001, 0.03, 0.5, 1} {
		l := &line{seed: 7, path: Path{Loss: c}}
		carry(l, n, 0)
		near(t, "lost", l.stats.Lost, n, c)
		l = &line{seed: 7, path: Path{Duplicate: c}}
		order, _ := carry(l, n, 0)
		near(t, "duplicated", l.stats.Duplicated, n, c)
		if uint64(len(order)) != n+l.stats.Duplicated {
			t.Errorf("%d packets came out of %d and %d duplicates", len(order), n, l.stats.Duplicated)
		}
		l = &line{seed: 7, path: Path{Reorder: c}}
		order, _ = carry(l, n, 0)
		near(t, "reordered", l.stats.Reordered, n, c)
		slices.Sort(order)
		if order = slices.Compact(order); len(order) != n {
			t.Errorf("reorder %v: %d of %d packets came out", c, len(order), n)
		}
	}
}

// near checks a count against its expectation, within five deviations.
func near(t *testing.T, what string, got uint64, n, c float64) {
	t.Helper()
	if math.Abs(float64(got)-n*c) > 5*math.Sqrt(n*c*(1-c)) {
		t.Errorf("%s %d of %v, want about %v", what, got, n, n*c)
	}
}

func TestReorderedPacketIsOvertakenByAFew(t *testing.T) {
	l := &line{seed: 3, path: Path{Reorder: 0.05}}
	order, _ := carry(l, 20_000, 0)
	late := 0
	for i, n := range order {
		if n < i {
			late++
			if i-n > 4*maxOvertakes {
				t.Fatalf("packet %d came as number %d", n, i)
			}
		}
	}
	if late < 500 {
		t.Errorf("%d packets came late, want about 1000", late)
	}
}

func TestOvertakingEndsInTime(t *testing.T) {
	l := &line{seed: 3, path: Path{Reorder: 1, Delay: 10 * ms}}
	_, at := carry(l, 1, 0)
	if len(at) != 1 || at[0] != 10*ms+defaultLate {
		t.Errorf("a lone packet came at %v, want %v", at, 10*ms+defaultLate)
	}
}

func TestDelayAndJitterKeepTheOrder(t *testing.T) {
	l := &line{seed: 9, path: Path{Delay: 20 * ms, Jitter: 10 * ms}}
	order, at := carry(l, 1000, 5*ms)
	if !slices.IsSorted(order) || len(order) != 1000 {
		t.Error("the order changed")
	}
	least, most := time.Hour, time.Duration(0)
	for i := range at {
		took := at[i] - time.Duration(i)*5*ms
		least, most = min(least, took), max(most, took)
	}
	if least < 20*ms || least > 21*ms || most > 30*ms || most < 29*ms {
		t.Errorf("packets took %v to %v, want 20 to 30 ms", least, most)
	}
}

func TestRateHoldsPacketsBackAndLosesTheRest(t *testing.T) {
	const rate = 1000 * 2 // a thousand of our packets a second
	l := &line{path: Path{Rate: rate, Queue: 100}}
	order, at := carry(l, 1000, 0)
	// 50 packets wait in 100 bytes; the one in the bottleneck, too, and one more
	// that finds exactly 100 bytes.
	if len(order) != 51 || at[len(at)-1] != 51*ms || l.stats.Overflowed != 949 {
		t.Errorf("%d packets came, the last at %v, %d overflowed", len(order), at[len(at)-1], l.stats.Overflowed)
	}
	l = &line{path: Path{Rate: rate}}
	if order, at = carry(l, 1000, 2*ms); len(order) != 1000 || at[999] != 999*2*ms+ms {
		t.Errorf("%d packets at half the rate, the last at %v", len(order), at[len(at)-1])
	}
}

func TestWaitingIsBounded(t *testing.T) {
	l := &line{path: Path{Delay: time.Second}}
	big := make([]byte, 60<<10)
	for l.put(0, packet{b: big}, slices.Clone) {
	}
	if l.waiting > maxWaiting || l.stats.Overflowed != 1 {
		t.Errorf("%d bytes wait, %d overflowed", l.waiting, l.stats.Overflowed)
	}
	for {
		if _, ok := l.next(time.Second); !ok {
			break
		}
	}
	if l.waiting != 0 {
		t.Errorf("%d bytes wait on an empty line", l.waiting)
	}
}

func TestSameSeedSameFates(t *testing.T) {
	fates := func(seed uint64, p Path, gap time.Duration) string {
		l := &line{seed: seed, path: p}
		order, _ := carry(l, 2000, gap)
		slices.Sort(order)
		return fmt.Sprint(order, l.stats)
	}
	p := Path{Loss: 0.1, Duplicate: 0.1, Reorder: 0.1, Jitter: ms}
	if fates(1, p, 0) != fates(1, p, 3*ms) {
		t.Error("the fates depend on when packets come")
	}
	if fates(1, p, 0) == fates(2, p, 0) {
		t.Error("two seeds, one fate")
	}
	// One chance does not move the others.
	lost := func(p Path) string {
		l := &line{seed: 1, path: p}
		order, _ := carry(l, 2000, 0)
		slices.Sort(order)
		return fmt.Sprint(slices.Compact(order))
	}
	if lost(p) != lost(Path{Loss: 0.1}) {
		t.Error("duplicates and reordering change what is lost")
	}
}
