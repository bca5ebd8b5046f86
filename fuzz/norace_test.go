//go:build !race

package fuzz

const withRace = false
