package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/ztun/ztun/cmd/internal/zds"
)

// idleEvery is how often a proxy that is about to end looks whether it may.
const idleEvery = 50 * time.Millisecond

// drainAll lets the connections of all pods end by themselves until ctx ends,
// then cuts them. What another proxy has taken over is its own; what none has is
// served on, new connections too: they could only wait for the end of this
// process, and no pod stops before all of them do, since the role of one that was
// yielded comes back when its successor dies.
func (p *pods) drainAll(ctx context.Context, list []zds.PodStatus, log *slog.Logger) {
	var served []*draining
	var live int64
	for _, st := range list {
		if s, ok := st.Proxy.(*pod); ok {
			d := &draining{pod: s, alone: s.stack.Alone()}
			served = append(served, d)
			live += d.live()
		}
	}
	log.Info("the next proxy takes over; until then connections are served", "pods", len(served), "connections", live)
	awaitIdle(ctx, served)
	var wg sync.WaitGroup
	for _, d := range served {
		wg.Go(func() { d.end(ctx, log) })
	}
	wg.Wait()
}

// A draining is a pod of a process that is about to end.
type draining struct {
	*pod
	alone <-chan struct{} // Closed once no predecessor's packets come through here.
}

func (d *draining) live() int64 {
	stats, _, _ := d.tunnel.Stats()
	return stats.Live.Load()
}

func (d *draining) isIdle() bool {
	select {
	case <-d.alone:
		return d.live() == 0
	default:
		return false
	}
}

// awaitIdle returns when no pod has a connection, its own or a predecessor's, or
// ctx ends.
func awaitIdle(ctx context.Context, served []*draining) {
	tick := time.NewTicker(idleEvery)
	defer tick.Stop()
	for {
		idle := true
		for _, d := range served {
			idle = idle && d.isIdle()
		}
		if idle {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// end asks peers to open no more streams, and stops the pod when they have none.
func (d *draining) end(ctx context.Context, log *slog.Logger) {
	d.stack.StopAccepting()
	if err := d.tunnel.Drain(ctx); err != nil {
		log.Info("connections are cut: the deadline has passed", "wl", d.name)
	}
	d.Stop()
}
