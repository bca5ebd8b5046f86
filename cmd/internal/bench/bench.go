package main

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	Rounds  int
	Rows    *regexp.Regexp
	Legs    *regexp.Regexp
	Window  time.Duration // How long one measurement lasts.
	Settle  time.Duration // How long memory may take to settle.
	Conns   int           // Idle connections.
	Pods    int           // Idle pods.
	Other   string        // Command line of another proxy; empty: none.
	Profile string        // Directory for CPU profiles; empty: none.
}

// A bench measures legs, one after the other, again and again.
type bench struct {
	options
	site     site
	program  string // This one, as its workers are started.
	dir      string // What the lab is made of, as its agents name it.
	progress io.Writer
	legs     []*leg
	agents   map[string]*agent // By where they are.
	addrs    map[string]netip.Addr
	figures  *figures
	busiest  bystanding // That were the busiest.
}

// meterAt is where processes are looked at: it sees all of the lab's.
const meterAt = "fabric"

// worldFile and idleFile are what the lab's directory holds.
const (
	worldFile = "world.yaml"
	idleFile  = "idle.yaml"
)

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
	b.dir = status.Dir
	b.addrs = map[string]netip.Addr{}
	for _, p := range status.Pods {
		key := p.Namespace + "/" + p.Name
		b.addrs[key] = p.Addresses[0]
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
	cpu    time.Duration
	rss    uint64
	memory uint64 // As in answer; only where it was asked for.
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

// run measures all trials in all rounds. Its error joins all that could not
// be measured.
func (b *bench) run(ctx context.Context, trials []trial) error {
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

// runTrial measures one trial on every leg, beginning with another leg each
// round.
func (b *bench) runTrial(ctx context.Context, t trial, round int) error {
	var errs []error
	values := map[string]map[string]float64{}
	for i := range b.legs {
		l := b.legs[(i+round)%len(b.legs)]
		if l.missing != "" || l.broken || t.skips(l) {
			continue
		}
		got, err := b.runOn(ctx, t, l, round)
		if ctx.Err() != nil {
			return err
		}
		if err != nil {
			err = fmt.Errorf("%s, %s, round %d: %w", t.name(), l.name, round+1, err)
			fmt.Fprintln(b.progress, err)
			errs = append(errs, err)
			continue
		}
		values[l.name] = got
		for _, r := range t.rows {
			if v, ok := got[r.name]; ok {
				fmt.Fprintf(b.progress, "round %d  %-20s %-16s %s %s\n", round+1, r.name, l.name, number(v), r.unit)
			}
		}
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
