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
	// ToOther is the same ratio to the other proxy's leg, of all rows.
	ToOther *float64 `json:"to_other"`
}

// of returns the figure of a row and leg, false if there is none.
func (f *figures) of(r row, leg string) (figure, bool) {
	values := f.values[place{r.name, leg}]
	known := present(values)
	if len(known) == 0 {
		return figure{}, false
	}
	fig := figure{Row: r.name, Leg: leg, Unit: r.unit, Median: median(known), Min: slices.Min(known), Max: slices.Max(known)}
	if !r.alone {
		fig.ToDirect = f.ratio(r.name, leg, legDirect)
	}
	if rival, ok := rivals[leg]; ok {
		fig.ToOther = f.ratio(r.name, leg, rival)
	}
	return fig, true
}

// ratio returns the median over the rounds of the ratio of one leg to another
// in the same round, nil if there is none.
func (f *figures) ratio(row, leg, to string) *float64 {
	values, base := f.values[place{row, leg}], f.values[place{row, to}]
	if base == nil {
		return nil
	}
	var ratios []float64
	for i := range values {
		if base[i] > 0 {
			ratios = append(ratios, values[i]/base[i])
		}
	}
	if ratios = present(ratios); len(ratios) == 0 {
		return nil
	}
	m := median(ratios)
	return &m
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
