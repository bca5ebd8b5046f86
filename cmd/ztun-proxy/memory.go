package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// After a burst the heap holds what the burst has left: garbage that is not
// collected before as much again was allocated, or two minutes have passed, and
// free memory in store for the next one. A proxy that has come to rest gives both
// back; 3,000 idle connections are 8 % smaller then, 32 pods just added 20 %. It
// costs two collections, which whoever sends meanwhile waits for, so it comes
// when a proxy allocates next to nothing (a request on an established connection
// takes some 100 bytes) and when there is something to be had.
const (
	restEvery = time.Second
	// restAllocs is how much may be allocated in restEvery at rest, in bytes.
	restAllocs = 32 << 10
	// worthAllocs is how much must have been allocated since the last time, in
	// bytes, and worthShare the share of the heap.
	worthAllocs = 1 << 20
	worthShare  = 8
)

// giveBack returns memory whenever the proxy has come to rest, until ctx ends.
func giveBack(ctx context.Context) {
	tick := time.NewTicker(restEvery)
	defer tick.Stop()
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/memory/classes/heap/objects:bytes"}}
	var r rest
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(sample)
		if r.due(sample[0].Value.Uint64(), sample[1].Value.Uint64()) {
			// The first frees what pools hold once the second comes.
			runtime.GC()
			debug.FreeOSMemory()
		}
	}
}

// A rest knows whether the proxy is at rest.
type rest struct {
	last     uint64 // allocated so far, a tick ago
	returned uint64 // allocated so far, when memory was last returned
}

// due says whether memory is to be returned, given how many bytes were allocated
// since the program began, and how many the heap holds.
func (r *rest) due(allocated, heap uint64) bool {
	quiet := allocated-r.last <= restAllocs
	r.last = allocated
	if !quiet || allocated-r.returned < max(worthAllocs, heap/worthShare) {
		return false
	}
	r.returned = allocated
	return true
}
