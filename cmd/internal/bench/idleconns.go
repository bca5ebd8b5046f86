package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// holders are workers at both ends of a leg that hold idle connections: one a
// pod, since neither a pod nor a process may hold all. They are fresh, since
// what others have freed and kept would hide what is used next.
type holders struct {
	clients, servers []*agent
	targets          []netip.AddrPort
}

// hold starts holders in the pods that the stage adds to a leg. The leg through
// the bench's own proxy has only its own two.
func (b *bench) hold(ctx context.Context, l *leg, s *stage) (*holders, error) {
	h := &holders{}
	ends := [][2]*benchPod{{l.client, l.server}}
	if !l.redirects() {
		ends = nil
		for i := range s.clients {
			ends = append(ends, [2]*benchPod{l.more(clientEnd, i), l.more(serverEnd, i)})
		}
	}
	for _, pods := range ends {
		server, err := startAgent(ctx, b.site, b.program, pods[1].key())
		if err != nil {
			return nil, errors.Join(err, h.end())
		}
		h.servers = append(h.servers, server)
		if _, err := server.ask(ctx, order{Do: "serve-idle"}, connectTimeout); err != nil {
			return nil, errors.Join(err, h.end())
		}
		client, err := startAgent(ctx, b.site, b.program, pods[0].key())
		if err != nil {
			return nil, errors.Join(err, h.end())
		}
		h.clients = append(h.clients, client)
		h.targets = append(h.targets, netip.AddrPortFrom(b.addrs[pods[1].key()], 0))
	}
	return h, nil
}

// end makes the workers leave, and all connections with them.
func (h *holders) end() error {
	var errs []error
	for _, a := range h.clients {
		errs = append(errs, a.end())
	}
	for _, a := range h.servers {
		errs = append(errs, a.end())
	}
	return errors.Join(errs...)
}

// open opens connections, one after the other or as fast as it goes. The
// answer says how many are open, how long it took, and why there are not more.
func (h *holders) open(ctx context.Context, conns int, oneByOne bool) (answer, error) {
	// Without proxies each takes 0.2 ms.
	patience := time.Minute + time.Duration(conns)*5*time.Millisecond
	answers, errs := make([]answer, len(h.clients)), make([]error, len(h.clients))
	began := time.Now()
	var all sync.WaitGroup
	for i, c := range h.clients {
		all.Go(func() {
			o := order{Do: "idle", Addr: h.targets[i], Conns: share(conns, len(h.clients), i), OneByOne: oneByOne}
			answers[i], errs[i] = c.ask(ctx, o, patience)
		})
		if oneByOne {
			all.Wait()
		}
	}
	all.Wait()
	sum := answer{Took: time.Since(began)}
	for _, a := range answers {
		sum.Open += a.Open
		if sum.Failure == "" {
			sum.Failure = a.Failure
		}
	}
	return sum, errors.Join(errs...)
}

// alive sends a byte on every connection, has it sent back, and returns on how
// many it came.
func (h *holders) alive(ctx context.Context) (int, error) {
	came := 0
	for _, step := range []struct {
		who []*agent
		do  string
	}{{h.clients, "poke"}, {h.servers, "echo"}, {h.clients, "hear"}} {
		came = 0
		for _, w := range step.who {
			a, err := w.ask(ctx, order{Do: step.do}, 2*sweepTimeout)
			if err != nil {
				return 0, err
			}
			came += a.Open
		}
	}
	return came, nil
}

// idleConnsTrial opens connections through fresh proxies, one after the other,
// and lets them be. The direct leg shows what the two ends cost; the others
// what comes on top.
func idleConnsTrial(conns int, s *stage) trial {
	const machine, proxies = "bytes-per-idle-conn", "rss-per-idle-conn"
	open := fmt.Sprintf("open-%d", conns)
	rows := []row{{name: machine, unit: "B", alone: true}, {name: proxies, unit: "B", alone: true}, {name: open, unit: "s"}}
	measure := func(ctx context.Context, b *bench, l *leg) (values map[string]float64, err error) {
		if !b.canHold(l, conns) {
			return nil, nil
		}
		h, err := b.hold(ctx, l, s)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, h.end()) }()
		pids, before, err := b.fresh(ctx, l)
		if err != nil {
			return nil, err
		}
		a, err := h.open(ctx, conns, true)
		if err == nil && a.Open < conns {
			err = fmt.Errorf("bench: %d of %d connections could be opened: %s", a.Open, conns, a.Failure)
		}
		if err != nil {
			return nil, err
		}
		after, err := b.settle(ctx, pids)
		if err != nil {
			return nil, err
		}
		values = map[string]float64{open: a.Took.Seconds(), machine: (float64(after.memory) - float64(before.memory)) / float64(conns)}
		if len(pids) > 0 {
			values[proxies] = (float64(after.rss) - float64(before.rss)) / float64(conns)
		}
		return values, nil
	}
	return trial{rows: rows, measure: measure, stage: s, adjust: func(values map[string]map[string]float64) {
		direct, ok := values[legDirect][machine]
		for leg, got := range values {
			_, has := got[machine]
			switch {
			case leg == legDirect:
			case ok && has:
				got[machine] -= direct
			default:
				delete(got, machine)
			}
		}
	}}
}

// canHold says whether the bench's own proxy may have two files for each
// connection; the other legs' proxies have none.
func (b *bench) canHold(l *leg, conns int) bool {
	const others = 100
	if !l.redirects() || fileLimit() >= uint64(2*conns+others) {
		return true
	}
	fmt.Fprintf(b.progress, "%s: %d connections need %d files, and a process may open %d (ulimit -n)\n", l.name, conns, 2*conns+others, fileLimit())
	return false
}

// idleManyTrial holds as many connections as can be opened, for some time, and
// counts those on which a byte still goes both ways.
func idleManyTrial(conns int, s *stage) trial {
	alive := fmt.Sprintf("idle-%d", conns)
	rss := alive + "-rss"
	rows := []row{{name: alive, unit: "alive", alone: true}, {name: rss, unit: "MiB", alone: true}}
	return trial{rows: rows, long: true, stage: s, measure: func(ctx context.Context, b *bench, l *leg) (values map[string]float64, err error) {
		if !b.canHold(l, conns) {
			return nil, nil
		}
		h, err := b.hold(ctx, l, s)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, h.end()) }()
		if err := b.restart(ctx, l); err != nil {
			return nil, err
		}
		pids, err := b.pids(ctx, l)
		if err != nil {
			return nil, err
		}
		a, err := h.open(ctx, conns, false)
		if err != nil {
			return nil, err
		}
		if a.Open < conns {
			fmt.Fprintf(b.progress, "%s, %s: %d could be opened: %s\n", alive, l.name, a.Open, a.Failure)
		}
		if err := sleep(ctx, b.IdleFor); err != nil {
			return nil, err
		}
		now, err := b.read(ctx, pids, false)
		if err != nil {
			return nil, err
		}
		n, err := h.alive(ctx)
		if err != nil {
			return nil, err
		}
		values = map[string]float64{alive: float64(n)}
		if len(pids) > 0 {
			values[rss] = float64(now.rss) / mebi
		}
		return values, nil
	}}
}
