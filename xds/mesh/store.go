package mesh

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
)

// Config is what a Store needs to know. The zero value is usable.
type Config struct {
	// LocalNode is this node's name; workloads on it are local. Empty: all are.
	LocalNode string
	// TrustDomain is that of workloads which name none. Default cluster.local.
	TrustDomain string
	// Rand returns a random number in [0, n), for n > 0, and may be called from
	// any goroutine. Default math/rand/v2.
	Rand func(n uint64) uint64
}

// A Store holds the current Snapshot and makes the next ones from what the
// handlers of Addresses and Authorizations are given.
type Store struct {
	// Set by NewStore, read-only after.
	config Config

	current atomic.Pointer[Snapshot]

	// writing is held while the next snapshot is made.
	writing sync.Mutex

	// mu guards the field below.
	mu       sync.Mutex
	watchers map[*watcher]struct{}
}

// A watcher has its function called after a change.
type watcher struct{ wake func() }

// NewStore returns a Store of an empty mesh.
func NewStore(config Config) *Store {
	if config.TrustDomain == "" {
		config.TrustDomain = "cluster.local"
	}
	if config.Rand == nil {
		config.Rand = rand.Uint64N
	}
	s := &Store{config: config, watchers: make(map[*watcher]struct{})}
	s.current.Store(&Snapshot{config: &s.config})
	return s
}

// Snapshot returns the mesh as it is now; never nil.
func (s *Store) Snapshot() *Snapshot { return s.current.Load() }

// OnChange calls wake whenever the snapshot has changed after OnChange has
// returned, until stop is called; a call that has begun by then is not waited
// for. wake may be called from any goroutine and must not block.
func (s *Store) OnChange(wake func()) (stop func()) {
	w := &watcher{wake}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers[w] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, w)
	}
}

// A Watch gets a wake-up when the snapshot has changed.
type Watch struct {
	// C holds at most one wake-up; several changes may share it.
	C <-chan struct{}

	stop func()
}

// Watch begins to watch. A change after Watch returns wakes; one before may not.
// Stop must be called.
func (s *Store) Watch() *Watch {
	c := make(chan struct{}, 1)
	return &Watch{C: c, stop: s.OnChange(func() {
		select {
		case c <- struct{}{}:
		default:
		}
	})}
}

// Stop ends the watch. It is idempotent.
func (w *Watch) Stop() { w.stop() }

// WaitLocal returns the local workload with this name, namespace and service
// account, waiting for it until ctx ends.
func (s *Store) WaitLocal(ctx context.Context, name, namespace, serviceAccount string) (*Workload, error) {
	watch := s.Watch()
	defer watch.Stop()
	for {
		if w := s.Snapshot().Local(name, namespace, serviceAccount); w != nil {
			return w, nil
		}
		select {
		case <-watch.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("mesh: wait for workload %s/%s (service account %s): %w", namespace, name, serviceAccount, context.Cause(ctx))
		}
	}
}

// publish makes next the current snapshot and wakes every watcher.
func (s *Store) publish(next *Snapshot) {
	next.Version++
	s.current.Store(next)
	s.mu.Lock()
	watchers := slices.Collect(maps.Keys(s.watchers))
	s.mu.Unlock()
	for _, w := range watchers {
		w.wake()
	}
}
