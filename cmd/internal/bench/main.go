// Command bench measures what the mesh costs, beside the kernel alone and
// beside a plain proxy, in one run on the same namespaces: `make bench`.
//
// It starts a lab of two nodes (package lab) with real proxies, puts a worker
// (itself) into each pod, and gives every leg from client to server the same
// load, leg after leg, round after round. README.md says what each row means.
//
//	bench [-rounds 3] [-rows REGEXP] [-seconds 3] [-json bin/bench.json]
//	bench attach ORDER    on a node of another proxy: hands pods over
//	bench worker          in a pod: takes orders on standard input
//	bench fetch URL       on a node: for profiles
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	err := dispatch(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func dispatch(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "worker":
		return runWorker(os.Stdin, os.Stdout)
	case len(args) == 2 && args[0] == "attach":
		return runHandover(args[1])
	case len(args) == 2 && args[0] == "fetch":
		return fetch(args[1], os.Stdout)
	case slices.Equal(args, []string{"lab", "nothing"}):
		return nil // The lab tries with its caller whether namespaces can be made.
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return runBench(ctx, args, os.Stdout, os.Stderr)
}

// A commandLine is what flags say, besides options.
type commandLine struct {
	options
	programs string // Directory of ztun and ztun-proxy.
	json     string
}

func parse(args []string, errors io.Writer) (commandLine, error) {
	c := commandLine{options: options{Settle: 8 * time.Second, Beside: 8}}
	var rows, legs string
	var seconds float64
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(errors)
	flags.IntVar(&c.Rounds, "rounds", 3, "how often each leg is measured")
	flags.StringVar(&rows, "rows", "", "measure the rows that match this regular expression (default: all but those that take long)")
	flags.StringVar(&legs, "legs", ".", "measure the legs that match this regular expression")
	flags.StringVar(&c.Other, "other", "", "command line of another proxy, for the legs "+legOther+" and "+legOtherSameNode)
	flags.Float64Var(&seconds, "seconds", 3, "how long one measurement lasts")
	flags.IntVar(&c.Conns, "conns", 12_000, "how many idle connections, for their memory")
	flags.IntVar(&c.Pods, "pods", 32, "how many idle pods, for their memory")
	flags.IntVar(&c.Idle, "idle", 50_000, "how many idle connections, for the row idle-N")
	flags.DurationVar(&c.IdleFor, "idle-for", 10*time.Second, "how long those are held, and idle pods watched")
	flags.IntVar(&c.IdlePods, "idle-pods", 1000, "how many idle pods, for the rows idle-pods-N")
	flags.IntVar(&c.Spread, "spread", 250, "how many pods share a load, for the rows pods-N")
	flags.IntVar(&c.Services, "services", 10_000, "how many services and workloads are known, for the rows services-N")
	flags.StringVar(&c.Profile, "profile", "", "directory for CPU profiles of the ztun proxies, of the first round")
	flags.StringVar(&c.programs, "bin", "bin", "directory of ztun and ztun-proxy")
	flags.StringVar(&c.json, "json", "bin/bench.json", "file for the figures")
	if err := flags.Parse(args); err != nil {
		return c, err
	}
	var err error
	switch {
	case flags.NArg() > 0:
		return c, fmt.Errorf("bench: unexpected %q", flags.Arg(0))
	case c.Rounds < 1 || c.Rounds > 1000:
		return c, fmt.Errorf("bench: -rounds %d: want 1 to 1000", c.Rounds)
	case !(seconds >= 0.1 && seconds <= 300):
		return c, fmt.Errorf("bench: -seconds %v: want 0.1 to 300", seconds)
	case c.IdleFor < time.Second || c.IdleFor > time.Hour:
		return c, fmt.Errorf("bench: -idle-for %v: want 1s to 1h", c.IdleFor)
	}
	for _, count := range []struct {
		flag            string
		value, min, max int
	}{
		{"conns", c.Conns, 1, maxConns}, {"idle", c.Idle, 1, maxConns}, {"pods", c.Pods, 1, 200},
		{"idle-pods", c.IdlePods, 1, 1000}, {"spread", c.Spread, 1, 400}, {"services", c.Services, fewServices + 1, 50_000},
	} {
		if count.value < count.min || count.value > count.max {
			return c, fmt.Errorf("bench: -%s %d: want %d to %d", count.flag, count.value, count.min, count.max)
		}
	}
	c.Window = time.Duration(seconds * float64(time.Second))
	if rows != "" {
		if c.Rows, err = regexp.Compile(rows); err != nil {
			return c, fmt.Errorf("bench: -rows: %w", err)
		}
	}
	if c.Legs, err = regexp.Compile(legs); err != nil {
		return c, fmt.Errorf("bench: -legs: %w", err)
	}
	// The lab's processes are started elsewhere.
	if c.programs, err = filepath.Abs(c.programs); err != nil {
		return c, fmt.Errorf("bench: %w", err)
	}
	return c, nil
}

func runBench(ctx context.Context, args []string, out, progress io.Writer) (err error) {
	c, err := parse(args, progress)
	if err != nil {
		return err
	}
	trials := selected(allTrials(c.options), c.Rows)
	legs := slices.DeleteFunc(allLegs(), func(l *leg) bool { return !c.Legs.MatchString(l.name) || l.other && c.Other == "" })
	if len(trials) == 0 || len(legs) == 0 {
		return errors.New("bench: no row or no leg matches (those of another proxy need -other)")
	}
	if c.Profile != "" {
		if err := os.MkdirAll(c.Profile, 0o755); err != nil {
			return fmt.Errorf("bench: %w", err)
		}
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	raiseFileLimit()
	b := &bench{options: c.options, program: program, progress: progress, legs: legs, figures: newFigures(c.Rounds)}
	r := &report{head: describe(c), legs: legs, figures: b.figures}
	for _, t := range trials {
		r.rows = append(r.rows, t.rows...)
	}
	err = b.measure(ctx, c.programs, trials)
	if err != nil {
		err = fmt.Errorf("bench: not everything could be measured: %w", err)
	}
	if len(r.list()) == 0 {
		return err
	}
	r.busiest = b.busiest
	r.markdown(out)
	if ctx.Err() != nil {
		return fmt.Errorf("%w; %s is not written", err, c.json)
	}
	return errors.Join(err, r.writeJSON(c.json))
}

// measure runs the lab and all trials in it.
func (b *bench) measure(ctx context.Context, programs string, trials []trial) (err error) {
	l, err := b.startLab(ctx, programs)
	if err != nil {
		return err
	}
	defer func() {
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), downTimeout)
		defer cancel()
		err = errors.Join(err, l.Down(limited))
	}()
	b.site = l
	defer b.close()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	return b.run(ctx, trials)
}

// describe says on what and how was measured.
func describe(c commandLine) []string {
	var name unix.Utsname
	kernel := "?"
	if unix.Uname(&name) == nil {
		kernel, _, _ = strings.Cut(string(name.Release[:]), "\x00")
	}
	return []string{
		fmt.Sprintf("ztun bench, %s: %d rounds, %v each; %d CPUs, Linux %s, %s, load average at the start %s",
			time.Now().UTC().Format(time.DateOnly), c.Rounds, c.Window, runtime.NumCPU(), kernel, runtime.Version(), loadAverage()),
	}
}
