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
	// parts are measured in its place, one right after the other on each leg:
	// what is compared within a leg. Each has a profile of its own.
	parts []trial
	// load trials are worth a profile; the others kill proxies.
	load bool
	// long trials take minutes, and are measured only where rows are named.
	long bool
	// only is the leg that it makes sense for. Empty: all.
	only string
	// shared trials are about a proxy that several pods share: the bench's own
	// has one.
	shared bool
	// stage is what it needs in the lab. Trials next to each other may share
	// one. Nil: nothing.
	stage *stage
	// settings are made one after the other in each round, back and forth;
	// all legs are measured in each, and all values count. Nil: there is one.
	settings []func(ctx context.Context, b *bench) error
	// adjust changes the values of a round, by leg and row, once all legs
	// have been measured. May be nil.
	adjust func(values map[string]map[string]float64)
}

func (t trial) name() string { return t.rows[0].name }

// split returns the parts, or the trial as its only one.
func (t trial) split() []trial {
	if t.parts == nil {
		return []trial{t}
	}
	return t.parts
}

func (t trial) skips(l *leg) bool {
	return t.only != "" && t.only != l.name || t.shared && l.redirects()
}

// allTrials are in the order of measurement: memory after load, and last what
// changes the lab.
func allTrials(o options) []trial {
	beside := &stage{clients: o.Beside, servers: o.Beside}
	return []trial{
		streamTrial("stream-1-up", 1, false),
		streamTrial("stream-1-down", 1, true),
		streamTrial("stream-8-up", 8, false),
		streamTrial("stream-8-down", 8, true),
		requestTrial("rps-8", order{Conns: 8}),
		requestTrial("rps-64", order{Conns: 64}),
		requestTrial("rps-512", order{Conns: 512}),
		requestTrial("new-conns", order{Conns: 8, Fresh: true}),
		freshPacedTrial(),
		pacedTrial(),
		stallTrial(),
		rssTrial(),
		restTrial(),
		idlePodsTrial(o.Pods),
		fairTrial(beside),
		idleConnsTrial(o.Conns, beside),
		idleManyTrial(o.Idle, beside),
		podsTrial(o.Spread),
		servicesTrial(o.Services),
		manyIdlePodsTrial(o.IdlePods),
	}
}

// selected returns the trials that fill a row which matches; without an
// expression, those that do not take long.
func selected(trials []trial, rows *regexp.Regexp) []trial {
	return slices.DeleteFunc(trials, func(t trial) bool {
		if rows == nil {
			return t.long
		}
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
	o.Addr = b.server(l)
	return b.requestsOf(ctx, b.agents[l.client.key()], o)
}

// requestsOf makes an agent run requests.
func (b *bench) requestsOf(ctx context.Context, client *agent, o order) (*load, error) {
	o.Do, o.Warm, o.For = "requests", warmup, b.Window
	a, err := client.ask(ctx, o, o.Warm+o.For+2*connectTimeout)
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
		return map[string]float64{name: got.rate()}, nil
	}}
}

// freshRate is that of new connections at a fixed rate, a second.
const freshRate = 300

// freshPacedTrial measures how long a new connection and its one request take.
func freshPacedTrial() trial {
	const p99 = "new-conns-p99"
	return trial{rows: []row{{name: p99, unit: "us"}}, load: true, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		got, err := b.requests(ctx, l, order{Conns: 64, Fresh: true, Rate: freshRate})
		if err != nil {
			return nil, err
		}
		return map[string]float64{p99: micros(got.Latency.quantile(0.99))}, nil
	}}
}

func micros(d time.Duration) float64 { return float64(d) / 1e3 }

// pacedRate is that of the rows at a fixed rate, requests a second.
const pacedRate = 2000

// pacedTrial measures what requests at a fixed rate cost, and how long they take.
func pacedTrial() trial {
	const cpu, machine, p50, p99, p999 = "cpu-per-request", "machine-cpu-per-request", "p50", "p99", "p999"
	rows := []row{{name: cpu, unit: "us", alone: true}, {name: machine, unit: "us"}, {name: p50, unit: "us"}, {name: p99, unit: "us"}, {name: p999, unit: "us"}}
	return trial{rows: rows, load: true, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		pids, err := b.pids(ctx, l)
		if err != nil {
			return nil, err
		}
		before, err := b.read(ctx, pids, false)
		if err != nil {
			return nil, err
		}
		idle, err := readClock()
		if err != nil {
			return nil, err
		}
		got, err := b.requests(ctx, l, order{Conns: 8, Rate: pacedRate})
		if err != nil {
			return nil, err
		}
		busy, err := readClock()
		if err != nil {
			return nil, err
		}
		after, err := b.read(ctx, pids, false)
		if err != nil {
			return nil, err
		}
		values := map[string]float64{
			machine: micros(busy.since(idle)) / float64(got.Total),
			p50:     micros(got.Latency.quantile(0.5)), p99: micros(got.Latency.quantile(0.99)), p999: micros(got.Latency.quantile(0.999)),
		}
		if len(pids) > 0 {
			values[cpu] = micros(after.cpu-before.cpu) / float64(got.Total)
		}
		return values, nil
	}}
}

// stallTrial measures what a sender gets rid of whose reader never reads.
func stallTrial() trial {
	const bytes = "stall-bytes"
	return trial{rows: []row{{name: bytes, unit: "MiB"}}, load: true, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		a, err := b.agents[l.client.key()].ask(ctx, order{Do: "stall", Addr: b.server(l)}, stallPatience+3*connectTimeout)
		if err != nil {
			return nil, err
		}
		return map[string]float64{bytes: float64(a.Bytes) / mebi}, nil
	}}
}
