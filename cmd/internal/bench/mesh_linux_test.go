package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ztun/ztun/tun/netnstest"
)

// newMesh makes a bench of one leg in a lab with real proxies, at a tiny size.
func newMesh(t *testing.T, name string) *bench {
	t.Helper()
	netnstest.Require(t)
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir, "../../ztun", "../../ztun-proxy")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	progress := &bytes.Buffer{}
	b := &bench{
		options: options{
			Rounds: 1, Window: time.Second, Settle: time.Second, Conns: 50,
			Idle: 30, IdleFor: 10 * time.Millisecond, IdlePods: 3, Spread: 5, Services: 20, Pods: 2, Beside: 2,
		},
		program: program, progress: progress, figures: newFigures(1),
		legs: slices.DeleteFunc(allLegs(), func(l *leg) bool { return l.name != name }),
	}
	l, err := b.startLab(t.Context(), dir)
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
	return b
}

// What needs a mesh, or changes it.
func TestMeshIsMeasured(t *testing.T) {
	b := newMesh(t, legHBONE)
	trials := selected(allTrials(b.options), regexp.MustCompile("^(stall|rss|fair|idle|open|pods|services|bytes-per-idle-pod)"))
	if err := b.run(t.Context(), trials); err != nil {
		t.Fatal(err)
	}
	for _, trial := range trials {
		for _, r := range trial.rows {
			f, ok := b.figures.of(r, legHBONE)
			if r.name == "bytes-per-idle-conn" { // It is what comes on top of direct.
				ok = !ok
			}
			// Few connections and pods may be lost in the noise, and nothing
			// costs nothing.
			small := strings.Contains(r.name, "per-idle") || strings.HasPrefix(r.name, "idle-pods-3")
			if !ok || f.Median <= 0 && !small {
				t.Errorf("%s = %+v, %v, want a figure", r.name, f, ok)
			}
		}
	}
	if f, _ := b.figures.of(row{name: "idle-30"}, legHBONE); f.Median != 30 {
		t.Errorf("%v of 30 idle connections are alive", f.Median)
	}
	if f, _ := b.figures.of(row{name: "idle-pods-3-threads"}, legHBONE); f.Median < 2 || f.Median > 500 {
		t.Errorf("a proxy has %v threads", f.Median)
	}
	// What stages added is gone.
	status, err := b.site.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range status.Pods {
		names = append(names, p.Namespace+"/"+p.Name)
	}
	slices.Sort(names)
	if got, want := strings.Join(names, " "), "bench-mesh/client bench-mesh/server"; got != want {
		t.Errorf("pods = %s, want %s", got, want)
	}
	for _, node := range []string{"node/" + nodeA, "node/" + nodeB} {
		if a, err := b.agents[node].ask(t.Context(), order{Do: "known"}, connectTimeout); err != nil || a.Known != 0 {
			t.Errorf("%s knows %d services, %v, want none of those that were made up", node, a.Known, err)
		}
	}
}
