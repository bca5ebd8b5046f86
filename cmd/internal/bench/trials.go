package main

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"time"
)

// A trial is one measurement of a leg. It may fill several rows.
type trial struct {
	rows []row
	// measure returns values by row.
	measure func(ctx context.Context, b *bench, l *leg) (map[string]float64, error)
	// load trials are worth a profile; the others kill proxies.
	load bool
	// only is the leg that it makes sense for. Empty: all.
	only string
	// adjust changes the values of a round, by leg and row, once all legs
	// have been measured. May be nil.
	adjust func(values map[string]map[string]float64)
}

func (t trial) name() string { return t.rows[0].name }

func (t trial) skips(l *leg) bool { return t.only != "" && t.only != l.name }

// allTrials are in the order of measurement: memory last, after load.
func allTrials() []trial {
	return []trial{
		streamTrial("stream-1-up", 1, false),
		streamTrial("stream-1-down", 1, true),
		streamTrial("stream-8-up", 8, false),
		streamTrial("stream-8-down", 8, true),
		requestTrial("rps-8", order{Conns: 8}),
		requestTrial("rps-64", order{Conns: 64}),
		requestTrial("new-conns", order{Conns: 8, Fresh: true}),
		pacedTrial(),
		rssTrial(),
		idleConnsTrial(),
		idlePodsTrial(),
	}
}

// selected returns the trials that fill a row which matches.
func selected(trials []trial, rows *regexp.Regexp) []trial {
	return slices.DeleteFunc(trials, func(t trial) bool {
		return !slices.ContainsFunc(t.rows, func(r row) bool { return rows.MatchString(r.name) })
	})
}

// warmup is how long load runs before it counts.
const warmup = 500 * time.Millisecond

// streamTrial measures streams where their bytes arrive.
func streamTrial(name string, n int, down bool) trial {
	measure := func(ctx context.Context, b *bench, l *leg) (_ map[string]float64, err error) {
		client, receiver := b.agents[l.client.key()], b.agents[l.server.key()]
		if down {
			receiver = client
		}
		if _, err := client.ask(ctx, order{Do: "streams", Addr: b.server(l), Conns: n, Down: down}, 2*connectTimeout); err != nil {
			return nil, err
		}
		defer func() {
			if _, endErr := client.ask(ctx, order{Do: "end-streams"}, connectTimeout); err == nil {
				err = endErr
			}
		}()
		if err := sleep(ctx, warmup); err != nil {
			return nil, err
		}
		from, err := receiver.ask(ctx, order{Do: "count"}, connectTimeout)
		if err != nil {
			return nil, err
		}
		if err := sleep(ctx, b.Window); err != nil {
			return nil, err
		}
		to, err := receiver.ask(ctx, order{Do: "count"}, connectTimeout)
		if err != nil {
			return nil, err
		}
		if to.Bytes == from.Bytes {
			return nil, fmt.Errorf("bench: nothing arrived in %v", b.Window)
		}
		return map[string]float64{name: float64(to.Bytes-from.Bytes) * 8 / float64(to.Clock-from.Clock)}, nil
	}
	return trial{rows: []row{{name: name, unit: "Gbit/s"}}, load: true, measure: measure}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return fmt.Errorf("bench: %w", context.Cause(ctx))
	}
}

// requests runs requests on a leg.
func (b *bench) requests(ctx context.Context, l *leg, o order) (*load, error) {
	o.Do, o.Addr, o.Warm, o.For = "requests", b.server(l), warmup, b.Window
	a, err := b.agents[l.client.key()].ask(ctx, o, o.Warm+o.For+2*connectTimeout)
	if err != nil {
		return nil, err
	}
	switch got := a.Load; {
	case got == nil || got.Done == 0:
		return nil, fmt.Errorf("bench: no request was answered in %v", b.Window)
	case got.Failed*100 > got.Done:
		return nil, fmt.Errorf("bench: %d of %d requests failed, first: %s", got.Failed, got.Failed+got.Done, got.Failure)
	default:
		return got, nil
	}
}

// requestTrial measures requests at full speed.
func requestTrial(name string, o order) trial {
	return trial{rows: []row{{name: name, unit: "1/s"}}, load: true, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		got, err := b.requests(ctx, l, o)
		if err != nil {
			return nil, err
		}
		return map[string]float64{name: float64(got.Done) / got.Window.Seconds()}, nil
	}}
}

// pacedRate is that of the rows at a fixed rate, requests a second.
const pacedRate = 2000

// pacedTrial measures what requests at a fixed rate cost, and how long they take.
func pacedTrial() trial {
	const cpu, p50, p99 = "cpu-per-request", "p50", "p99"
	rows := []row{{name: cpu, unit: "us", alone: true}, {name: p50, unit: "us"}, {name: p99, unit: "us"}}
	return trial{rows: rows, load: true, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		pids, err := b.pids(ctx, l)
		if err != nil {
			return nil, err
		}
		before, err := b.read(ctx, pids, false)
		if err != nil {
			return nil, err
		}
		got, err := b.requests(ctx, l, order{Conns: 8, Rate: pacedRate})
		if err != nil {
			return nil, err
		}
		after, err := b.read(ctx, pids, false)
		if err != nil {
			return nil, err
		}
		micros := func(d time.Duration) float64 { return float64(d) / 1e3 }
		values := map[string]float64{p50: micros(got.Latency.quantile(0.5)), p99: micros(got.Latency.quantile(0.99))}
		if len(pids) > 0 {
			values[cpu] = micros(after.cpu-before.cpu) / float64(got.Total)
		}
		return values, nil
	}}
}
