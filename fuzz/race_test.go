//go:build race

package fuzz

// withRace: the race detector is on.
const withRace = true
