package main

import (
	"context"
	"errors"
	"fmt"
)

// idlePodsTrial adds pods to the mesh, on the client's node, and sees the
// node's proxy grow.
func idlePodsTrial(pods int) trial {
	const each = "bytes-per-idle-pod"
	measure := func(ctx context.Context, b *bench, l *leg) (values map[string]float64, err error) {
		err = b.withIdlePods(ctx, l, pods, func(pid int, grown float64) error {
			values = map[string]float64{each: grown}
			return nil
		})
		return values, err
	}
	return trial{rows: []row{{name: each, unit: "B", alone: true}}, only: legHBONE, measure: measure}
}

// manyIdlePodsTrial sees what a proxy of many pods costs that does nothing.
func manyIdlePodsTrial(pods int) trial {
	name := fmt.Sprintf("idle-pods-%d", pods)
	each, threads, cpu := name+"-bytes", name+"-threads", name+"-cpu"
	rows := []row{{name: each, unit: "B", alone: true}, {name: threads, unit: "threads", alone: true}, {name: cpu, unit: "ms/s", alone: true}}
	measure := func(ctx context.Context, b *bench, l *leg) (values map[string]float64, err error) {
		err = b.withIdlePods(ctx, l, pods, func(pid int, grown float64) error {
			before, err := b.read(ctx, []int{pid}, false)
			if err != nil {
				return err
			}
			if err := sleep(ctx, b.IdleFor); err != nil {
				return err
			}
			after, err := b.read(ctx, []int{pid}, false)
			used := (after.cpu - before.cpu).Seconds() * 1e3 / b.IdleFor.Seconds()
			values = map[string]float64{each: grown, threads: float64(after.threads), cpu: used}
			return err
		})
		return values, err
	}
	return trial{rows: rows, only: legHBONE, long: true, measure: measure}
}

// withIdlePods runs f while a leg's client has so many idle pods on its node,
// with the node's fresh proxy and what that grew by for each, in bytes.
func (b *bench) withIdlePods(ctx context.Context, l *leg, pods int, f func(pid int, grown float64) error) error {
	if err := b.restart(ctx, l); err != nil {
		return err
	}
	pids, err := b.pids(ctx, l)
	if err != nil {
		return err
	}
	pids = pids[:1] // That of the client's node.
	before, err := b.settle(ctx, pids)
	if err != nil {
		return err
	}
	more := idlePods(l, pods)
	err = b.addPods(ctx, more)
	if err == nil {
		var after reading
		if after, err = b.settle(ctx, pids); err == nil {
			err = f(pids[0], (float64(after.rss)-float64(before.rss))/float64(pods))
		}
	}
	return errors.Join(err, b.removePods(ctx, more))
}

// idlePods are pods that only are in the mesh, each with a service account of
// its own, which is the dearest case.
func idlePods(l *leg, n int) []*benchPod {
	var pods []*benchPod
	for i := range n {
		pods = append(pods, &benchPod{namespace: l.client.namespace, name: fmt.Sprintf("idle-%d", i), node: l.client.node})
	}
	return pods
}
