package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ztun/ztun/cmd/internal/lab"
)

// options are what the command line says.
type options struct {
	Rounds int
	Rows   *regexp.Regexp
	Legs   *regexp.Regexp
	Window time.Duration // How long one measurement lasts.
	Settle time.Duration // How long memory may take to settle.
	Conns  int           // Idle connections whose memory is measured.
	Pods   int           // Idle pods whose memory is measured.
	// Of the rows that take long: idle connections, how long they are held and
	// idle pods are watched, idle pods, pods that share a load, services.
	Idle     int
	IdleFor  time.Duration
	IdlePods int
	Spread   int
	Services int
	Beside   int    // Pods at each end of a leg for what one pod may not hold alone.
	Other    string // Command line of another proxy; empty: none.
	Profile  string // Directory for CPU profiles; empty: none.
}

// A bench measures legs, one after the other, again and again.
type bench struct {
	options
	site     site
	program  string // This one, as its workers are started.
	dir      string // What the lab is made of, as its agents name it.
	config   string // What its control plane reads, likewise.
	progress io.Writer
	legs     []*leg
	agents   map[string]*agent     // By where they are.
	addrs    map[string]netip.Addr // Of pods.
	spaces   map[string]string     // Their network namespaces, by path.
	figures  *figures
	busiest  bystanding // That were the busiest.
}

// meterAt is where processes are looked at: it sees all of the lab's.
const meterAt = "fabric"

// worldFile is what the lab's directory holds from the start.
const worldFile = "world.yaml"

// startLab starts a lab with the pods of the legs. It dies with this process,
// and leaves nothing on the machine's disks.
func (b *bench) startLab(ctx context.Context, programs string) (*lab.Lab, error) {
	o := lab.Options{
		Name: fmt.Sprintf("bench-%d", os.Getpid()), Files: map[string]string{worldFile: world(b.legs)}, Progress: b.progress,
		Program: filepath.Join(programs, "ztun"), Proxy: filepath.Join(programs, "ztun-proxy"),
		Attached: true,
	}
	if b.Other != "" {
		theirs := lab.NodePrograms{Proxy: b.Other, Attach: []string{b.program, "attach"}}
		o.Nodes = map[string]lab.NodePrograms{otherA: theirs, otherB: theirs}
	}
	return lab.Start(ctx, o)
}

// downTimeout bounds how long the lab may take to go.
const downTimeout = 20 * time.Second

// prepare starts an agent in every pod. Legs for which something is missing here are marked.
func (b *bench) prepare(ctx context.Context) error {
	status, err := b.site.Status(ctx)
	if err != nil {
		return err
	}
	b.dir, b.config = status.Dir, status.Config
	b.addrs, b.spaces = map[string]netip.Addr{}, map[string]string{}
	b.learn(status)
	for _, p := range status.Pods {
		key := p.Namespace + "/" + p.Name
		for _, l := range b.legs {
			if p.Error != "" && (l.client.key() == key || l.server.key() == key) {
				l.missing = p.Error
			}
		}
	}
	b.agents = map[string]*agent{}
	if _, err := b.agentAt(ctx, meterAt); err != nil {
		return err
	}
	for _, l := range b.legs {
		if _, err := b.agentAt(ctx, l.client.key()); err != nil {
			return err
		}
		if b.agents[l.server.key()] != nil {
			continue
		}
		server, err := b.agentAt(ctx, l.server.key())
		if err != nil {
			return err
		}
		if _, err := server.ask(ctx, order{Do: "serve"}, connectTimeout); err != nil {
			return err
		}
	}
	for _, l := range b.legs {
		if slices.Contains(l.proxies, redirector) {
			if err := b.startRedirector(ctx, l); err != nil {
				if ctx.Err() != nil {
					return err
				}
				l.missing = err.Error()
			}
		}
	}
	return nil
}

// close ends the agents that are left.
func (b *bench) close() {
	for _, a := range b.agents {
		a.end() // The lab's end is theirs too.
	}
}

// agentAt returns the agent in a place, started if it is not there.
func (b *bench) agentAt(ctx context.Context, where string) (*agent, error) {
	if a := b.agents[where]; a != nil {
		return a, nil
	}
	a, err := startAgent(ctx, b.site, b.program, where)
	if err != nil {
		return nil, err
	}
	b.agents[where] = a
	return a, nil
}

// startRedirector starts the bench's own proxy beside a leg's client, afresh
// if it runs.
func (b *bench) startRedirector(ctx context.Context, l *leg) error {
	if a := b.agents[redirector]; a != nil {
		delete(b.agents, redirector)
		if err := a.end(); err != nil {
			return err
		}
	}
	a, err := startAgent(ctx, b.site, b.program, l.client.key())
	if err != nil {
		return err
	}
	if _, err := a.ask(ctx, order{Do: "redirect", Addr: b.server(l)}, connectTimeout); err != nil {
		return errors.Join(err, a.end())
	}
	b.agents[redirector] = a
	return nil
}

// server is the address of a leg's server; orders choose the port.
func (b *bench) server(l *leg) netip.AddrPort {
	return netip.AddrPortFrom(b.addrs[l.server.key()], 0)
}

// probeTimeout is how long a leg may take to work, also after its proxies
// were killed.
const probeTimeout = 45 * time.Second

// probe returns once a leg answers requests.
func (b *bench) probe(ctx context.Context, l *leg) error {
	deadline := time.Now().Add(probeTimeout)
	for {
		a, err := b.agents[l.client.key()].ask(ctx, order{Do: "requests", Addr: b.server(l), Conns: 1, For: 100 * time.Millisecond}, 2*connectTimeout)
		if ctx.Err() != nil || err == nil && a.Load != nil && a.Load.Total > 0 {
			return err
		}
		if err == nil {
			err = errors.New("bench: no answer")
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("bench: leg %s does not work: %w", l.name, err)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// pids returns the processes of a leg's proxies.
func (b *bench) pids(ctx context.Context, l *leg) ([]int, error) {
	if len(l.proxies) == 0 {
		return nil, nil
	}
	status, err := b.site.Status(ctx)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range l.proxies {
		pid := 0
		if name == redirector {
			pid = b.agents[redirector].pid
		}
		for _, n := range status.Nodes {
			if n.Proxy.Name == name {
				pid = n.Proxy.PID
			}
		}
		if pid == 0 {
			return nil, fmt.Errorf("bench: %s does not run", name)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// A reading is what processes have used, together, and what the machine has
// in use.
type reading struct {
	cpu time.Duration
	rss uint64
	// threads is how many they have, together.
	threads int
	memory  uint64 // As in answer; only where it was asked for.
}

func (b *bench) read(ctx context.Context, pids []int, machine bool) (reading, error) {
	a, err := b.agents[meterAt].ask(ctx, order{Do: "usage", PIDs: pids, Machine: machine}, connectTimeout)
	if err != nil {
		return reading{}, err
	}
	r := reading{memory: a.Memory}
	for _, u := range a.Usage {
		r.cpu += u.CPU
		r.rss += u.RSS
		r.threads += u.Threads
	}
	return r, nil
}

// restart gives a leg fresh proxies and waits until it works.
func (b *bench) restart(ctx context.Context, l *leg) error {
	before, err := b.pids(ctx, l)
	if err != nil {
		return err
	}
	for _, name := range l.proxies {
		if name == redirector {
			err = b.startRedirector(ctx, l)
		} else {
			err = b.site.Kill(ctx, name, syscall.SIGKILL, false)
		}
		if err != nil {
			return err
		}
	}
	deadline := time.Now().Add(probeTimeout)
	for {
		now, err := b.pids(ctx, l)
		if err == nil && !slices.ContainsFunc(now, func(pid int) bool { return slices.Contains(before, pid) }) {
			return b.probe(ctx, l)
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("bench: %s: not started again", strings.Join(l.proxies, ", ")), err)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("bench: %w", context.Cause(ctx))
		}
	}
}

// run measures all trials in all rounds, stage after stage. Its error joins
// all that could not be measured.
func (b *bench) run(ctx context.Context, trials []trial) error {
	var errs []error
	for len(trials) > 0 && ctx.Err() == nil {
		s := trials[0].stage
		n := slices.IndexFunc(trials, func(t trial) bool { return t.stage != s })
		if n < 0 {
			n = len(trials)
		}
		errs = append(errs, b.on(ctx, s, trials[:n], func() error { return b.runRounds(ctx, trials[:n]) }))
		trials = trials[n:]
	}
	return errors.Join(errs...)
}

// runRounds measures trials of one stage.
func (b *bench) runRounds(ctx context.Context, trials []trial) error {
	var errs []error
	for round := range b.Rounds {
		for _, l := range b.legs {
			if l.missing != "" {
				continue
			}
			// Also wakes what has gone to sleep or moved meanwhile.
			err := b.probe(ctx, l)
			if l.broken = err != nil; l.broken {
				errs = append(errs, fmt.Errorf("round %d: %w", round+1, err))
			}
		}
		for _, t := range trials {
			if err := b.runTrial(ctx, t, round); err != nil {
				errs = append(errs, err)
			}
			if ctx.Err() != nil {
				return fmt.Errorf("bench: %w", context.Cause(ctx))
			}
		}
	}
	return errors.Join(errs...)
}

// runTrial measures one trial in all its settings, every other round the other
// way round.
func (b *bench) runTrial(ctx context.Context, t trial, round int) error {
	settings := slices.Clone(t.settings)
	if len(settings) == 0 {
		settings = append(settings, func(context.Context, *bench) error { return nil })
	}
	if round%2 == 1 {
		slices.Reverse(settings)
	}
	var errs []error
	values := map[string]map[string]float64{}
	for _, set := range settings {
		err := set(ctx, b)
		if err == nil {
			err = b.runLegs(ctx, t, round, values)
		}
		errs = append(errs, err)
	}
	if t.adjust != nil {
		t.adjust(values)
	}
	for legName, got := range values {
		for rowName, v := range got {
			b.figures.set(rowName, legName, round, v)
		}
	}
	return errors.Join(errs...)
}

// runLegs measures a trial on every leg, beginning with another leg each
// round, and adds to values by leg and row.
func (b *bench) runLegs(ctx context.Context, t trial, round int, values map[string]map[string]float64) error {
	var errs []error
	for i := range b.legs {
		l := b.legs[(i+round)%len(b.legs)]
		if l.missing != "" || l.broken || t.skips(l) {
			continue
		}
		got := map[string]float64{}
		var err error
		for _, part := range t.split() {
			var some map[string]float64
			if some, err = b.runOn(ctx, part, l, round); err != nil {
				break
			}
			maps.Copy(got, some)
		}
		if ctx.Err() != nil {
			return err
		}
		if err != nil {
			err = fmt.Errorf("%s, %s, round %d: %w", t.name(), l.name, round+1, err)
			fmt.Fprintln(b.progress, err)
			errs = append(errs, err)
			continue
		}
		if values[l.name] == nil {
			values[l.name] = map[string]float64{}
		}
		maps.Copy(values[l.name], got)
		for _, r := range t.rows {
			if v, ok := got[r.name]; ok {
				fmt.Fprintf(b.progress, "round %d  %-20s %-16s %s %s\n", round+1, r.name, l.name, number(v), r.unit)
			}
		}
	}
	return errors.Join(errs...)
}

// runOn measures a trial on one leg.
func (b *bench) runOn(ctx context.Context, t trial, l *leg, round int) (map[string]float64, error) {
	watched, err := b.watchBystanders(ctx, t, l)
	if err != nil {
		return nil, err
	}
	profiled := b.profile(ctx, t, l, round)
	got, err := t.measure(ctx, b, l)
	return got, errors.Join(err, profiled(), watched())
}
