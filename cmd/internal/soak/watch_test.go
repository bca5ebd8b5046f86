package soak

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"
)

// A RST that is lost reaches only who sends something later.
func TestAResetThatMayBeLost(t *testing.T) {
	const limit, step = 5 * time.Second, time.Second
	for _, tt := range []struct {
		name  string
		frail bool
		// what the other side does once the reset could have come, and before
		later, before func(p *play)
		stalls        bool
	}{
		{name: "where none is lost", stalls: true},
		{name: "who sends nothing", frail: true},
		{name: "who sent before", frail: true, before: func(p *play) { p.begun[1].Add(1) }},
		{name: "who sends later", frail: true, later: func(p *play) { p.begun[1].Add(1) }, stalls: true},
		{name: "who is in a write", frail: true, later: func(p *play) { p.ways[1].writing.Store(true) }, stalls: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPlay(draw(rand.New(rand.NewPCG(1, 1)), 1, clientResets, light), "a wire", new(atomic.Int64))
			p.frail = tt.frail
			p.dialled.Store(true)
			p.aborted[0].Store(true)
			p.ways[0].sent.Store(100) // lost with the connection
			w := &watch{limit: limit, dial: limit, plays: map[*play]*pulse{p: {}}}
			run := func(d time.Duration) (stalled, deaf bool) {
				for ; d > 0 && !stalled && !deaf; d -= step {
					stalls, over := w.look(step)
					stalled, deaf = len(stalls) > 0, len(over) > 0
				}
				return stalled, deaf
			}
			if tt.before != nil {
				tt.before(p)
			}
			stalled, deaf := run(limit)
			if tt.later != nil {
				tt.later(p)
			}
			if !stalled && !deaf {
				stalled, deaf = run(3 * limit)
			}
			if stalled != tt.stalls || deaf == tt.stalls {
				t.Errorf("stalled %v, ended %v, want %v, %v", stalled, deaf, tt.stalls, !tt.stalls)
			}
			if again, over := w.look(time.Hour); len(again)+len(over) > 0 {
				t.Error("it is told twice")
			}
		})
	}
}
