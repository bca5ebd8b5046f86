package main

import (
	"math"
	"slices"
)

// figures are what was measured: by row and leg, one value a round.
type figures struct {
	rounds int
	values map[place][]float64 // NaN where a round has no value.
}

// A place is where a value stands in the table.
type place struct{ row, leg string }

func newFigures(rounds int) *figures {
	return &figures{rounds: rounds, values: map[place][]float64{}}
}

// set keeps the value of a round, counted from 0.
func (f *figures) set(row, leg string, round int, value float64) {
	p := place{row, leg}
	if f.values[p] == nil {
		f.values[p] = slices.Repeat([]float64{math.NaN()}, f.rounds)
	}
	f.values[p][round] = value
}

// A figure is what is reported of a row and leg.
type figure struct {
	Row    string  `json:"row"`
	Leg    string  `json:"leg"`
	Unit   string  `json:"unit"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	// ToDirect is the median over the rounds of the ratio to the direct leg
	// in the same round. Nil where there is nothing to compare.
	ToDirect *float64 `json:"to_direct"`
}

// of returns the figure of a row and leg, false if there is none.
func (f *figures) of(r row, leg string) (figure, bool) {
	values := f.values[place{r.name, leg}]
	known := present(values)
	if len(known) == 0 {
		return figure{}, false
	}
	fig := figure{Row: r.name, Leg: leg, Unit: r.unit, Median: median(known), Min: slices.Min(known), Max: slices.Max(known)}
	direct := f.values[place{r.name, legDirect}]
	if r.alone || direct == nil {
		return fig, true
	}
	var ratios []float64
	for i := range values {
		if direct[i] > 0 {
			ratios = append(ratios, values[i]/direct[i])
		}
	}
	if ratios = present(ratios); len(ratios) > 0 {
		m := median(ratios)
		fig.ToDirect = &m
	}
	return fig, true
}

// present returns the values that are numbers.
func present(values []float64) []float64 {
	return slices.DeleteFunc(slices.Clone(values), math.IsNaN)
}

// median returns the middle of values, of which there is at least one.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	half := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[half]
	}
	return (sorted[half-1] + sorted[half]) / 2
}
