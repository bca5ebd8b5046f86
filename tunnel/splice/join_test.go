package splice_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// eachKind runs f for all pairs of ends.
func eachKind(t *testing.T, f func(t *testing.T, rig func(splice.Options) *rig)) {
	for _, ka := range kinds {
		for _, kb := range kinds {
			t.Run(ka.name+"-"+kb.name, func(t *testing.T) {
				f(t, func(opt splice.Options) *rig { return newRig(t, ka.end, kb.end, opt) })
			})
		}
	}
}

const period = 2097143 // a prime

var stream = func() []byte {
	p := make([]byte, 2*period)
	for i := range p {
		p[i] = byte(uint32(i%period) * 2654435761 >> 24)
	}
	return p
}()

// bytesAt are n bytes of a stream that is different everywhere.
func bytesAt(off, n int) []byte { return stream[off%period:][:n] }

func TestBothWays(t *testing.T) {
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		r := rig(splice.Options{})
		r.a.allow(1 << 20)
		r.b.allow(1 << 20)
		r.a.send([]byte("question"))
		r.loop.run(t)
		r.b.send([]byte("answer"))
		r.loop.run(t)
		if string(r.b.out) != "question" || string(r.a.out) != "answer" {
			t.Errorf("b got %q, a got %q", r.b.out, r.a.out)
		}
		r.open()
		if ab, ba := r.join.Counts(); ab != 8 || ba != 6 {
			t.Errorf("Counts = %d, %d", ab, ba)
		}
	})
}

// A transcript: a and b stand for the peers; C closes its side, R resets, d
// sends a byte. After each letter pair the join has come to rest.
func TestEndings(t *testing.T) {
	tests := []struct {
		acts string
		err  error
		side splice.Side
	}{
		{"aCbC", nil, splice.NoSide},
		{"bCaC", nil, splice.NoSide},
		{"adaCbdbC", nil, splice.NoSide},
		{"aCbdbC", nil, splice.NoSide},
		{"bCadaC", nil, splice.NoSide},
		{"aR", splice.ErrReset, splice.SideA},
		{"bR", splice.ErrReset, splice.SideB},
		{"adaR", splice.ErrReset, splice.SideA},
		{"aCaR", splice.ErrReset, splice.SideA},
		{"aCbR", splice.ErrReset, splice.SideB},
		{"bCbR", splice.ErrReset, splice.SideB},
		{"bCaR", splice.ErrReset, splice.SideA},
		{"aCbdaR", splice.ErrReset, splice.SideA},
		{"aCbdbR", splice.ErrReset, splice.SideB},
	}
	for _, tt := range tests {
		t.Run(tt.acts, func(t *testing.T) {
			eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
				r := rig(splice.Options{})
				r.a.allow(1 << 20)
				r.b.allow(1 << 20)
				var sentA, sentB int
				for i := 0; i < len(tt.acts); i += 2 {
					r.loop.run(t)
					r.open()
					from, to, sent := r.a, r.b, &sentA
					if tt.acts[i] == 'b' {
						from, to, sent = r.b, r.a, &sentB
					}
					switch tt.acts[i+1] {
					case 'd':
						from.send([]byte{'x'})
						*sent++
					case 'C':
						from.stop(io.EOF, false)
						if to.closedWrite {
							t.Errorf("%s was closed before %s", to.name, from.name)
						}
					case 'R':
						from.stop(errReset, true)
					}
					r.loop.run(t)
					if tt.acts[i+1] == 'C' && !to.closedWrite {
						t.Errorf("%s is not closed after %s", to.name, from.name)
					}
				}
				r.want(tt.err, tt.side)
				if len(r.b.out) != sentA || len(r.a.out) != sentB {
					t.Errorf("b got %d of %d, a got %d of %d", len(r.b.out), sentA, len(r.a.out), sentB)
				}
			})
		})
	}
}

// What came before a reset and can be delivered is delivered first.
func TestDataBeforeAReset(t *testing.T) {
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		r := rig(splice.Options{})
		r.b.allow(1 << 20)
		r.loop.run(t)
		r.a.send(bytesAt(0, 1000))
		r.a.stop(errReset, false)
		r.loop.run(t)
		r.want(splice.ErrReset, splice.SideA)
		if !bytes.Equal(r.b.out, bytesAt(0, 1000)) {
			t.Errorf("b got %d bytes", len(r.b.out))
		}
	})
}

// A failure is mirrored though the other end takes nothing.
func TestResetWhileTheOtherIsFull(t *testing.T) {
	for _, kb := range kinds {
		t.Run(kb.name, func(t *testing.T) {
			r := newRig(t, kinds[1].end, kb.end, splice.Options{})
			r.a.send(bytesAt(0, 1<<20))
			r.loop.run(t)
			r.open()
			r.a.stop(errReset, false)
			r.loop.run(t)
			r.want(splice.ErrReset, splice.SideA)
		})
	}
}

// Without a Failer too, when the failed end is only written to. A Reserver is
// not even that: it should be a Failer.
func TestResetOfTheFullEnd(t *testing.T) {
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		if strings.HasSuffix(t.Name(), "reserver") {
			t.Skip("a Reserver that is no Failer")
		}
		for _, eof := range []bool{false, true} {
			r := rig(splice.Options{})
			r.a.send(bytesAt(0, 1<<20))
			if eof {
				r.b.stop(io.EOF, false)
			}
			r.loop.run(t)
			r.open()
			r.b.stop(errReset, true)
			r.loop.run(t)
			r.want(splice.ErrReset, splice.SideB)
		}
	})
}

func TestBackpressure(t *testing.T) {
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		r := rig(splice.Options{})
		const size = 1 << 20
		r.a.send(bytesAt(0, size))
		for taken := 0; taken < size; {
			r.loop.run(t)
			r.open()
			if over := r.a.read - len(r.b.out); over < 0 || over > 64<<10 {
				t.Fatalf("%d bytes read beyond what b took", over)
			}
			n := min(rand.IntN(100<<10)+1, size-taken)
			taken += n
			r.b.allow(n)
			r.loop.run(t)
			if len(r.b.out) != taken {
				t.Fatalf("b took %d of %d", len(r.b.out), taken)
			}
		}
		r.a.stop(io.EOF, false)
		r.loop.run(t)
		if !r.b.closedWrite || !bytes.Equal(r.b.out, bytesAt(0, size)) {
			t.Errorf("closed %v, or other bytes", r.b.closedWrite)
		}
	})
}

// With a Reserver nothing is read that is not taken, but for one byte that
// tells whether the stream has ended.
func TestReserverHasNoResidue(t *testing.T) {
	r := newRig(t, kinds[0].end, kinds[3].end, splice.Options{})
	r.a.send(bytesAt(0, 1<<20))
	r.b.allow(12345)
	r.loop.run(t)
	if r.a.read > 12346 || len(r.b.out) != 12345 {
		t.Errorf("read %d, took %d", r.a.read, len(r.b.out))
	}
}

// The end of one side waits for what was read before it.
func TestEndWaitsForResidue(t *testing.T) {
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		r := rig(splice.Options{})
		r.a.send(bytesAt(0, 100))
		r.a.stop(io.EOF, false)
		r.b.allow(60)
		r.loop.run(t)
		if r.b.closedWrite {
			t.Error("closed before the last bytes")
		}
		r.b.allow(60)
		r.loop.run(t)
		if !r.b.closedWrite || len(r.b.out) != 100 {
			t.Errorf("closed %v after %d bytes", r.b.closedWrite, len(r.b.out))
		}
	})
}

func TestBudgetSharesTheLoop(t *testing.T) {
	for _, kb := range []int{0, 3} {
		r := newRig(t, kinds[0].end, kinds[kb].end, splice.Options{Budget: 10000})
		r.a.allow(1 << 20)
		r.b.allow(1 << 20)
		r.loop.run(t)
		r.a.send(bytesAt(0, 1<<20))
		others := 0
		other := splice.Task{Run: func() { others++ }}
		last, turns := 0, 0
		for len(r.b.out) < 1<<20 {
			r.loop.Soon(&other)
			for before := others; others == before; {
				if !r.loop.step() {
					t.Fatal("the join does not queue itself")
				}
			}
			if moved := len(r.b.out) - last; moved > 10000 {
				t.Fatalf("%d bytes in one turn", moved)
			}
			last = len(r.b.out)
			turns++
		}
		if turns < 100 || turns > 120 {
			t.Errorf("%d turns for a MiB of 10000 each", turns)
		}
	}
}

func TestNeitherWayStarvesTheOther(t *testing.T) {
	for _, budget := range []int{1, 2, 3, 1000, 100000} {
		r := newRig(t, kinds[0].end, kinds[2].end, splice.Options{Budget: budget})
		r.a.allow(1 << 20)
		r.b.allow(1 << 20)
		r.loop.run(t)
		r.a.in, r.b.in = bytesAt(0, 1<<18), bytesAt(0, 1<<18)
		r.a.wake()
		for range 20 {
			r.loop.step()
		}
		if a, b := len(r.a.out), len(r.b.out); a == 0 || b == 0 || a > 3*b || b > 3*a {
			t.Errorf("budget %d: a got %d, b got %d", budget, a, b)
		}
		r.loop.run(t)
		if len(r.a.out) != 1<<18 || len(r.b.out) != 1<<18 {
			t.Errorf("budget %d: a got %d, b got %d in the end", budget, len(r.a.out), len(r.b.out))
		}
	}
}

func TestCut(t *testing.T) {
	cause := errors.New("policy changed")
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		for _, ran := range []bool{false, true} {
			r := rig(splice.Options{})
			r.a.send(bytesAt(0, 1<<20))
			if ran {
				r.loop.run(t)
			}
			r.join.Cut(cause)
			r.want(cause, splice.NoSide)
			r.join.Cut(errors.New("again"))
			r.loop.run(t)
			r.want(cause, splice.NoSide)
		}
		r := rig(splice.Options{})
		r.join.Cut(nil)
		r.want(splice.ErrCut, splice.NoSide)
	})
}

func TestCutFromWithinAnEnd(t *testing.T) {
	cause := errors.New("policy changed")
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		r := rig(splice.Options{})
		r.b.allow(1 << 20)
		r.loop.run(t)
		r.b.onWrite = func() {
			r.join.Cut(cause)
			if r.result != nil {
				t.Error("done was called from within an end")
			}
		}
		r.a.send([]byte("x"))
		r.loop.run(t)
		if r.result == nil { // a Reserver is not written to
			r.join.Cut(cause)
		}
		r.want(cause, splice.NoSide)
	})
}

// An end whose Write makes the other end's bytes arrive, as a flush of one
// connection that carries both streams does.
func TestPushDuringWrite(t *testing.T) {
	for _, kb := range kinds {
		t.Run(kb.name, func(t *testing.T) {
			r := newRig(t, kinds[2].end, kb.end, splice.Options{})
			r.b.allow(1 << 20)
			r.loop.run(t)
			nested := false
			r.b.onWrite = func() {
				if !nested {
					nested = true
					r.a.send([]byte("second"))
				}
			}
			r.a.send([]byte("first "))
			r.loop.run(t)
			want := "first "
			if nested {
				want = "first second"
			}
			if string(r.b.out) != want {
				t.Errorf("b got %q, want %q", r.b.out, want)
			}
		})
	}
}

// TestRandomSchedules drives both peers at random, with short reads and
// writes, needless wake-ups and wake-ups from within Read and Write, and
// checks every byte both ways.
func TestRandomSchedules(t *testing.T) {
	eachKind(t, func(t *testing.T, rig func(splice.Options) *rig) {
		for seed := range uint64(6) {
			r := rig(splice.Options{Budget: int(seed*seed) * 5000})
			rng := rand.New(rand.NewPCG(seed, 1))
			r.a.rng, r.b.rng = rng, rng
			r.a.notifyEarly, r.b.notifyEarly = seed%2 == 0, seed%3 == 0
			var sent [2]int
			const size = 200 << 10
			for r.result == nil {
				for k, e := range []*fake{r.a, r.b} {
					switch rng.IntN(4) {
					case 0:
						n := min(rng.IntN(40<<10), size-sent[k])
						e.send(bytesAt(sent[k], n))
						sent[k] += n
					case 1:
						e.allow(rng.IntN(40 << 10))
					case 2:
						e.wake()
					case 3:
						if sent[k] == size {
							e.stop(io.EOF, false)
						}
					}
				}
				for range rng.IntN(8) {
					r.loop.step()
				}
				for _, p := range [][2]*fake{{r.a, r.b}, {r.b, r.a}} {
					if over := p[0].read - len(p[1].out); over < 0 || over > 64<<10 {
						t.Fatalf("%d bytes read beyond what was taken", over)
					}
				}
			}
			r.want(nil, splice.NoSide)
			if !bytes.Equal(r.b.out, bytesAt(0, size)) || !bytes.Equal(r.a.out, bytesAt(0, size)) {
				t.Fatalf("seed %d: b got %d, a got %d bytes, or other ones", seed, len(r.b.out), len(r.a.out))
			}
		}
	})
}

// app is a program at the far side of a Pipe, on its loop.
type app struct {
	end      *splicetest.PipeEnd
	rng      *rand.Rand
	left     int
	most     int // at once
	resetAt  int // of left; 0: never
	sent     hash.Hash
	received hash.Hash
	closed   bool
	done     chan error
}

func (a *app) run() {
	buf := make([]byte, 50000)
	for a.left > 0 {
		p := buf[:min(a.left, 1+a.rng.IntN(a.most))]
		for i := range p {
			p[i] = byte(a.rng.Uint32())
		}
		n, err := a.end.Write(p)
		a.sent.Write(p[:n])
		a.left -= n
		if a.left < a.resetAt {
			a.end.Reset(errReset)
			a.end.Notify(nil)
			a.done <- errReset
			return
		}
		if err != nil {
			break
		}
	}
	if a.left == 0 && !a.closed {
		a.closed = true
		if err := a.end.CloseWrite(); err != nil {
			a.done <- err
		}
	}
	for {
		n, err := a.end.Read(buf[:1+a.rng.IntN(len(buf))])
		a.received.Write(buf[:n])
		if err == io.EOF && a.closed {
			a.end.Notify(nil)
			a.done <- nil
		}
		if errors.Is(err, splice.ErrReset) {
			a.end.Notify(nil)
			a.done <- err
		}
		if err != nil {
			return
		}
	}
}

// TestHashOverPipes moves megabytes both ways through the stand-ins that the
// other packages' tests are built on.
func TestHashOverPipes(t *testing.T) {
	for _, size := range []int{1, 7, 1000, 64 << 10, 1 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			loop := splicetest.NewLoop()
			defer loop.Close()
			var apps [2]*app
			result := make(chan splice.Result, 1)
			loop.Do(func() {
				var ends [2]*splicetest.PipeEnd
				for i := range apps {
					apps[i] = &app{rng: rand.New(rand.NewPCG(uint64(i), 2)), left: min(size*20000, 4<<20), most: min(2*size, 50000), sent: sha256.New(), received: sha256.New(), done: make(chan error, 2)}
					apps[i].end, ends[i] = splicetest.Pipe(loop, size)
				}
				splice.Start(loop, ends[0], ends[1], splice.Options{}, func(r splice.Result) { result <- r })
				for _, a := range apps {
					a.end.Notify(a.run)
				}
			})
			for _, a := range apps {
				if err := <-a.done; err != nil {
					t.Fatal(err)
				}
			}
			if r := <-result; r.Err != nil || r.AtoB != r.BtoA || r.AtoB != uint64(min(size*20000, 4<<20)) {
				t.Errorf("result %+v", r)
			}
			if !bytes.Equal(apps[0].sent.Sum(nil), apps[1].received.Sum(nil)) || !bytes.Equal(apps[1].sent.Sum(nil), apps[0].received.Sum(nil)) {
				t.Error("other bytes arrived than were sent")
			}
		})
	}
}

// inOrder reports whether p is the beginning of the stream, of any length.
func inOrder(p []byte) bool {
	for len(p) > period {
		if !bytes.Equal(p[:period], stream[:period]) {
			return false
		}
		p = p[period:]
	}
	return bytes.Equal(p, stream[:len(p)])
}

// FuzzSchedule lets the fuzzer choose the ends and what the peers do, and
// holds the outcome against a model: bytes in order, none too many, a clean
// end only after two clean ends, a reset only after a reset.
func FuzzSchedule(f *testing.F) {
	f.Add([]byte{0, 0x10, 0x81, 0x20, 0x31})
	f.Add([]byte{7, 0x10, 0x18, 0x01, 0x09, 0x02, 0x0a})
	f.Add([]byte{12, 0x10, 0x50, 0x09, 0x11, 0x03})
	f.Add([]byte{24, 0x10, 0x51, 0x09, 0x02, 0x0b, 0xff, 0x04, 0x0c})
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) == 0 || len(script) > 300 {
			return
		}
		k := int(script[0])
		r := newRig(t, kinds[k%len(kinds)].end, kinds[k/len(kinds)%len(kinds)].end, splice.Options{Budget: k * 500})
		r.a.notifyEarly = k&0x80 != 0
		var sent [2]int
		var closed [2]bool
		reset, cut := splice.NoSide, false
		for _, op := range script[1:] {
			if r.result != nil {
				break
			}
			i := int(op >> 3 & 1)
			e := []*fake{r.a, r.b}[i]
			size := 1 << (op >> 4)
			switch {
			case op&7 <= 1 && !closed[i] && reset == splice.NoSide:
				e.send(bytesAt(sent[i], size))
				sent[i] += size
			case op&7 <= 3:
				e.allow(size)
			case op&7 == 4 && reset == splice.NoSide:
				e.stop(io.EOF, false)
				closed[i] = true
			case op&7 == 5 && size > 1<<10 && reset == splice.NoSide:
				reset = splice.Side(1 + i)
				e.stop(errReset, size > 1<<12)
			case op&7 == 6 && size == 1<<15:
				cut = true
				r.join.Cut(nil)
			default:
				r.loop.step()
			}
		}
		for _, e := range []*fake{r.a, r.b} {
			e.notifyEarly = false // a Join that is woken by its own Read does not rest
			if !e.closed {
				e.allow(1 << 24)
			}
		}
		r.loop.run(t)
		for i, p := range [][2]*fake{{r.a, r.b}, {r.b, r.a}} {
			got := p[1].out
			if !inOrder(got) || len(got) > sent[i] {
				t.Fatalf("%s got %d bytes of %d, or other ones", p[1].name, len(got), sent[i])
			}
			if reset == splice.NoSide && !cut && len(got) != sent[i] {
				t.Fatalf("%s got %d bytes of %d", p[1].name, len(got), sent[i])
			}
			if p[1].closedWrite && !closed[i] {
				t.Fatalf("%s was closed, %s was not", p[1].name, p[0].name)
			}
		}
		switch both := closed[0] && closed[1]; {
		case cut && r.result != nil && r.result.Err == splice.ErrCut:
			r.want(splice.ErrCut, splice.NoSide)
		case r.result != nil && r.result.Err == nil:
			if !both {
				t.Fatal("a clean end without both sides closed")
			}
			r.want(nil, splice.NoSide)
		case reset != splice.NoSide:
			r.want(splice.ErrReset, reset)
		case both:
			t.Fatalf("both sides closed, result %+v", r.result)
		case r.result != nil:
			t.Fatalf("ended by %v", r.result.Err)
		}
	})
}
