package soak

import (
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// A share tells how much of the time this process could have run: on a machine
// that others keep busy a connection that stands still may only be waiting for
// a processor.
type share struct {
	waited map[string]uint64 // nanoseconds each thread has waited for one
	lost   time.Duration     // time that was not counted, in all
}

// count returns d less the part of it for which the thread that waited most for
// a processor waited.
func (s *share) count(d time.Duration) time.Duration {
	now := map[string]uint64{}
	worst := time.Duration(0)
	files, _ := filepath.Glob("/proc/self/task/*/schedstat")
	for _, f := range files {
		// Time on a processor, time waiting for one, turns: Documentation/scheduler/sched-stats.rst.
		b, err := os.ReadFile(f)
		var ran, waited uint64
		if err != nil {
			continue
		}
		if _, err := fmt.Sscan(string(b), &ran, &waited); err != nil {
			continue
		}
		now[f] = waited
		if before, ok := s.waited[f]; ok {
			worst = max(worst, time.Duration(waited-before))
		}
	}
	s.waited = now
	worst = min(worst, d)
	s.lost += worst
	return d - worst
}
