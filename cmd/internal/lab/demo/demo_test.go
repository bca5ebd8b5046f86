package demo

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ztun/ztun/xds/control"
)

func TestTheMeshIsOneThatControlServes(t *testing.T) {
	world, report := control.Check(control.Config{Static: control.NewStatic(map[string]string{"mesh.yaml": mesh})})
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
	enrolled := 0
	for _, p := range world.Pods() {
		if p.Enrolled {
			enrolled++
		}
	}
	if enrolled != 3 || len(world.Services()) != 1 {
		t.Errorf("mesh has %d pods in the mesh and %d services, want 3 and 1", enrolled, len(world.Services()))
	}
}

func TestExamplesAreServed(t *testing.T) {
	dirs, err := filepath.Glob("../../../../deploy/examples/*")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, dir := range dirs {
		if _, report := control.Check(control.Config{Dir: dir}); report.Err() != nil {
			t.Errorf("%s: %v", dir, report.Err())
		}
	}
}

func TestAccessLineWantsBothIdentities(t *testing.T) {
	line := func(message, direction, source, destination string) string {
		return "2026-01-01T00:00:00Z\tinfo\taccess\t" + message + "\tsrc.identity=\"" + source + "\" dst.identity=\"" + destination + "\" direction=\"" + direction + "\"\n"
	}
	const a, b = "spiffe://cluster.local/ns/demo/sa/a", "spiffe://cluster.local/ns/demo/sa/b"
	good := line("connection complete", "inbound", a, b)
	for _, tt := range []struct {
		name, log string
		want      bool
	}{
		{"good", "other\n" + good, true},
		{"opened only", line("connection opened", "inbound", a, b), false},
		{"other direction", line("connection complete", "outbound", a, b), false},
		{"one identity", line("connection complete", "inbound", a, ""), false},
		{"the wrong way round", line("connection complete", "inbound", b, a), false},
		{"over two lines", line("connection complete", "inbound", a, "") + line("connection complete", "inbound", "", b), false},
		{"failed", strings.TrimSuffix(good, "\n") + " error=\"x\"\n", false},
		{"nothing", "", false},
	} {
		if got := accessLine(tt.log, "inbound", a, b) != ""; got != tt.want {
			t.Errorf("%s: accessLine found it = %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestCheckCountsWhatDoesNotHold(t *testing.T) {
	var out strings.Builder
	d := &demo{out: &out}
	d.check(true, "one")
	d.check(false, "two", "instead", errors.New("this"))
	if d.checked != 2 || d.failed != 1 || out.String() != "   ok   one\n   FAIL two\n        found: instead this\n" {
		t.Errorf("check: %d checked, %d failed, printed %q", d.checked, d.failed, out.String())
	}
}
