package mesh

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestWaitLocal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		type answer struct {
			found *Workload
			err   error
		}
		wait := func(timeout time.Duration) chan answer {
			c := make(chan answer, 1)
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				defer cancel()
				found, err := w.WaitLocal(ctx, "a", "ns", "a")
				c <- answer{found, err}
			}()
			return c
		}
		late := wait(5 * time.Second)
		if got := <-late; !errors.Is(got.err, context.DeadlineExceeded) || got.found != nil {
			t.Errorf("WaitLocal = %v, want the deadline", got)
		}
		c := wait(5 * time.Second)
		synctest.Wait()
		w.put(pod("ns", "b", "10.0.0.2"))
		synctest.Wait()
		if len(c) != 0 {
			t.Error("another workload ended the wait")
		}
		w.put(pod("ns", "a", "10.0.0.1"))
		if got := <-c; got.err != nil || got.found.Name != "a" {
			t.Errorf("WaitLocal = %v", got)
		}
		if got := <-wait(0); got.found == nil {
			t.Errorf("WaitLocal of what is there = %v, want it even after the deadline", got.err)
		}
		if len(w.watchers) != 0 {
			t.Errorf("%d watchers are left", len(w.watchers))
		}
	})
}

func TestWatchHasOneSlot(t *testing.T) {
	w := newWorld(t, Config{})
	watch, other := w.Watch(), w.Watch()
	for i := range 3 {
		w.put(pod("ns", fmt.Sprint(i), "10.0.0.1"))
	}
	<-watch.C
	select {
	case <-watch.C:
		t.Error("two wake-ups are waiting")
	default:
	}
	other.Stop()
	other.Stop()
	watch.Stop()
	w.policies(policy("ns", "n", inside))
	if len(watch.C) != 0 {
		t.Error("a stopped watch was woken")
	}
	if s := w.Snapshot(); s.Version != 4 || s.PolicyVersion != 1 {
		t.Errorf("version %d, of policies %d; want 4 and 1", s.Version, s.PolicyVersion)
	}
}

// Older snapshots share arrays and nodes with the ones that are made
// meanwhile: the race detector watches.
func TestReadersAndAWriter(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(source(), svc("ns", "s", at80("10.1.0.1", "10.2.0.0/16")), pod("ns", "base", "10.0.0.1", in("ns/s.ns", 80, 8080)))
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				s := w.Snapshot()
				src := s.Local("src", "ns", "src")
				if _, err := s.Resolve(src, netip.MustParseAddrPort("10.1.0.1:80")); err != nil {
					t.Error(err)
				}
				if s.WorkloadByIP("", addrOf("10.0.0.1")) == nil || len(s.Endpoints(s.ServiceByVIP("", addrOf("10.2.0.1"), "ns"))) == 0 {
					t.Error("not found")
				}
				s.Policies(src)
				s.Dump()
			}
		})
	}
	for i := range 200 {
		name := fmt.Sprint(i % 20)
		w.put(pod("ns", name, "10.0.0.1", in("ns/s.ns", 80, 8080)), svc("x", name, host("s.ns"), at80("10.1.0.1", "10.2.0.0/16")))
		w.policies(policy("ns", name, inside))
		if i%3 == 0 {
			w.remove("cluster1//Pod/ns/"+name, "x/s.ns")
		}
	}
	close(stop)
	wg.Wait()
}

func TestManyMayNotShareOneAddress(t *testing.T) {
	w := newWorld(t, Config{})
	old := maxSharedFor(t, w)
	if rejected := w.try(pod("ns", "new", "10.0.0.1")); len(rejected) != 1 {
		t.Errorf("rejected = %v, want one more workload to be refused", rejected)
	}
	if rejected := w.try(old); len(rejected) != 0 {
		t.Errorf("rejected = %v, want an update to fit", rejected)
	}
}

// maxSharedFor fills one address and returns one of its workloads.
func maxSharedFor(t *testing.T, w world) *pbWorkload {
	t.Helper()
	e := newEdit(w.Snapshot())
	for i := range maxShared {
		p, err := w.config.workload(pod("ns", fmt.Sprint(i), "10.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		if err := e.putWorkload(p); err != nil {
			t.Fatal(err)
		}
	}
	w.publish(e.next)
	return pod("ns", "7", "10.0.0.1")
}

func TestOnChange(t *testing.T) {
	w := newWorld(t, Config{})
	calls := 0
	stop := w.OnChange(func() {
		if w.Snapshot().Version == 0 {
			t.Error("called before the change is to be seen")
		}
		calls++
	})
	w.put(pod("ns", "a", "10.0.0.1"))
	w.put(pod("ns", "b", "10.0.0.2"))
	if calls != 2 {
		t.Errorf("%d calls for two changes", calls)
	}
	stop()
	w.put(pod("ns", "c", "10.0.0.3"))
	if calls != 2 {
		t.Errorf("%d calls, of them some after stop", calls)
	}
}
