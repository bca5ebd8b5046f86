package main

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestHistogramQuantilesAreCloseToSorted(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var h, half histogram
	var all []time.Duration
	for i := range 20_000 {
		d := time.Duration(math.Exp(random.Float64()*20)) * time.Nanosecond
		all = append(all, d)
		if i%2 == 0 {
			h.record(d)
		} else {
			half.record(d)
		}
	}
	h.merge(&half)
	slices.Sort(all)
	if h.total() != uint64(len(all)) {
		t.Fatalf("total = %d, want %d", h.total(), len(all))
	}
	for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
		got, want := h.quantile(q), all[max(0, int(q*float64(len(all))+0.5)-1)]
		if diff := math.Abs(float64(got - want)); diff > float64(want)/32+1 {
			t.Errorf("quantile(%v) = %v, want %v within 1/32", q, got, want)
		}
	}
}

func TestHistogramBucketsFollowEachOther(t *testing.T) {
	last := -1
	for shift := range 62 {
		for _, n := range []int64{1 << shift, 1<<shift + 1<<shift/2, 1<<(shift+1) - 1} {
			b := bucketOf(time.Duration(n))
			if b < last {
				t.Errorf("bucketOf(%d) = %d, less than %d of a shorter one", n, b, last)
			}
			last = b
			if m := middle(b); bucketOf(m) != b {
				t.Errorf("middle(%d) = %d, which is in bucket %d", b, m, bucketOf(m))
			}
		}
	}
	if got := bucketOf(-time.Second); got != 0 {
		t.Errorf("bucketOf(-1s) = %d, want 0", got)
	}
	var empty histogram
	if got := empty.quantile(0.5); got != 0 {
		t.Errorf("quantile of nothing = %v, want 0", got)
	}
}

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{3}, 3},
		{[]float64{9, 1, 2}, 2},
		{[]float64{4, 1, 2, 100}, 3},
	} {
		values := slices.Clone(tt.values)
		if got := median(tt.values); got != tt.want || !slices.Equal(values, tt.values) {
			t.Errorf("median(%v) = %v, want %v, and the values as they were", values, got, tt.want)
		}
	}
}

func TestRatioIsOfTheSameRound(t *testing.T) {
	f := newFigures(3)
	speed := row{name: "speed", unit: "1/s"}
	// The machine gets slower from round to round; the ratio stays.
	for round, direct := range []float64{100, 50, 10} {
		f.set("speed", legDirect, round, direct)
		f.set("speed", legHBONE, round, direct/4)
	}
	got, ok := f.of(speed, legHBONE)
	if !ok || got.ToDirect == nil || *got.ToDirect != 0.25 || got.Median != 12.5 || got.Min != 2.5 || got.Max != 25 {
		t.Errorf("of(speed, hbone) = %+v, %v, want a ratio of 0.25 and 12.5 (2.5 to 25)", got, ok)
	}
	if got, ok := f.of(speed, legDirect); !ok || got.ToDirect == nil || *got.ToDirect != 1 {
		t.Errorf("of(speed, direct) = %+v, %v, want a ratio of 1", got, ok)
	}
}

func TestRoundsWithoutAValueDoNotCount(t *testing.T) {
	f := newFigures(3)
	f.set("speed", legDirect, 0, 100)
	f.set("speed", legHBONE, 1, 7)
	f.set("speed", legPlain, 0, 50)
	f.set("speed", legPlain, 2, 60)
	if got, ok := f.of(row{name: "speed"}, legHBONE); !ok || got.Median != 7 || got.ToDirect != nil {
		t.Errorf("without a direct value in its round: %+v, %v, want 7 without a ratio", got, ok)
	}
	if got, ok := f.of(row{name: "speed"}, legPlain); !ok || got.Median != 55 || *got.ToDirect != 0.5 {
		t.Errorf("with one round to compare: %+v, %v, want 55 with a ratio of 0.5", got, ok)
	}
	if got, ok := f.of(row{name: "speed", alone: true}, legPlain); !ok || got.ToDirect != nil {
		t.Errorf("a row that stands alone: %+v, %v, want no ratio", got, ok)
	}
	if got, ok := f.of(row{name: "speed"}, legRedirect); ok {
		t.Errorf("a leg that was not measured: %+v, want none", got)
	}
}
