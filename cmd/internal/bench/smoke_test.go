package main

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ztun/ztun/cmd/internal/lab"
	"github.com/ztun/ztun/tun/netnstest"
)

// A wire is a site of two pods that a cable joins.
type wire struct {
	spaces map[string]*netnstest.NS
	status lab.Status
}

func (w *wire) Exec(ctx context.Context, target string, argv []string, stdio lab.Stdio) (int, error) {
	cmd := w.spaces[target].CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio.In, stdio.Out, stdio.Err
	err := cmd.Run()
	return cmd.ProcessState.ExitCode(), err
}

func (w *wire) Status(context.Context) (*lab.Status, error) { return &w.status, nil }

func (w *wire) Kill(context.Context, string, syscall.Signal, bool) error { return nil }

// newWire makes a bench of the legs that need no mesh.
func newWire(t *testing.T) *bench {
	t.Helper()
	a, z := netnstest.New(t, "client"), netnstest.New(t, "server")
	netnstest.Veth(t, a, "eth0", z, "eth0")
	a.Addr("eth0", "10.1.0.1/24")
	z.Addr("eth0", "10.1.0.2/24")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	legs := allLegs()[:2]
	w := &wire{spaces: map[string]*netnstest.NS{meterAt: a}}
	for _, l := range legs {
		w.spaces[l.client.key()], w.spaces[l.server.key()] = a, z
		w.status.Pods = append(w.status.Pods, lab.PodStatus{
			Namespace: l.server.namespace, Name: l.server.name, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2")},
		})
	}
	b := &bench{
		options: options{Rounds: 1, Window: time.Second, Settle: time.Second, Conns: 50},
		site:    w, program: program, progress: &bytes.Buffer{}, figures: newFigures(1),
		// The second leg would capture the first one's client here.
		legs: legs[:1],
	}
	t.Cleanup(b.close)
	return b
}

func TestDirectLegIsMeasured(t *testing.T) {
	b := newWire(t)
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	trials := selected(allTrials(), regexp.MustCompile("stream-1-|rps-8|new-conns|p50|idle-conn"))
	if err := b.run(t.Context(), trials); err != nil {
		t.Fatal(err)
	}
	for _, trial := range trials {
		for _, r := range trial.rows {
			f, ok := b.figures.of(r, legDirect)
			// The direct leg has no proxies, and 50 connections may be lost
			// in the noise.
			if wanted := !r.alone; ok != wanted && r.name != "bytes-per-idle-conn" || wanted && f.Median <= 0 {
				t.Errorf("%s = %+v, %v, want a figure: %v", r.name, f, ok, wanted)
			}
		}
	}
	if _, ok := b.figures.of(row{name: "bytes-per-idle-conn"}, legDirect); !ok {
		t.Error("bytes-per-idle-conn: none, want a figure")
	}
}

func TestRedirectLegIsMeasuredOrSaysWhatIsMissing(t *testing.T) {
	b := newWire(t)
	b.legs = allLegs()[1:2]
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if missing := b.legs[0].missing; missing != "" {
		if !strings.Contains(missing, "iptables") {
			t.Errorf("missing = %q, want it to name iptables", missing)
		}
		return
	}
	before, err := b.agents[redirector].ask(t.Context(), order{Do: "usage", PIDs: []int{b.agents[redirector].pid}}, connectTimeout)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.run(t.Context(), selected(allTrials(), regexp.MustCompile("stream-1-up|p50"))); err != nil {
		t.Fatal(err)
	}
	after, err := b.agents[redirector].ask(t.Context(), order{Do: "usage", PIDs: []int{b.agents[redirector].pid}}, connectTimeout)
	if err != nil {
		t.Fatal(err)
	}
	if before.Usage[0].CPU >= after.Usage[0].CPU || after.Usage[0].RSS == 0 {
		t.Errorf("the proxy has used %v and then %v, want more: it was not in between", before.Usage, after.Usage)
	}
	if f, ok := b.figures.of(row{name: "cpu-per-request"}, legRedirect); !ok || f.Median <= 0 {
		t.Errorf("cpu-per-request = %+v, %v, want a figure", f, ok)
	}
}

func TestRequestsFailWhereNobodyListens(t *testing.T) {
	b := newWire(t)
	client, err := startAgent(t.Context(), b.site, b.program, b.legs[0].client.key())
	if err != nil {
		t.Fatal(err)
	}
	defer client.end()
	for _, fresh := range []bool{false, true} {
		o := order{Do: "requests", Addr: netip.MustParseAddrPort("10.1.0.2:0"), Conns: 2, Fresh: fresh, For: 10 * time.Second}
		_, err := client.ask(t.Context(), o, time.Minute)
		if err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("requests (fresh %v) = %v, want refused", fresh, err)
		}
	}
}

// A request counts from when it was due, and even if it is never answered.
func TestUnansweredRequestsCount(t *testing.T) {
	b := newWire(t)
	l := b.legs[0]
	b.site.(*wire).spaces[l.server.key()].Listen("tcp", "0.0.0.0:8080") // Nobody accepts.
	client, err := startAgent(t.Context(), b.site, b.program, l.client.key())
	if err != nil {
		t.Fatal(err)
	}
	defer client.end()
	o := order{Do: "requests", Addr: netip.MustParseAddrPort("10.1.0.2:0"), Conns: 2, Rate: 100, For: 200 * time.Millisecond}
	got, err := client.ask(t.Context(), o, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if n := got.Load.Latency.total(); got.Load.Total != 0 || n != 19 {
		t.Errorf("answered %d, latencies %d, want none and those of 19 requests due", got.Load.Total, n)
	}
	// The first was due after 10 ms, and all were given up after 400 ms.
	if longest := got.Load.Latency.quantile(1); longest < 350*time.Millisecond {
		t.Errorf("longest latency %v, want that of the first request", longest)
	}
}

func TestAgentSaysHowItEnded(t *testing.T) {
	b := newWire(t)
	a, err := startAgent(t.Context(), b.site, b.program, b.legs[0].client.key())
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(a.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := a.ask(t.Context(), order{Do: "hello"}, connectTimeout); err == nil {
		t.Error("ask of a dead worker = nil, want an error")
	}
	if err := a.end(); err == nil {
		t.Error("end of a dead worker = nil, want how it ended")
	}
	ctx, cancel := context.WithCancel(t.Context())
	a, err = startAgent(ctx, b.site, b.program, b.legs[0].client.key())
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := a.ask(ctx, order{Do: "hello"}, connectTimeout); err == nil {
		t.Error("ask after its context ended = nil, want an error")
	}
	a.end()
}
