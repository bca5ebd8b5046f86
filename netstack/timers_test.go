package netstack

import (
	"container/heap"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// newTimers returns the timers of an engine's only reader, which has nothing
// else to do.
func newTimers(t *testing.T) *timers {
	e, err := New(Config{Readers: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return &e.readers[0].timers
}

func TestTimersGoOffInOrder(t *testing.T) {
	set := newTimers(t)
	const n = 500
	var got []time.Duration
	done := make(chan struct{})
	start := time.Now()
	for i := range n {
		d := rand.N(50 * time.Millisecond)
		due := time.Since(start) + d
		set.start(d, func() {
			if early := due - time.Since(start); early > 0 {
				t.Errorf("%v early", early)
			}
			if got = append(got, due.Truncate(time.Millisecond)); len(got) == n {
				close(done)
			}
		})
		if i%100 == 0 {
			<-time.After(time.Millisecond) // the reader sleeps, and must be woken for an earlier one
		}
	}
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("some timers never went off")
	}
	if cap := cap(set.queue); cap > 1024 {
		t.Errorf("an empty queue has room for %d", cap)
	}
}

// at starts a timer that was due at a moment long ago.
func (t *timers) at(moment int64, f func()) *timer {
	m := t.start(time.Hour, f)
	t.mu.Lock()
	defer t.mu.Unlock()
	m.due = moment
	heap.Fix(&t.queue, int(m.index))
	return m
}

func TestTimersRunByDueTime(t *testing.T) {
	set := newTimers(t)
	var got []int64
	do(set.reader, func() int {
		for _, moment := range []int64{5, 1, 4, 2, 3} {
			set.at(moment, func() { got = append(got, moment) })
		}
		set.run(time.Now())
		return 0
	})
	if want := []int64{1, 2, 3, 4, 5}; !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
}

// Stop on the loop is a promise, also when the timer is due already.
func TestStoppedTimerDoesNotGoOff(t *testing.T) {
	set := newTimers(t)
	do(set.reader, func() int {
		late := set.at(2, func() { t.Error("went off after Stop") })
		set.at(1, func() {
			if !late.Stop() {
				t.Error("Stop = false for a timer that has not gone off")
			}
		})
		set.run(time.Now())
		if late.Stop() {
			t.Error("Stop = true for a stopped timer")
		}
		return 0
	})
}

func TestTimerResetByAnyone(t *testing.T) {
	set := newTimers(t)
	var fired atomic.Int64
	timers := make([]*timer, 100)
	for i := range timers {
		timers[i] = set.start(time.Hour, func() { fired.Add(1) })
	}
	var all sync.WaitGroup
	for g := range 4 {
		all.Go(func() {
			for range 2000 {
				m := timers[rand.IntN(len(timers))]
				if g == 0 {
					m.Stop()
				} else {
					m.Reset(time.Duration(rand.IntN(3)) * time.Hour)
				}
			}
		})
	}
	all.Wait()
	for _, m := range timers {
		m.Reset(0)
	}
	before := fired.Load()
	eventually(t, "every timer goes off", func() bool { return fired.Load() >= before+1 && set.isEmpty() })
}

func (t *timers) isEmpty() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.queue) == 0
}

// A reader with thousands of idle connections wakes for many keepalives at once.
func TestLongTimersGoOffTogether(t *testing.T) {
	set := newTimers(t)
	dues := map[int64]bool{}
	for i := range 1000 {
		m := set.start(180*time.Second+time.Duration(i)*time.Millisecond/10, func() {})
		if left := time.Duration(m.due - int64(time.Since(set.base))); left < 180*time.Second || left > 181*time.Second {
			t.Fatalf("a timer of 180 s goes off in %v", left)
		}
		dues[m.due] = true
	}
	if len(dues) > 10 {
		t.Errorf("the reader wakes %d times within 100 ms", len(dues))
	}
	if d := set.start(math.MaxInt64, func() {}); d.due < 0 {
		t.Error("the end of time has passed")
	}
}
