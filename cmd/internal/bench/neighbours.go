package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

const (
	// fairRate is that of the pod whose latency is looked at, requests a second.
	fairRate = 500
	// bulkStreams is how many streams its neighbour has.
	bulkStreams = 64
)

// fairTrial measures how long a pod's requests take on their own, and while
// another pod of its node sends all it can, to another server of the far node.
func fairTrial(s *stage) trial {
	const alone, beside, ratio = "fair-p99-alone", "fair-p99-beside", "fair-p99"
	part := func(name string, begin func(context.Context, *bench, *leg) (stop func() error, err error)) trial {
		measure := func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
			stop, err := begin(ctx, b, l)
			if err != nil {
				return nil, err
			}
			got, err := b.requests(ctx, l, order{Conns: 8, Rate: fairRate})
			if err = errors.Join(err, stop()); err != nil {
				return nil, err
			}
			return map[string]float64{name: micros(got.Latency.quantile(0.99))}, nil
		}
		return trial{rows: []row{{name: name, unit: "us"}}, load: true, measure: measure}
	}
	nothing := func(context.Context, *bench, *leg) (func() error, error) { return func() error { return nil }, nil }
	return trial{
		rows:  []row{{name: ratio, unit: "x", alone: true}, {name: alone, unit: "us"}, {name: beside, unit: "us"}},
		parts: []trial{part(alone, nothing), part(beside, bulk)}, shared: true, stage: s,
		adjust: ratioOf(ratio, beside, alone),
	}
}

// ratioOf sets a row of each leg to the ratio of two others.
func ratioOf(row, of, by string) func(map[string]map[string]float64) {
	return func(values map[string]map[string]float64) {
		for _, got := range values {
			divide(got, row, of, by)
		}
	}
}

// bulk makes a pod beside a leg's client send all it can to one beside its
// server, until the returned function is called.
func bulk(ctx context.Context, b *bench, l *leg) (stop func() error, err error) {
	server, err := startAgent(ctx, b.site, b.program, l.more(serverEnd, 0).key())
	if err != nil {
		return nil, err
	}
	client, err := startAgent(ctx, b.site, b.program, l.more(clientEnd, 0).key())
	if err != nil {
		return nil, errors.Join(err, server.end())
	}
	stop = func() error { return errors.Join(client.end(), server.end()) }
	_, err = server.ask(ctx, order{Do: "serve"}, connectTimeout)
	if err == nil {
		target := netip.AddrPortFrom(b.addrs[l.more(serverEnd, 0).key()], 0)
		_, err = client.ask(ctx, order{Do: "streams", Addr: target, Conns: bulkStreams}, bulkStreams*connectTimeout)
	}
	if err == nil {
		err = sleep(ctx, warmup)
	}
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	return stop, nil
}

// podsInFlight is how many requests are on their way at once however many
// pods they come from.
const podsInFlight = 64

// podsTrial measures the same requests at full speed, on the same number of
// connections, from one pod, a fifth of the pods, and all. All are there all
// the time: only who has something to say differs.
func podsTrial(pods int) trial {
	counts := []int{1, max(1, pods/5), pods}
	name := func(n int) string { return fmt.Sprintf("pods-%d", n) }
	const ratio = "pods-ratio"
	t := trial{long: true, shared: true, stage: &stage{clients: pods}, adjust: ratioOf(ratio, name(pods), name(1))}
	for _, n := range slices.Compact(counts) {
		r := row{name: name(n), unit: "1/s"}
		t.rows = append(t.rows, r)
		t.parts = append(t.parts, trial{rows: []row{r}, load: true, measure: func(ctx context.Context, b *bench, l *leg) (map[string]float64, error) {
			o := order{Addr: b.server(l), Conns: pods, InFlight: podsInFlight}
			for i := range n {
				o.From = append(o.From, b.spaces[l.more(clientEnd, i).key()])
			}
			got, err := b.requestsOf(ctx, b.agents[meterAt], o)
			if err != nil {
				return nil, fmt.Errorf("from %d pods: %w", n, err)
			}
			return map[string]float64{r.name: got.rate()}, nil
		}})
	}
	t.rows = append(t.rows, row{name: ratio, unit: "x", alone: true})
	return t
}
