package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
)

// A report is what a run ends with.
type report struct {
	head    []string // Lines about the run and the machine.
	rows    []row
	legs    []*leg
	figures *figures
	busiest bystanding
}

// list returns the figures in the order of the table.
func (r *report) list() []figure {
	figures := []figure{}
	for _, row := range r.rows {
		for _, l := range r.legs {
			if f, ok := r.figures.of(row, l.name); ok {
				figures = append(figures, f)
			}
		}
	}
	return figures
}

// writeJSON writes the list of figures to a file.
func (r *report) writeJSON(path string) error {
	text, err := json.MarshalIndent(r.list(), "", "  ")
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	return writeWhole(path, append(text, '\n'))
}

// markdown prints the table, what is missing of it, and the goals.
func (r *report) markdown(w io.Writer) {
	for _, line := range r.head {
		fmt.Fprintln(w, line)
	}
	fmt.Fprintf(w, "\n| row | unit |")
	for _, l := range r.legs {
		fmt.Fprintf(w, " %s |", l.name)
	}
	fmt.Fprintf(w, "\n|---|---|%s\n", strings.Repeat("---|", len(r.legs)))
	for _, row := range r.rows {
		fmt.Fprintf(w, "| %s | %s |", row.name, row.unit)
		for _, l := range r.legs {
			f, ok := r.figures.of(row, l.name)
			fmt.Fprintf(w, " %s |", cell(f, ok))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "\nMedian (least to greatest of the rounds), x ratio to %s in the same round", legDirect)
	if slices.ContainsFunc(r.legs, func(l *leg) bool { return l.other }) {
		fmt.Fprintf(w, ", o ratio to %s (of %s: to %s)", legOther, legSameNode, legOtherSameNode)
	}
	fmt.Fprintln(w, ".")
	if r.busiest.leg != "" {
		fmt.Fprintf(w, "\nWhat had no part in a leg used at most %.1f %% of a CPU under load (%s, %s; most of it %s).\n",
			100*r.busiest.share, r.busiest.leg, r.busiest.row, r.busiest.most)
	}
	for _, l := range r.legs {
		if l.missing != "" {
			fmt.Fprintf(w, "\n%s is n/a: %s\n", l.name, l.missing)
		}
	}
	r.goals(w)
}

func cell(f figure, ok bool) string {
	if !ok {
		return "n/a"
	}
	text := fmt.Sprintf("%s (%s to %s)", number(f.Median), number(f.Min), number(f.Max))
	if f.ToDirect != nil && f.Leg != legDirect {
		text += fmt.Sprintf(" x%.2f", *f.ToDirect)
	}
	if f.ToOther != nil {
		text += fmt.Sprintf(" o%.2f", *f.ToOther)
	}
	return text
}

// number prints three digits or more, never an exponent.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// loadAverage is how busy the machine was just before, "?" if it cannot be told.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	first, _, _ := strings.Cut(string(text), " ")
	return first
}
