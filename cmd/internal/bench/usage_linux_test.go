package main

import (
	"testing"
	"time"
)

func TestClockSince(t *testing.T) {
	before := clock{1: 10 * time.Second, 2: 5 * time.Second, 3: time.Second}
	// 1 went on, 2 ended, 3's pid is another's, 4 is new.
	after := clock{1: 12 * time.Second, 3: 100 * time.Millisecond, 4: 3 * time.Second}
	if got, want := after.since(before), 5100*time.Millisecond; got != want {
		t.Errorf("since = %v, want %v", got, want)
	}
}
