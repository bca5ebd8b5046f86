package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

const mebi = 1 << 20

// rssTrial reads the proxies' memory as the rows before have left it.
func rssTrial() trial {
	const rss = "rss"
	return trial{rows: []row{{name: rss, unit: "MiB", alone: true}}, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		pids, err := b.pids(ctx, l)
		if err != nil || len(pids) == 0 {
			return nil, err
		}
		now, err := b.read(ctx, pids, false)
		return map[string]float64{rss: float64(now.rss) / mebi}, err
	}}
}

// idleConnsTrial opens connections through fresh proxies, which have no freed
// memory to hand out again, and lets them be. The direct leg shows what the
// two ends cost; the others what comes on top.
func idleConnsTrial() trial {
	const rest, machine, proxies = "rss-at-rest", "bytes-per-idle-conn", "rss-per-idle-conn"
	rows := []row{{name: rest, unit: "MiB", alone: true}, {name: machine, unit: "B", alone: true}, {name: proxies, unit: "B", alone: true}}
	measure := func(ctx context.Context, b *bench, l *leg) (values map[string]float64, err error) {
		// Fresh ends too, for the same reason.
		server, err := startAgent(ctx, b.site, b.program, l.server.key())
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, server.end()) }()
		if _, err := server.ask(ctx, order{Do: "serve-idle"}, connectTimeout); err != nil {
			return nil, err
		}
		client, err := startAgent(ctx, b.site, b.program, l.client.key())
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, client.end()) }()
		if err := b.restart(ctx, l); err != nil {
			return nil, err
		}
		pids, err := b.pids(ctx, l)
		if err != nil {
			return nil, err
		}
		before, err := b.settle(ctx, pids)
		if err != nil {
			return nil, err
		}
		if _, err := client.ask(ctx, order{Do: "idle", Addr: b.server(l), Conns: b.Conns}, time.Minute); err != nil {
			return nil, err
		}
		after, err := b.settle(ctx, pids)
		if err != nil {
			return nil, err
		}
		values = map[string]float64{machine: (float64(after.memory) - float64(before.memory)) / float64(b.Conns)}
		if len(pids) > 0 {
			values[rest] = float64(before.rss) / mebi
			values[proxies] = (float64(after.rss) - float64(before.rss)) / float64(b.Conns)
		}
		return values, nil
	}
	return trial{rows: rows, measure: measure, adjust: func(values map[string]map[string]float64) {
		direct, ok := values[legDirect][machine]
		for leg, got := range values {
			switch {
			case leg == legDirect:
			case ok:
				got[machine] -= direct
			default:
				delete(got, machine)
			}
		}
	}}
}

// idlePodsTrial adds pods to the mesh, on the client's node, and sees the
// node's proxy grow.
func idlePodsTrial() trial {
	const each = "bytes-per-idle-pod"
	measure := func(ctx context.Context, b *bench, l *leg) (_ map[string]float64, err error) {
		if err := b.restart(ctx, l); err != nil {
			return nil, err
		}
		pids, err := b.pids(ctx, l)
		if err != nil {
			return nil, err
		}
		pids = pids[:1] // That of the client's node.
		before, err := b.settle(ctx, pids)
		if err != nil {
			return nil, err
		}
		file := filepath.Join(b.dir, idleFile)
		write := func(text string) error {
			_, err := b.agents[meterAt].ask(ctx, order{Do: "write", File: file, Text: text}, connectTimeout)
			return err
		}
		if err := write(idlePods(b.Pods)); err != nil {
			return nil, err
		}
		defer func() {
			err = errors.Join(err, write(""))
			if err == nil {
				err = b.awaitIdlePods(ctx, 0)
			}
		}()
		if err := b.awaitIdlePods(ctx, b.Pods); err != nil {
			return nil, err
		}
		after, err := b.settle(ctx, pids)
		if err != nil {
			return nil, err
		}
		return map[string]float64{each: (float64(after.rss) - float64(before.rss)) / float64(b.Pods)}, nil
	}
	return trial{rows: []row{{name: each, unit: "B", alone: true}}, only: legHBONE, measure: measure}
}

// podsTimeout bounds how long idle pods may take to come or go.
const podsTimeout = 90 * time.Second

// awaitIdlePods returns once so many idle pods are served, or none is left.
func (b *bench) awaitIdlePods(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, podsTimeout)
	defer cancel()
	for {
		status, err := b.site.Status(ctx)
		if err != nil {
			return err
		}
		there, served, why := 0, 0, status.Problem
		for _, p := range status.Pods {
			if _, ours := b.addrs[p.Namespace+"/"+p.Name]; ours {
				continue
			}
			there++
			if p.Phase == "served" {
				served++
			} else if p.Error != "" {
				why = p.Error
			}
		}
		if there == n && served == n {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("%w: %d idle pods, %d served, want %d: %s", err, there, served, n, why)
		}
	}
}

const (
	settleEvery = 200 * time.Millisecond
	// settleCalm is how many readings in a row must be alike: a proxy gives memory
	// back when it has been at rest for up to two seconds.
	settleCalm = 15
)

// settle returns a reading once memory has stopped to change, or a mean of
// the last readings if it does not.
func (b *bench) settle(ctx context.Context, pids []int) (reading, error) {
	var last []reading
	for began := time.Now(); ; {
		r, err := b.read(ctx, pids, true)
		if err != nil {
			return reading{}, err
		}
		if last = append(last, r); len(last) > settleCalm {
			last = last[1:]
		}
		if len(last) == settleCalm && alike(last) || time.Since(began) > b.Settle {
			return mean(last), nil
		}
		if err := sleep(ctx, settleEvery); err != nil {
			return reading{}, err
		}
	}
}

// alike says whether readings differ by less than a figure could show.
func alike(readings []reading) bool {
	first := readings[0]
	for _, r := range readings {
		if distance(r.rss, first.rss) > 128<<10 || distance(r.memory, first.memory) > mebi/2 {
			return false
		}
	}
	return true
}

func distance(a, b uint64) uint64 { return max(a, b) - min(a, b) }

func mean(readings []reading) reading {
	var sum reading
	for _, r := range readings {
		sum.rss += r.rss
		sum.memory += r.memory
	}
	n := uint64(len(readings))
	return reading{cpu: readings[len(readings)-1].cpu, rss: sum.rss / n, memory: sum.memory / n}
}
