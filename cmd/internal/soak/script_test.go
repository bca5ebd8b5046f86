package soak

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// finishes plays a script without a network: what is sent has been read at
// once. It reports whether both sides come to their end.
func finishes(s *script) bool {
	var sent [2]int64
	var next [2]int
	var ended [2]bool
	for moved := true; moved; {
		moved = false
		for i := range s.sides {
			peer := 1 - i
			for next[i] < len(s.sides[i].turns) {
				t := s.sides[i].turns[next[i]]
				if !ended[peer] && (t.after == allOfIt || sent[peer] < t.after) {
					break
				}
				sent[i] += t.send
				next[i]++
				moved = true
			}
			if next[i] == len(s.sides[i].turns) && !ended[i] {
				ended[i], moved = true, true
				if s.sides[i].end == endReset {
					return true
				}
			}
		}
	}
	return ended[0] && ended[1]
}

func TestEveryScriptCanBePlayed(t *testing.T) {
	for k := range kinds {
		for id := range uint64(500) {
			s := draw(rand.New(rand.NewPCG(1, id)), id, kind(k), measure{bulk: 1 << 20, rest: time.Second, idle: time.Second})
			if !finishes(s) {
				t.Fatalf("%v: %+v never ends", s.kind, s)
			}
			if s.sides[0].turns[0] != (turn{send: word}) {
				t.Fatalf("%v begins with %+v", s.kind, s.sides[0].turns[0])
			}
			for i := range s.sides {
				if d := &s.sides[i]; d.chunk < 1 || d.piece < 1 {
					t.Fatalf("%v: a side writes %d and reads %d bytes at most", s.kind, d.chunk, d.piece)
				}
			}
		}
	}
}

func TestTheSeedSaysEverything(t *testing.T) {
	deals := func(seed uint64) string {
		d := newDeck(seed, 1, 6, func(kind) bool { return true })
		s := ""
		for range 300 {
			c := d.deal()
			s += fmt.Sprintf("%+v %+v\n", c, d.script(c.id, c.kind, heavy))
		}
		return s
	}
	first := deals(5)
	if again := deals(5); again != first {
		t.Error("one seed, two loads")
	}
	if deals(6) == first {
		t.Error("two seeds, one load")
	}
}

func TestADeckHasEveryKind(t *testing.T) {
	d := newDeck(1, 1, 3, func(kind) bool { return true })
	var seen [kinds]int
	ids := map[uint64]bool{}
	for d.rounds() == 0 {
		c := d.deal()
		seen[c.kind]++
		n := uint64(1)
		if c.kind == short {
			n = inARow
		}
		for i := range n {
			if ids[c.id+i] {
				t.Fatalf("two connections have number %d", c.id+i)
			}
			ids[c.id+i] = true
		}
	}
	if seen != weights {
		t.Errorf("a deck has %v, want %v", seen, weights)
	}
	if uint64(len(ids)) != d.last()-1 {
		t.Errorf("%d connections, the next is number %d", len(ids), d.last())
	}
}
