package main

import (
	"context"
	"time"
)

const mebi = 1 << 20

// rssTrial reads the proxies' memory as the rows before have left it.
func rssTrial() trial {
	const rss = "rss-after-load"
	return trial{rows: []row{{name: rss, unit: "MiB", alone: true}}, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		pids, err := b.pids(ctx, l)
		if err != nil || len(pids) == 0 {
			return nil, err
		}
		now, err := b.read(ctx, pids, false)
		return map[string]float64{rss: float64(now.rss) / mebi}, err
	}}
}

// restTrial reads the memory of fresh proxies.
func restTrial() trial {
	const rest = "rss-at-rest"
	return trial{rows: []row{{name: rest, unit: "MiB", alone: true}}, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
		if len(l.proxies) == 0 {
			return nil, nil
		}
		_, now, err := b.fresh(ctx, l)
		return map[string]float64{rest: float64(now.rss) / mebi}, err
	}}
}

// fresh gives a leg fresh proxies, and reads them once they are calm.
func (b *bench) fresh(ctx context.Context, l *leg) (pids []int, calm reading, err error) {
	if err = b.restart(ctx, l); err != nil {
		return nil, reading{}, err
	}
	if pids, err = b.pids(ctx, l); err != nil {
		return nil, reading{}, err
	}
	calm, err = b.settle(ctx, pids)
	return pids, calm, err
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
