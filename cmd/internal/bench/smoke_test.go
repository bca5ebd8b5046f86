package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/ztun/ztun/cmd/internal/lab"
	"github.com/ztun/ztun/tun/netnstest"
)

// A wire is a site of four places on a bridge: the two ends of the legs, and
// beside them one for all pods that are added at each end.
type wire struct {
	spaces map[string]*netnstest.NS
	status lab.Status
	dir    string
	added  map[string]spot // By end.
}

type spot struct {
	space *netnstest.NS
	addr  netip.Addr
}

func (w *wire) Exec(ctx context.Context, target string, argv []string, stdio lab.Stdio) (int, error) {
	space := w.spaces[target]
	if space == nil {
		_, name, _ := strings.Cut(target, "/")
		end, _, _ := strings.Cut(name, "-")
		space = w.added[end].space
	}
	cmd := space.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio.In, stdio.Out, stdio.Err
	err := cmd.Run()
	return cmd.ProcessState.ExitCode(), err
}

// Status tells of the pods that the bench has asked for, too.
func (w *wire) Status(context.Context) (*lab.Status, error) {
	status := w.status
	status.Pods = slices.Clone(status.Pods)
	text, err := os.ReadFile(filepath.Join(w.dir, moreFile))
	if errors.Is(err, os.ErrNotExist) {
		return &status, nil
	}
	for decoder := yaml.NewDecoder(bytes.NewReader(text)); err == nil; {
		var pod struct {
			Metadata struct{ Namespace, Name string }
		}
		if err = decoder.Decode(&pod); err == nil && pod.Metadata.Name != "" {
			end, _, _ := strings.Cut(pod.Metadata.Name, "-")
			at := w.added[end]
			status.Pods = append(status.Pods, lab.PodStatus{
				Namespace: pod.Metadata.Namespace, Name: pod.Metadata.Name, Addresses: []netip.Addr{at.addr}, Netns: at.space.Path(),
			})
		}
	}
	if !errors.Is(err, io.EOF) {
		return nil, err
	}
	return &status, nil
}

func (w *wire) Kill(context.Context, string, syscall.Signal, bool) error { return nil }

// newWire makes a bench of the legs that need no mesh.
func newWire(t *testing.T) *bench {
	t.Helper()
	middle := netnstest.New(t, "switch")
	at := func(name string, n int) spot {
		ns := netnstest.New(t, name)
		port := fmt.Sprintf("p%d", n)
		netnstest.Veth(t, ns, "eth0", middle, port)
		addr := netip.AddrFrom4([4]byte{10, 1, 0, byte(n)})
		ns.Addr("eth0", addr.String()+"/24")
		return spot{ns, addr}
	}
	a, z := at("client", 1), at("server", 2)
	added := map[string]spot{clientEnd: at("more clients", 3), serverEnd: at("more servers", 4)}
	middle.Bridge("br0", "p1", "p2", "p3", "p4")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	legs := allLegs()[:2]
	w := &wire{spaces: map[string]*netnstest.NS{meterAt: a.space}, dir: t.TempDir(), added: added}
	w.status.Dir, w.status.Config = w.dir, t.TempDir()
	for _, l := range legs {
		for p, at := range map[*benchPod]spot{l.client: a, l.server: z} {
			w.spaces[p.key()] = at.space
			w.status.Pods = append(w.status.Pods, lab.PodStatus{Namespace: p.namespace, Name: p.name, Addresses: []netip.Addr{at.addr}, Netns: at.space.Path()})
		}
	}
	b := &bench{
		options: options{
			Rounds: 1, Window: time.Second, Settle: time.Second, Conns: 50,
			Idle: 30, IdleFor: 10 * time.Millisecond, IdlePods: 2, Spread: 10, Services: 20, Pods: 2, Beside: 1,
		},
		site: w, program: program, progress: &bytes.Buffer{}, figures: newFigures(1),
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
	trials := allTrials(b.options)
	if err := b.run(t.Context(), trials); err != nil {
		t.Fatal(err)
	}
	// Without proxies, but for ratios of the leg to itself.
	alone := []string{"pods-ratio", "services-rps-ratio", "services-new-conns-ratio", "fair-p99", "bytes-per-idle-conn", "idle-30"}
	for _, trial := range trials {
		for _, r := range trial.rows {
			f, ok := b.figures.of(r, legDirect)
			wanted := !r.alone || slices.Contains(alone, r.name)
			// 50 connections may be lost in the noise.
			if ok != wanted || ok && f.Median <= 0 && r.name != "bytes-per-idle-conn" {
				t.Errorf("%s = %+v, %v, want a figure: %v", r.name, f, ok, wanted)
			}
		}
	}
	if f, _ := b.figures.of(row{name: "idle-30"}, legDirect); f.Median != 30 {
		t.Errorf("%v of 30 idle connections are alive", f.Median)
	}
	if f, _ := b.figures.of(row{name: "stall-bytes"}, legDirect); f.Median > maxStall/mebi/2 {
		t.Errorf("stall-bytes = %v MiB: nothing stopped the sender", f.Median)
	}
	if status, err := b.site.Status(t.Context()); err != nil || len(status.Pods) != 4 {
		t.Errorf("status = %+v, %v, want only the pods from before", status, err)
	}
	if left, err := os.ReadDir(b.config); err != nil || len(left) > 0 {
		t.Errorf("the control plane still finds %v, %v", left, err)
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
	if err := b.run(t.Context(), selected(allTrials(b.options), regexp.MustCompile("stream-1-up|p50"))); err != nil {
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

// Requests are in flight as many as were asked for, in turn on all connections,
// and these come from each place alike.
func TestRequestsTakeTurns(t *testing.T) {
	b := newWire(t)
	w := b.site.(*wire)
	var mu sync.Mutex
	requests, places := map[string]int{}, map[string]int{} // By connection, by client.
	now, most := 0, 0
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		mu.Lock()
		if requests[r.RemoteAddr]++; requests[r.RemoteAddr] == 1 {
			places[host]++
		}
		now++
		most = max(most, now)
		mu.Unlock()
		time.Sleep(time.Millisecond) // Time for others to be in flight too.
		mu.Lock()
		now--
		mu.Unlock()
		w.Write([]byte(body))
	}))
	s.Listener.Close()
	s.Listener = w.spaces[b.legs[0].server.key()].Listen("tcp", "0.0.0.0:8080")
	s.Start()
	defer s.Close()
	client, err := startAgent(t.Context(), b.site, b.program, meterAt)
	if err != nil {
		t.Fatal(err)
	}
	defer client.end()
	o := order{
		Do: "requests", Addr: netip.MustParseAddrPort("10.1.0.2:0"), Conns: 12, InFlight: 3, For: 500 * time.Millisecond,
		From: []string{w.spaces[meterAt].Path(), w.added[clientEnd].space.Path(), ""},
	}
	got, err := client.ask(t.Context(), o, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if want := map[string]int{"10.1.0.1": 8, "10.1.0.3": 4}; !maps.Equal(places, want) {
		t.Errorf("connections by client = %v, want %v", places, want)
	}
	if most > 3 || got.Load.Total < 30 {
		t.Errorf("%d requests in flight at once, %d answered, want at most 3, and many", most, got.Load.Total)
	}
	least, greatest := math.MaxInt, 0
	for _, n := range requests {
		least, greatest = min(least, n), max(greatest, n)
	}
	if greatest > 2*least+2 {
		t.Errorf("%d to %d requests on a connection, want the same on each", least, greatest)
	}
}

// What was opened and has been closed since does not count as alive.
func TestClosedIdleConnectionsAreNotAlive(t *testing.T) {
	b := newWire(t)
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := b.legs[0]
	l.proxies = []string{redirector} // Only its own pods.
	h, err := b.hold(t.Context(), l, &stage{})
	if err != nil {
		t.Fatal(err)
	}
	defer h.end()
	if a, err := h.open(t.Context(), 20, false); err != nil || a.Open != 20 {
		t.Fatalf("open = %+v, %v, want 20 open", a, err)
	}
	other, err := startAgent(t.Context(), b.site, b.program, l.client.key())
	if err != nil {
		t.Fatal(err)
	}
	some := order{Do: "idle", Addr: b.server(l), Conns: 10, OneByOne: true}
	if a, err := other.ask(t.Context(), some, time.Minute); err != nil || a.Open != 10 || a.Took <= 0 {
		t.Fatalf("idle one by one = %+v, %v, want 10 open and how long it took", a, err)
	}
	if err := other.end(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if n, err := h.alive(t.Context()); err != nil || n != 20 {
			t.Errorf("alive = %d, %v, want 20: 10 of 30 are closed", n, err)
		}
	}
	if err := h.servers[0].end(); err != nil {
		t.Fatal(err)
	}
	h.servers = nil
	if n, err := h.alive(t.Context()); err != nil || n != 0 {
		t.Errorf("alive without a server = %d, %v, want none", n, err)
	}
	if a, err := h.open(t.Context(), 5, false); err != nil || a.Open != 0 || !strings.Contains(a.Failure, "refused") {
		t.Errorf("open without a server = %+v, %v, want none open and why", a, err)
	}
}

// A lazyLab does nothing about the pods that are wanted, and says why.
type lazyLab struct {
	*wire
	asked int
	end   func() // Called when it has been asked three times.
}

func (l *lazyLab) Status(context.Context) (*lab.Status, error) {
	if l.asked++; l.asked == 3 {
		l.end()
	}
	status := l.status
	status.Problem = "the bridge is full"
	return &status, nil
}

func TestPodsThatDoNotComeAreNamed(t *testing.T) {
	b := newWire(t)
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	b.site = &lazyLab{wire: b.site.(*wire), end: cancel}
	pods := []*benchPod{b.legs[0].client, b.legs[0].more(clientEnd, 0), b.legs[0].more(clientEnd, 1)}
	err := b.addPods(ctx, pods)
	if err == nil || !strings.Contains(err.Error(), "2 of 3 pods have not come: the bridge is full") {
		t.Errorf("addPods = %v, want how many have not come and why", err)
	}
}

// The proxies are asked until they know all, and nothing else.
func TestKnowWaitsForTheProxies(t *testing.T) {
	b := newWire(t)
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := b.site.(*wire)
	w.spaces["node/node-a"] = w.spaces[meterAt]
	b.legs[0].proxies = []string{"proxy/node-a"}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var asked atomic.Int32
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		known := func(n int) string {
			return strings.TrimSuffix(strings.Repeat(`{"name": "x", "namespace": "known"}, `, n)+`{"namespace": "else"}`, ", ")
		}
		n := int(asked.Add(1))
		if n == 6 {
			cancel()
		}
		fmt.Fprintf(w, `{"services": [%s], "workloads": [%s]}`, known(n), known(min(2, n)))
	}))
	s.Listener.Close()
	s.Listener = w.spaces[meterAt].Listen("tcp", "127.0.0.1:15000")
	s.Start()
	defer s.Close()
	if err := b.know(t.Context(), 2); err != nil || asked.Load() != 2 {
		t.Errorf("know(2) = %v after %d questions, want it to take two", err, asked.Load())
	}
	text, err := os.ReadFile(filepath.Join(b.config, knownFile))
	if err != nil || strings.Count(string(text), "kind: Service,") != 2 || strings.Count(string(text), "kind: Pod,") != 2 {
		t.Errorf("the control plane reads %q, %v, want two services and two pods", text, err)
	}
	if err := b.know(ctx, 3); err == nil || !strings.Contains(err.Error(), "2 of 3") {
		t.Errorf("know(3) = %v, want that the proxy knows 2 of 3", err)
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
