package main

import (
	"fmt"
	"io"
	"slices"
)

// A goal is what is asked of a leg in a row.
type goal struct {
	leg, row string
	// to is the leg that it is compared with in the same round. Empty: the
	// median itself counts, in the row's unit.
	to string
	// One of them is asked for; the other is 0.
	least, most float64
}

// goals are those of the project. Rows whose names have other numbers are not
// measured as the goal says, and not judged.
var goals = slices.Concat(
	[]goal{
		{leg: legHBONE, row: "stream-1-up", to: legDirect, least: 0.18},
		{leg: legHBONE, row: "stream-1-down", to: legDirect, least: 0.18},
		{leg: legHBONE, row: "rps-8", to: legDirect, least: 0.18},
		{leg: legHBONE, row: "rps-64", to: legDirect, least: 0.30},
		{leg: legHBONE, row: "new-conns", to: legDirect, least: 0.18},
		{leg: legPlain, row: "stream-1-up", to: legDirect, least: 0.35},
		{leg: legPlain, row: "stream-1-down", to: legDirect, least: 0.35},
	},
	beside(legHBONE, besideOther{streams: 1.1, requests: 1.1, conns: 1.1, cpu: 1.0, latency: 1.0}),
	beside(legSameNode, besideOther{streams: 2.5, requests: 1.5, conns: 1.5, cpu: 0.6, latency: 0.9}),
	[]goal{
		{leg: legHBONE, row: "stall-bytes", most: 3},
		{leg: legSameNode, row: "stall-bytes", most: 3},
		{leg: legPlain, row: "rss-at-rest", most: 40},
		{leg: legHBONE, row: "bytes-per-idle-pod", most: 80 << 10},
		{leg: legHBONE, row: "fair-p99", most: 3},
		{leg: legSameNode, row: "fair-p99", most: 3},
		{leg: legHBONE, row: "bytes-per-idle-conn", most: 16 << 10},
		{leg: legHBONE, row: "open-12000", to: legDirect, most: 4.5},
		{leg: legHBONE, row: "open-12000", to: legOther, most: 1},
		{leg: legHBONE, row: "idle-50000", least: 50_000},
		{leg: legHBONE, row: "pods-ratio", least: 0.85},
		{leg: legSameNode, row: "pods-ratio", least: 0.85},
		{leg: legHBONE, row: "services-rps-ratio", least: 0.95},
		{leg: legSameNode, row: "services-rps-ratio", least: 0.95},
		{leg: legHBONE, row: "services-new-conns-ratio", least: 0.95},
		{leg: legHBONE, row: "idle-pods-1000-bytes", most: 80 << 10},
		{leg: legHBONE, row: "idle-pods-1000-threads", most: 64},
		{leg: legHBONE, row: "idle-pods-1000-cpu", most: 10}, // Of 1,000: none that matters.
	},
)

// besideOther is what a leg is asked for beside that of another proxy.
type besideOther struct {
	streams, requests, conns float64 // At least.
	cpu, latency             float64 // At most.
}

func beside(leg string, asked besideOther) []goal {
	var goals []goal
	least := func(ratio float64, rows ...string) {
		for _, r := range rows {
			goals = append(goals, goal{leg: leg, row: r, to: rivals[leg], least: ratio})
		}
	}
	most := func(ratio float64, rows ...string) {
		for _, r := range rows {
			goals = append(goals, goal{leg: leg, row: r, to: rivals[leg], most: ratio})
		}
	}
	least(asked.streams, "stream-1-up", "stream-1-down", "stream-8-up", "stream-8-down")
	least(asked.requests, "rps-8", "rps-64", "rps-512")
	least(asked.conns, "new-conns")
	most(asked.cpu, "cpu-per-request")
	most(asked.latency, "p50", "p99")
	return goals
}

// value is what is judged, false if it was not measured.
func (g goal) value(f *figures, r row) (float64, bool) {
	if g.to != "" {
		ratio := f.ratio(g.row, g.leg, g.to)
		if ratio == nil {
			return 0, false
		}
		return *ratio, true
	}
	fig, ok := f.of(r, g.leg)
	return fig.Median, ok
}

// reached says whether a value is what is asked for.
func (g goal) reached(v float64) bool {
	if g.most > 0 {
		return v <= g.most
	}
	return v >= g.least
}

func (g goal) String() string {
	if g.most > 0 {
		return "<= " + number(g.most)
	}
	return ">= " + number(g.least)
}

// goals prints which goals were reached, of those that were measured.
func (r *report) goals(w io.Writer) {
	heading := "\nGoals:\n"
	for _, g := range goals {
		i := slices.IndexFunc(r.rows, func(row row) bool { return row.name == g.row })
		if i < 0 {
			continue
		}
		v, ok := g.value(r.figures, r.rows[i])
		if !ok {
			continue
		}
		what, verdict := r.rows[i].unit, "reached"
		if g.to != "" {
			what = "x " + g.to
		}
		if !g.reached(v) {
			verdict = "MISSED"
		}
		fmt.Fprintf(w, "%s- %s %s: %s %s, asked %v: %s\n", heading, g.leg, g.row, number(v), what, g, verdict)
		heading = ""
	}
}
