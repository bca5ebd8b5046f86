package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	nodeagent "github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/lab"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun/netnstest"
)

// buildPrograms builds the ztun that runs a lab. No node of it has a
// ztun-proxy.
func buildPrograms(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	build := exec.Command("go", "build", "-o", dir, "../../ztun")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build ztun: %v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(dir, "ztun-proxy"), []byte("#!/bin/sh\nexec sleep 100000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// seat makes a bench of the other proxy's legs, with this program in the seat.
func seat(t *testing.T) (*bench, *lab.Lab) {
	t.Helper()
	netnstest.Require(t)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	progress := &bytes.Buffer{}
	b := &bench{
		options: options{Rounds: 1, Window: time.Second, Settle: time.Second, Conns: 50, Other: seatedBy + " " + program + " transparent"},
		program: program, progress: progress, figures: newFigures(1),
		legs: slices.DeleteFunc(allLegs(), func(l *leg) bool { return !l.other }),
	}
	l, err := b.startLab(t.Context(), buildPrograms(t))
	if err != nil {
		t.Fatalf("%v\n%s", err, progress)
	}
	t.Cleanup(func() {
		b.close()
		ctx, cancel := context.WithTimeout(context.Background(), downTimeout)
		defer cancel()
		if t.Failed() {
			l.Logs(ctx, "", false, os.Stderr)
		}
		if err := l.Down(ctx); err != nil {
			t.Errorf("Down = %v", err)
		}
	})
	b.site = l
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b, l
}

func TestOtherProxyTakesTheSeat(t *testing.T) {
	b, l := seat(t)
	if missing := b.legs[0].missing; missing != "" {
		if !strings.Contains(missing, "iptables") && !strings.Contains(missing, "iproute2") {
			t.Errorf("missing = %q, want it to name iptables or iproute2", missing)
		}
		return
	}
	if err := b.run(t.Context(), []trial{pacedTrial()}); err != nil {
		t.Fatal(err)
	}
	cpu := pacedTrial().rows[0]
	for _, leg := range b.legs {
		if f, ok := b.figures.of(cpu, leg.name); !ok || f.Median <= 0 {
			t.Errorf("%s of %s = %+v, %v, want a figure", cpu.name, leg.name, f, ok)
		}
	}
	status, err := b.site.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range status.Nodes {
		if n.Proxy.Starts != 1 {
			t.Errorf("%+v, want it started once", n.Proxy)
		}
	}
	between, within := b.legs[0], b.legs[1]
	before, err := b.pids(t.Context(), between)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.restart(t.Context(), between); err != nil {
		t.Fatal(err)
	}
	after, err := b.pids(t.Context(), between)
	if err != nil || len(after) != 2 || slices.ContainsFunc(after, func(pid int) bool { return slices.Contains(before, pid) }) {
		t.Errorf("processes were %v and are %v, %v, want two others", before, after, err)
	}
	// It is in between, on both nodes: without it nothing goes through.
	for _, without := range []string{"proxy/" + otherB, "proxy/" + otherA} {
		if err := b.site.Kill(t.Context(), without, syscall.SIGKILL, true); err != nil {
			t.Fatal(err)
		}
		netnstest.Eventually(t, "nothing goes through without "+without, func() bool {
			_, err := b.requests(t.Context(), between, order{Conns: 1})
			return err != nil
		})
		if without == "proxy/"+otherB {
			if err := b.probe(t.Context(), within); err != nil {
				t.Errorf("within the other node: %v", err)
			}
		}
		if err := l.Release(t.Context(), without); err != nil {
			t.Fatal(err)
		}
		if err := b.probe(t.Context(), between); err != nil {
			t.Errorf("after %s came back: %v", without, err)
		}
	}
}

func TestProblemOfAPodMakesItsLegMissing(t *testing.T) {
	b := newWire(t)
	w := b.site.(*wire)
	for i := range w.status.Pods {
		w.status.Pods[i].Error = "iptables is not there"
	}
	if err := b.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.legs[0].missing; got != "iptables is not there" {
		t.Errorf("missing = %q, want what is wrong with the leg's server", got)
	}
}

// A taker takes network namespaces.
type taker struct {
	mu    sync.Mutex
	taken map[string]uint64 // Their inodes by UID.
}

type takenPod struct {
	*taker
	uid   string
	files zds.Files
}

func (tk *taker) Start(w zds.Workload, files zds.Files) (zds.Proxy, error) {
	n, err := inode(files.Device)
	if err != nil {
		files.Close()
		return nil, err
	}
	tk.mu.Lock()
	defer tk.mu.Unlock()
	tk.taken[w.UID] = n
	return takenPod{tk, w.UID, files}, nil
}

func (p takenPod) Stop() {
	p.files.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.taken, p.uid)
}

func (tk *taker) has(uid string) uint64 {
	tk.mu.Lock()
	defer tk.mu.Unlock()
	return tk.taken[uid]
}

func inode(f *os.File) (uint64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

// runUntilEnd runs something that ends with its context, until the test does
// or the returned function is called.
func runUntilEnd(t *testing.T, run func(context.Context) error) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		run(ctx)
	}()
	end = func() {
		cancel()
		<-done
	}
	t.Cleanup(end)
	return end
}

func TestPodIsHandedOver(t *testing.T) {
	ns := netnstest.New(t, "pod")
	if err := redirectPod(ns.Path()); err != nil {
		t.Skipf("no rules here: %v", err)
	}
	socket := filepath.Join(t.TempDir(), "zds.sock")
	open := func() (*handover, func()) {
		h, err := newHandover(socket, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return h, runUntilEnd(t, h.Run)
	}
	pod := nodeagent.Pod{UID: "u-1", Name: "pod", Namespace: "ns", ServiceAccount: "sa", Netns: ns.Path()}
	want, err := inode(ns.File())
	if err != nil {
		t.Fatal(err)
	}

	h, end := open()
	if err := h.Set(pod); err != nil {
		t.Fatal(err)
	}
	if got := h.Status(); len(got) != 1 || got[0].Phase != nodeagent.Attached || !strings.Contains(got[0].Error, "no proxy") {
		t.Errorf("Status without a proxy = %+v, want the pod attached", got)
	}
	proxy := &taker{taken: map[string]uint64{}}
	client := zds.NewClient(zds.ClientConfig{Socket: socket, Starter: proxy})
	runUntilEnd(t, client.Run)
	served := func() bool { s := h.Status(); return len(s) == 1 && s[0].Phase == nodeagent.Served && s[0].Error == "" }
	netnstest.Eventually(t, "the pod is served", served)
	if got := proxy.has(pod.UID); got != want {
		t.Errorf("the proxy was handed inode %d, want the pod's namespace %d", got, want)
	}

	// The next one finds rules, a proxy, and the socket of one that was killed.
	h.socket.SetUnlinkOnClose(false)
	end()
	if _, err := os.Stat(socket); err != nil {
		t.Fatal(err)
	}
	h, _ = open()
	if err := h.Set(pod); err != nil {
		t.Fatal(err)
	}
	netnstest.Eventually(t, "the pod is served again", served)
	if got := strings.Count(ns.Run("ip", "rule"), "fwmark 0x111/0xfff lookup 100"); got != 1 {
		t.Errorf("%d rules for what is marked 0x111, want 1", got)
	}
	if err := h.Delete(t.Context(), pod.UID); err != nil {
		t.Fatal(err)
	}
	if got := h.Status(); len(got) != 0 || proxy.has(pod.UID) != 0 {
		t.Errorf("after Delete: %+v, the proxy has %d, want neither to know the pod", got, proxy.has(pod.UID))
	}
}

// A pod whose rules cannot be made must not hold up the lab, nor be handed
// over: the proxy would wait for what never comes.
func TestPodWithoutRulesIsLetGo(t *testing.T) {
	dir := t.TempDir()
	h, err := newHandover(filepath.Join(dir, "zds.sock"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	runUntilEnd(t, h.Run)
	file := filepath.Join(dir, "no-namespace") // It can be opened, and not entered.
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.Set(nodeagent.Pod{UID: "u-1", Name: "pod", Namespace: "ns", ServiceAccount: "sa", Netns: file}); err != nil {
		t.Fatal(err)
	}
	if got := h.Status(); len(got) != 1 || got[0].Phase != nodeagent.Served || got[0].Error == "" {
		t.Errorf("Status = %+v, want the pod served, and why it is not redirected", got)
	}
	if h.server.State("u-1").Set {
		t.Error("the proxy is told of a pod that has no rules")
	}
}
