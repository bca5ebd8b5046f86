package soak

import (
	"math"
	"math/rand/v2"
	"time"
)

// A kind is what a connection is used for.
type kind uint8

// The kinds of connections.
const (
	bulkUp       kind = iota // megabytes from the client
	bulkDown                 // and from the server
	bulkBoth                 // and both at once
	requests                 // small requests, each after the answer to the last
	idle                     // a word at the beginning, a long silence, a word at the end
	slowReader               // reads less than is sent
	stalled                  // stops reading, for seconds, more than once, and goes on
	shrinking                // the receive buffer is made smaller while it fills
	clientEnds               // half-close: the client's side ends first, the server goes on
	serverEnds               // and the other way round
	clientResets             // in the middle
	serverResets
	resetHalf     // after the other side has ended
	short         // opened, one request, closed; many in a row
	denied        // lives until a policy cuts it
	kinds     int = iota
)

var kindNames = [kinds]string{"bulk up", "bulk down", "bulk both", "requests", "idle", "slow reader", "stalled", "shrinking",
	"client ends", "server ends", "client resets", "server resets", "reset half", "short", "denied"}

func (k kind) String() string { return kindNames[k] }

// An ending is how a side ends.
type ending uint8

const (
	endClose ending = iota // its side is closed once all is sent
	endReset               // the connection is reset then
)

// A turn is a piece of what a side sends.
type turn struct {
	after int64         // bytes that must have been read before; allOfIt: the peer's end too
	rest  time.Duration // to wait then
	send  int64         // bytes to send then
}

// allOfIt as turn.after waits for the end of what the peer sends.
const allOfIt = -1

// A stop is a place in the stream at which a reader stops for a while.
type stop struct {
	at     int64
	d      time.Duration
	shrink int // the receive buffer is set to so many bytes; 0: it is left alone
}

// A side is what one end of a connection does.
type side struct {
	turns []turn
	chunk int // bytes a write takes at most
	end   ending

	piece int           // bytes a read takes at most
	pace  time.Duration // to wait after as many bytes
	stops []stop        // in order
}

// total is the number of bytes that the side sends.
func (s *side) total() (n int64) {
	for _, t := range s.turns {
		n += t.send
	}
	return n
}

// A script is what happens on one connection: side 0 is the client's.
type script struct {
	id    uint64
	kind  kind
	sides [2]side
}

// aborts says that the connection does not end cleanly on both sides.
func (s *script) aborts() bool {
	return s.kind == denied || s.sides[0].end == endReset || s.sides[1].end == endReset
}

// patience is how many times longer than others the connection may stand still.
// What comes to a buffer that was made smaller than what it holds is dropped,
// and sent again ever more rarely while it is: two kernels without a proxy
// stand still for 6 s after a stop of 2 s.
func (s *script) patience() time.Duration {
	if s.kind == shrinking {
		return 4
	}
	return 1
}

// A measure scales scripts to what a network can carry.
type measure struct {
	bulk int64         // bytes of a bulk transfer at most
	rest time.Duration // pauses at most
	idle time.Duration // silence of an idle connection
}

// word is what a client sends first: it tells the server which script to play.
const word = 8

// draw makes a script. All of it is drawn from rng.
func draw(rng *rand.Rand, id uint64, k kind, m measure) *script {
	d := drawer{rng, m}
	s := &script{id: id, kind: k}
	for i := range s.sides {
		s.sides[i].chunk = d.size(256, 256<<10)
		s.sides[i].piece = d.size(1<<10, 256<<10)
	}
	d.fillIn(s)
	c := &s.sides[0]
	c.turns = append([]turn{{send: word}}, c.turns...)
	return s
}

type drawer struct {
	*rand.Rand
	m measure
}

// size draws from low to high, each order of magnitude as often as the others.
func (d drawer) size(low, high int64) int {
	return int(float64(low) * math.Pow(float64(high)/float64(low), d.Float64()))
}

// span draws up to most.
func (d drawer) span(most time.Duration) time.Duration {
	return time.Duration(d.Int64N(int64(most) + 1))
}

func (d drawer) bulk() []turn { return []turn{{send: d.m.bulk/8 + d.Int64N(d.m.bulk)}} }

// either draws which side does a thing.
func (d drawer) either(s *script) (it, other *side) {
	i := d.IntN(2)
	return &s.sides[i], &s.sides[1-i]
}

func (d drawer) fillIn(s *script) {
	client, server := &s.sides[0], &s.sides[1]
	switch s.kind {
	case bulkUp:
		client.turns = d.bulk()
	case bulkDown:
		server.turns = d.bulk()
	case bulkBoth:
		client.turns, server.turns = d.bulk(), d.bulk()
	case requests, denied:
		n := 20 + d.IntN(200)
		d.exchanges(s, n, d.span(4*d.m.rest)/time.Duration(n))
	case short:
		d.exchanges(s, 1, 0)
	case idle:
		for i := range s.sides {
			s.sides[i].chunk, s.sides[i].piece = 1<<10, 1<<10
		}
		d.exchanges(s, 2, d.m.idle)
	case slowReader:
		reader, sender := d.either(s)
		sender.turns = []turn{{send: d.m.bulk/16 + 1}}
		reader.piece = int(d.m.bulk / 16 / (1 + d.Int64N(50)))
		reader.pace = d.span(d.m.rest / 20)
	case stalled:
		d.stops(s, false)
	case shrinking:
		d.stops(s, true)
	case clientEnds:
		client.turns = []turn{{send: int64(d.size(1, d.m.bulk/4))}}
		server.turns = []turn{{after: allOfIt, rest: d.span(d.m.rest / 4), send: int64(d.size(1, d.m.bulk/4))}}
	case serverEnds:
		server.turns = []turn{{after: word, send: int64(d.size(1, d.m.bulk/4))}}
		client.turns = []turn{{after: allOfIt, rest: d.span(d.m.rest / 4), send: int64(d.size(1, d.m.bulk/4))}}
	case clientResets, serverResets:
		d.reset(s, int(s.kind-clientResets))
	case resetHalf:
		one, other := d.either(s)
		one.turns = []turn{{send: int64(d.size(1, d.m.bulk/8))}}
		other.turns = []turn{{after: allOfIt, rest: d.span(d.m.rest / 4), send: int64(d.size(1, d.m.bulk/8))}}
		other.end = endReset
	}
}

// exchanges makes n requests and answers, the client resting before each but
// the first. The first word that it sends is part of the first.
func (d drawer) exchanges(s *script, n int, rest time.Duration) {
	client, server := &s.sides[0], &s.sides[1]
	asked, answered := int64(word), int64(0)
	for i := range n {
		ask, answer := int64(d.size(1, 16<<10)), int64(d.size(1, 64<<10))
		t := turn{after: answered, send: ask}
		if i > 0 {
			t.rest = rest
		}
		client.turns = append(client.turns, t)
		asked += ask
		server.turns = append(server.turns, turn{after: asked, send: answer})
		answered += answer
	}
}

// stops makes one side read in spurts.
func (d drawer) stops(s *script, shrink bool) {
	reader, sender := d.either(s)
	sender.turns = d.bulk()
	size := sender.total()
	if d.IntN(2) == 0 {
		reader.turns = d.bulk()
	}
	at := int64(0)
	for range 2 + d.IntN(3) {
		at += 1 + d.Int64N(size/4)
		st := stop{at: at, d: d.m.rest/4 + d.span(d.m.rest)}
		if shrink {
			st.shrink = d.size(16<<10, 256<<10)
		}
		reader.stops = append(reader.stops, st)
	}
}

// reset makes side i send, and reset while the other still does.
func (d drawer) reset(s *script, i int) {
	one, other := &s.sides[i], &s.sides[1-i]
	other.turns = d.bulk()
	one.turns = []turn{{send: int64(d.size(1, d.m.bulk/8))}, {after: d.Int64N(other.total())}}
	one.end = endReset
}
