package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sample is a report with all that can happen in one.
func sample() *report {
	f := newFigures(2)
	for round, direct := range []float64{20, 10} {
		f.set("stream-1-up", legDirect, round, direct)
		f.set("stream-1-up", legPlain, round, direct/4)
		f.set("stream-1-up", legHBONE, round, direct/5)
		f.set("rss", legHBONE, round, 40.25)
	}
	legs := allLegs()[:4]
	legs[1].missing = "iptables is not there"
	return &report{
		head:    []string{"head"},
		rows:    []row{{name: "stream-1-up", unit: "Gbit/s"}, {name: "rss", unit: "MiB", alone: true}},
		legs:    legs,
		figures: f,
	}
}

func TestMarkdown(t *testing.T) {
	want := `head

| row | unit | direct | kernel-redirect | ztun-plain | ztun-hbone |
|---|---|---|---|---|---|
| stream-1-up | Gbit/s | 15.0 (10.0 to 20.0) | n/a | 3.75 (2.50 to 5.00) x0.25 | 3.00 (2.00 to 4.00) x0.20 |
| rss | MiB | n/a | n/a | n/a | 40.2 (40.2 to 40.2) |

Median (least to greatest of the rounds), x ratio to direct in the same round.

kernel-redirect is n/a: iptables is not there

Goals:
- ztun-hbone stream-1-up: 0.20 x direct, asked >= 0.18: reached
- ztun-plain stream-1-up: 0.25 x direct, asked >= 0.35: MISSED
`
	var got strings.Builder
	sample().markdown(&got)
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("markdown (-want +got):\n%s", diff)
	}
}

func TestJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bench.json")
	if err := sample().writeJSON(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	want := []map[string]any{
		{"row": "stream-1-up", "leg": "direct", "unit": "Gbit/s", "median": 15.0, "min": 10.0, "max": 20.0, "to_direct": 1.0, "to_other": nil},
		{"row": "stream-1-up", "leg": "ztun-plain", "unit": "Gbit/s", "median": 3.75, "min": 2.5, "max": 5.0, "to_direct": 0.25, "to_other": nil},
		{"row": "stream-1-up", "leg": "ztun-hbone", "unit": "Gbit/s", "median": 3.0, "min": 2.0, "max": 4.0, "to_direct": 0.2, "to_other": nil},
		{"row": "rss", "leg": "ztun-hbone", "unit": "MiB", "median": 40.25, "min": 40.25, "max": 40.25, "to_direct": nil, "to_other": nil},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("bench.json (-want +got):\n%s", diff)
	}
}

// A leg is compared with the other proxy's leg of the same shape, round by
// round, also in rows that are no ratio to the direct leg.
func TestRatioToOther(t *testing.T) {
	f := newFigures(3)
	for round, speed := range []float64{8, 4, 2} { // The machine slows down.
		f.set("rss", legHBONE, round, speed*[]float64{3, 2, 1}[round])
		f.set("rss", legOther, round, speed)
		f.set("rss", legSameNode, round, speed*4)
		f.set("rss", legOtherSameNode, round, speed/2)
	}
	r := &report{rows: []row{{name: "rss", unit: "MiB", alone: true}}, legs: allLegs(), figures: f}
	got := map[string]*float64{}
	for _, fig := range r.list() {
		got[fig.Leg] = fig.ToOther
	}
	two, eight := 2.0, 8.0
	want := map[string]*float64{legHBONE: &two, legOther: nil, legSameNode: &eight, legOtherSameNode: nil}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ratios to other (-want +got):\n%s", diff)
	}
	var text strings.Builder
	r.markdown(&text)
	for _, want := range []string{
		"| n/a | n/a | n/a | 8.00 (2.00 to 24.0) o2.00 | 16.0 (8.00 to 32.0) o8.00 | 4.00 (2.00 to 8.00) | 2.00 (1.00 to 4.00) |\n",
		"in the same round, o ratio to other (of ztun-same-node: to other-same-node).\n",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("markdown has no %q:\n%s", want, text.String())
		}
	}
}

func TestRivalsAreLegs(t *testing.T) {
	legs := map[string]*leg{}
	for _, l := range allLegs() {
		legs[l.name] = l
	}
	for name, rival := range rivals {
		a, b := legs[name], legs[rival]
		if a == nil || b == nil || a.other || !b.other {
			t.Fatalf("%s is compared with %s: want one leg of ztun's and one of the other proxy's", name, rival)
		}
		sameNode := func(l *leg) bool { return l.client.node == l.server.node }
		if sameNode(a) != sameNode(b) {
			t.Errorf("%s is compared with %s: one is within a node", name, rival)
		}
	}
}

// Goals are a ratio in the same round or a value, from below or from above.
func TestGoalsAreJudged(t *testing.T) {
	f := newFigures(2)
	for round, slow := range []float64{1, 4} {
		f.set("rps-8", legHBONE, round, 100/slow)
		f.set("rps-8", legOther, round, 100/slow)
		f.set("p99", legHBONE, round, 100*slow)
		f.set("p99", legOther, round, 110*slow)
		f.set("stall-bytes", legHBONE, round, 4)
		f.set("pods-ratio", legHBONE, round, 0.85)
		f.set("rps-64", legHBONE, round, 1) // Nothing to compare with.
	}
	r := &report{legs: allLegs(), figures: f, rows: []row{
		{name: "rps-8", unit: "1/s"}, {name: "rps-64", unit: "1/s"}, {name: "p99", unit: "us"}, {name: "stall-bytes", unit: "MiB"}, {name: "pods-ratio", unit: "x", alone: true},
	}}
	want := `
Goals:
- ztun-hbone rps-8: 1.00 x other, asked >= 1.10: MISSED
- ztun-hbone p99: 0.91 x other, asked <= 1.00: reached
- ztun-hbone stall-bytes: 4.00 MiB, asked <= 3.00: MISSED
- ztun-hbone pods-ratio: 0.85 x, asked >= 0.85: reached
`
	var got strings.Builder
	r.goals(&got)
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("goals (-want +got):\n%s", diff)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0.123: "0.12", 9.994: "9.99", 12.34: "12.3", 123.4: "123", 31234.5: "31234", -33010: "-33010"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %s, want %s", v, got, want)
		}
	}
}
