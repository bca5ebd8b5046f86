package main

import (
	"context"
	"runtime"
	"testing"
	"time"
)

func TestMemoryIsGivenBackAtRest(t *testing.T) {
	const mib = 1 << 20
	var r rest
	for _, step := range []struct {
		why             string
		allocated, heap uint64
		want            bool
	}{
		{"busy from the start", 5 * mib, 5 * mib, false},
		{"at rest", 5 * mib, 5 * mib, true},
		{"nothing since", 5 * mib, 5 * mib, false},
		{"a little since", 5*mib + 100<<10, 5 * mib, false},
		{"a burst", 50 * mib, 40 * mib, false},
		{"the burst goes on", 90 * mib, 80 * mib, false},
		{"at rest again", 90*mib + 10<<10, 80 * mib, true},
		{"a small burst", 95 * mib, 85 * mib, false},
		{"not worth two collections of a heap that large", 95 * mib, 85 * mib, false},
		{"another", 102 * mib, 92 * mib, false},
		{"worth it together", 102 * mib, 92 * mib, true},
	} {
		if got := r.due(step.allocated, step.heap); got != step.want {
			t.Errorf("%s: due = %v", step.why, got)
		}
	}
	trickle := uint64(102 * mib)
	for _, tt := range []struct {
		each        uint64 // bytes a second
		least, most int
	}{{20 << 10, 10, 20}, {200 << 10, 0, 0}} {
		calls := 0
		for range 1000 {
			trickle += tt.each
			if r.due(trickle, 8*mib) {
				calls++
			}
		}
		if calls < tt.least || calls > tt.most {
			t.Errorf("%d times in 1,000 s of %d bytes a second, want %d to %d", calls, tt.each, tt.least, tt.most)
		}
	}
}

func TestBurstLeavesNothingBehind(t *testing.T) {
	const burst = 64 << 20
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); giveBack(ctx) }()
	pieces := make([][]byte, burst>>12)
	for i := range pieces {
		pieces[i] = make([]byte, 1<<12)
	}
	runtime.KeepAlive(pieces)
	for deadline := time.Now().Add(20 * time.Second); ; <-time.After(50 * time.Millisecond) {
		runtime.ReadMemStats(&now)
		held := now.HeapSys - now.HeapReleased
		if now.NumForcedGC > before.NumForcedGC && held < before.HeapSys-before.HeapReleased+burst/4 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d MiB are held still, %d forced collections", held>>20, now.NumForcedGC-before.NumForcedGC)
		}
	}
	cancel()
	<-done
}
