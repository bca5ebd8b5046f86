package soak

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"
)

// A level is what the process holds.
type level struct {
	heap       int64 // bytes in use after a collection
	goroutines int
	files      int // open descriptors
	flows      int // of all stacks
}

func (l level) String() string {
	return fmt.Sprintf("heap %.1f MiB, %d goroutines, %d descriptors, %d flows", float64(l.heap)/(1<<20), l.goroutines, l.files, l.flows)
}

// slack is by how much a level may exceed that after the first epochs. The
// heap's is for endpoints in TIME_WAIT, of which each stack keeps up to 1,024,
// and for what pools keep.
var slack = level{heap: 24 << 20, goroutines: 40, files: 12, flows: 12}

// above names what is above the slack, or returns "".
func (l level) above(first level) string {
	var s []string
	say := func(what string, now, then, slack int64) {
		if now > then+slack {
			s = append(s, fmt.Sprintf("%s: %d, after the first epochs %d", what, now, then))
		}
	}
	say("bytes of heap", l.heap, first.heap, slack.heap)
	say("goroutines", int64(l.goroutines), int64(first.goroutines), int64(slack.goroutines))
	say("descriptors", int64(l.files), int64(first.files), int64(slack.files))
	say("flows", int64(l.flows), int64(first.flows), int64(slack.flows))
	return strings.Join(s, "; ")
}

// most is the higher of two levels, in each.
func (l level) most(o level) level {
	return level{max(l.heap, o.heap), max(l.goroutines, o.goroutines), max(l.files, o.files), max(l.flows, o.flows)}
}

// measureLevel takes the level now.
func measureLevel(flows int) level {
	// What a finalizer or a pool holds on to goes with the second and third.
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	files, _ := os.ReadDir("/proc/self/fd")
	return level{int64(m.HeapAlloc), runtime.NumGoroutine(), len(files), flows}
}

// settle measures until good, or until patience ends; once if good is nil.
func settle(patience time.Duration, flows func() int, good func(level) bool) level {
	deadline := time.Now().Add(patience)
	for {
		l := measureLevel(flows())
		if good == nil || good(l) || time.Now().After(deadline) {
			return l
		}
		time.Sleep(100 * time.Millisecond)
	}
}
