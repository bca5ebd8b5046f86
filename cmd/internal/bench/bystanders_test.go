package main

import (
	"context"
	"sync/atomic"
	"testing"
	"time"
)

// busyBench is a bench with a worker beside the direct leg, and a function
// that keeps it busy for a while, and an idle one.
func busyBench(t *testing.T) (b *bench, busy func(time.Duration) error) {
	t.Helper()
	b = newWire(t)
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := b.legs[0]
	for _, name := range []string{"busy", "idle"} {
		a, err := startAgent(t.Context(), b.site, b.program, l.client.key())
		if err != nil {
			t.Fatal(err)
		}
		b.agents[name] = a
	}
	return b, func(d time.Duration) error {
		_, err := b.agents["busy"].ask(t.Context(), order{Do: "requests", Addr: b.server(l), Conns: 4, For: d}, time.Minute)
		return err
	}
}

// loadTrial is a trial of load that does f.
func loadTrial(f func() error) trial {
	return trial{rows: []row{{name: "some row"}}, load: true, measure: func(context.Context, *bench, *leg) (map[string]float64, error) {
		return nil, f()
	}}
}

func TestBusyBystanderIsNamed(t *testing.T) {
	b, busy := busyBench(t)
	burn := loadTrial(func() error { return busy(300 * time.Millisecond) })
	calm := burn
	calm.load = false
	if _, err := b.runOn(t.Context(), calm, b.legs[0], 0); err != nil || b.busiest.leg != "" {
		t.Fatalf("without load: %+v, %v, want nothing noted", b.busiest, err)
	}
	if _, err := b.runOn(t.Context(), burn, b.legs[0], 0); err != nil {
		t.Fatal(err)
	}
	noted := b.busiest
	if noted.most != "busy" || noted.leg != legDirect || noted.row != "some row" || noted.share <= 0 {
		t.Errorf("noted %+v, want the busy worker beside the direct leg", noted)
	}
	// It is the most that counts, not the last.
	if _, err := b.runOn(t.Context(), loadTrial(func() error { return nil }), b.legs[0], 0); err != nil {
		t.Fatal(err)
	}
	if b.busiest != noted {
		t.Errorf("after a calm trial: %+v, want %+v still", b.busiest, noted)
	}
}

// What a leg left to be done is not at the cost of the next one.
func TestTrialWaitsForQuiet(t *testing.T) {
	b, busy := busyBench(t)
	var ended atomic.Bool
	over := make(chan error)
	go func() {
		err := busy(500 * time.Millisecond)
		ended.Store(true)
		over <- err
	}()
	// Not before it has begun.
	for start := time.Now(); ; {
		used, err := b.cpuOf(t.Context(), []bystander{{"busy", b.agents["busy"].pid}})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
		now, err := b.cpuOf(t.Context(), []bystander{{"busy", b.agents["busy"].pid}})
		if err != nil {
			t.Fatal(err)
		}
		if now[0]-used[0] > time.Millisecond || time.Since(start) > 10*time.Second {
			break
		}
	}
	began := time.Now()
	_, err := b.runOn(t.Context(), loadTrial(func() error {
		if waited := time.Since(began); !ended.Load() && waited < quietBy {
			t.Errorf("measured after %v beside a busy worker, want it to end first", waited)
		}
		return nil
	}), b.legs[0], 0)
	if err := <-over; err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}
