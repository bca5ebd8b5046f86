package main

import (
	"context"
	"slices"
	"time"
)

// A bystanding is how busy the lab was beside a leg that was measured: what
// the other legs' proxies, agents and pods used, and the control plane.
type bystanding struct {
	share    float64 // Of one CPU.
	most     string  // Who used most of it.
	row, leg string
}

// A bystander is a process of the lab that has no part in a leg.
type bystander struct {
	name string
	pid  int
}

// watchBystanders notes what is used beside a leg until the returned function
// is called. Only while there is load: other trials change the mesh, which is
// everybody's business.
func (b *bench) watchBystanders(ctx context.Context, t trial, l *leg) (done func() error, err error) {
	if !t.load {
		return func() error { return nil }, nil
	}
	all, err := b.bystanders(ctx, l)
	if err != nil {
		return nil, err
	}
	before, err := b.quieten(ctx, all)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	return func() error {
		after, err := b.cpuOf(ctx, all)
		if err != nil {
			return err
		}
		var sum, most time.Duration
		busy := bystanding{row: t.name(), leg: l.name}
		for i := range all {
			used := after[i] - before[i]
			if sum += used; used >= most {
				most, busy.most = used, all[i].name
			}
		}
		if busy.share = float64(sum) / float64(time.Since(began)); busy.share >= b.busiest.share {
			b.busiest = busy
		}
		return nil
	}, nil
}

const (
	quietShare = 0.01 // Of one CPU.
	quietFor   = 100 * time.Millisecond
	quietBy    = 3 * time.Second
)

// quieten waits, not for ever, until those that had a part in the leg before
// have ended what that left them to do, and returns what all have used.
func (b *bench) quieten(ctx context.Context, all []bystander) ([]time.Duration, error) {
	before, err := b.cpuOf(ctx, all)
	for began := time.Now(); err == nil; {
		at := time.Now()
		if err := sleep(ctx, quietFor); err != nil {
			return nil, err
		}
		var now []time.Duration
		if now, err = b.cpuOf(ctx, all); err != nil {
			break
		}
		var used time.Duration
		for i := range now {
			used += now[i] - before[i]
		}
		if float64(used) < quietShare*float64(time.Since(at)) || time.Since(began) > quietBy {
			return now, nil
		}
		before = now
	}
	return nil, err
}

// cpuOf returns what processes have used so far, each.
func (b *bench) cpuOf(ctx context.Context, all []bystander) ([]time.Duration, error) {
	var pids []int
	for _, p := range all {
		pids = append(pids, p.pid)
	}
	a, err := b.agents[meterAt].ask(ctx, order{Do: "usage", PIDs: pids}, connectTimeout)
	if err != nil {
		return nil, err
	}
	var used []time.Duration
	for _, u := range a.Usage {
		used = append(used, u.CPU)
	}
	return used, nil
}

// bystanders are those of a leg.
func (b *bench) bystanders(ctx context.Context, l *leg) ([]bystander, error) {
	status, err := b.site.Status(ctx)
	if err != nil {
		return nil, err
	}
	all := []bystander{{"control", status.Control.PID}}
	for _, n := range status.Nodes {
		all = append(all, bystander{n.Attach.Name, n.Attach.PID}, bystander{n.Proxy.Name, n.Proxy.PID})
	}
	for where, a := range b.agents {
		all = append(all, bystander{where, a.pid})
	}
	parts := append([]string{l.client.key(), l.server.key(), meterAt}, l.proxies...)
	return slices.DeleteFunc(all, func(p bystander) bool {
		return p.pid == 0 || slices.Contains(parts, p.name) // 0: not running just now.
	}), nil
}
