package splice_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A tube is a Pipe whose loops run when they are told to.
type tube struct {
	t      testing.TB
	loops  []*steps // one or two
	budget *splice.Budget
	a, b   *splice.PipeEnd
}

// newTube makes a Pipe on one loop or two, with max bytes for both directions.
func newTube(t testing.TB, loops int, max int64) *tube {
	p := &tube{t: t, loops: make([]*steps, loops), budget: splice.NewBudget(max, nil)}
	for i := range p.loops {
		p.loops[i] = &steps{}
	}
	p.a, p.b = splice.Pipe(p.loops[0], p.loops[loops-1], p.budget, p.budget)
	return p
}

const plenty = 1 << 30

// eachTube runs f for a Pipe on one loop and for one on two.
func eachTube(t *testing.T, f func(t *testing.T, p *tube)) {
	for loops := 1; loops <= 2; loops++ {
		t.Run(fmt.Sprint(loops), func(t *testing.T) { f(t, newTube(t, loops, plenty)) })
	}
}

// run runs the loops until nothing is queued.
func (p *tube) run() {
	p.t.Helper()
	for again := true; again; {
		again = false
		for _, l := range p.loops {
			again = l.step() || again
		}
	}
}

func (p *tube) posts() (n int) {
	for _, l := range p.loops {
		n += l.posts
	}
	return n
}

// write writes n bytes of the stream from off on, or fails the test.
func (p *tube) write(e splice.End, off, n int) {
	p.t.Helper()
	if m, err := e.Write(bytesAt(off, n)); m != n || err != nil {
		p.t.Fatalf("wrote %d of %d: %v", m, n, err)
	}
}

// fill writes the stream from off on, so many bytes at a time, until there is
// no room, and returns how many it was.
func (p *tube) fill(e splice.End, off, piece int) (total int) {
	p.t.Helper()
	for {
		n, err := e.Write(bytesAt(off+total, piece))
		total += n
		if err == splice.ErrAgain {
			return total
		}
		if err != nil || total > plenty {
			p.t.Fatalf("after %d bytes: %v", total, err)
		}
	}
}

// drain reads all there is, which must be the stream from off on, and returns
// how much it was and what came then.
func (p *tube) drain(e splice.End, off int) (total int, err error) {
	p.t.Helper()
	buf := make([]byte, 10000)
	for {
		n, err := e.Read(buf)
		if !bytes.Equal(buf[:n], bytesAt(off+total, n)) {
			p.t.Fatalf("other bytes after %d", off+total)
		}
		if total += n; err != nil {
			return total, err
		}
	}
}

// wantUsed checks the capacity of all buffers in use.
func (p *tube) wantUsed(why string, want int64) {
	p.t.Helper()
	if got := p.budget.Used(); got != want {
		p.t.Errorf("%s: %d bytes of buffers in use, want %d", why, got, want)
	}
}

func TestPipeHalfClose(t *testing.T) {
	eachTube(t, func(t *testing.T, p *tube) {
		p.write(p.a, 0, 50_000)
		if err := errors.Join(p.a.CloseWrite(), p.a.CloseWrite()); err != nil {
			t.Error(err)
		}
		if _, err := p.a.Write([]byte("x")); err != io.ErrClosedPipe || p.a.Reserve(1) != nil {
			t.Errorf("write after the end: %v, or there is room", err)
		}
		if n, err := p.drain(p.b, 0); n != 50_000 || err != io.EOF {
			t.Errorf("read %d bytes, then %v", n, err)
		}
		if _, err := p.b.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read again: %v", err)
		}
		p.write(p.b, 0, 7)
		if n, err := p.drain(p.a, 0); n != 7 || err != splice.ErrAgain {
			t.Errorf("the other way: %d bytes, then %v", n, err)
		}
		_ = p.b.CloseWrite()
		p.drain(p.a, 7)
		p.a.Close()
		if p.b.Failure() != nil {
			t.Error("a clean end is a failure to the other side")
		}
		p.b.Close()
		if _, err := p.a.Read(make([]byte, 1)); err != splice.ErrClosed {
			t.Errorf("read after Close: %v", err)
		}
		p.run()
		p.wantUsed("after a clean end", 0)
	})
}

// What was written before a reset can still be read; all else fails.
func TestPipeReset(t *testing.T) {
	eachTube(t, func(t *testing.T, p *tube) {
		p.write(p.a, 0, 3000)
		p.write(p.b, 0, 5000)
		p.a.Reset(errors.New("test"))
		p.a.Reset(nil)
		if err := p.b.Failure(); !errors.Is(err, splice.ErrReset) || p.a.Failure() != nil {
			t.Errorf("Failure = %v; %v of the end that reset", err, p.a.Failure())
		}
		if n, err := p.drain(p.b, 0); n != 3000 || !errors.Is(err, splice.ErrReset) {
			t.Errorf("read %d bytes, then %v", n, err)
		}
		if _, err := p.b.Write([]byte("x")); !errors.Is(err, splice.ErrReset) {
			t.Errorf("Write: %v", err)
		}
		if err := p.b.CloseWrite(); !errors.Is(err, splice.ErrReset) {
			t.Errorf("CloseWrite: %v", err)
		}
		if _, err := p.a.Write([]byte("x")); err != splice.ErrClosed || p.a.Reserve(1) != nil {
			t.Errorf("Write of the end that reset: %v, or there is room", err)
		}
		if err := p.a.CloseWrite(); err != splice.ErrClosed {
			t.Errorf("CloseWrite of the end that reset: %v", err)
		}
		p.b.Close()
		p.run()
		p.wantUsed("after a reset", 0)
	})
}

// An end that is given up before it has ended its side, or seen the other's
// end, is reset, even if that end has come.
func TestPipeCloseTooEarlyIsAReset(t *testing.T) {
	eachTube(t, func(t *testing.T, p *tube) {
		_ = p.a.CloseWrite()
		_ = p.b.CloseWrite()
		p.a.Close()
		if err := p.b.Failure(); !errors.Is(err, splice.ErrReset) {
			t.Errorf("Failure = %v", err)
		}
	})
	eachTube(t, func(t *testing.T, p *tube) {
		_ = p.a.CloseWrite()
		p.drain(p.b, 0)
		p.b.Close()
		if err := p.a.Failure(); !errors.Is(err, splice.ErrReset) {
			t.Errorf("Failure = %v", err)
		}
	})
}

// Buffers that nobody will read are given back, whoever holds them.
func TestPipeResetFreesTheBuffers(t *testing.T) {
	eachTube(t, func(t *testing.T, p *tube) {
		p.fill(p.a, 0, 50_000)
		p.fill(p.b, 0, 50_000)
		p.b.Reset(nil)
		p.a.Reset(nil)
		p.wantUsed("after both resets", 0)
	})
	for _, queued := range []int{0, 10} {
		for _, n := range []int{0, 10} {
			p := newTube(t, 2, plenty)
			p.write(p.a, 0, queued)
			if room := p.a.Reserve(10); len(room) != 10 {
				t.Fatalf("%d bytes of room", len(room))
			}
			p.b.Reset(nil) // comes from another thread, between Reserve and Commit
			p.a.Commit(n)
			p.wantUsed("after a reset while the writer held room", 0)
		}
	}
}

// A direction without bytes holds no buffer: neither after they were read nor
// after the writer has found nothing to send.
func TestPipeIdleHoldsNothing(t *testing.T) {
	eachTube(t, func(t *testing.T, p *tube) {
		for i := range 100 {
			p.a.Reserve(100)
			p.a.Commit(0)
			p.wantUsed("nothing was sent", 0)
			p.write(p.a, i*100, 100)
			p.a.Reserve(100)
			p.drain(p.b, i*100)
			p.a.Commit(0)
			p.wantUsed("all was read", 0)
		}
	})
}

// The window grows while the reader reads, to a bound; for one that does not
// read it never does.
func TestPipeWindow(t *testing.T) {
	const first, most, chunk = 64 << 10, 512 << 10, 64 << 10
	eachTube(t, func(t *testing.T, p *tube) {
		off := p.fill(p.a, 0, 50_000)
		if used := p.budget.Used(); used < first || used > first+chunk {
			t.Errorf("buffers of %d bytes at first", used)
		}
		for range 100 {
			if n := p.fill(p.a, off, 50_000); n != 0 {
				t.Fatalf("%d more bytes taken while nothing was read", n)
			}
		}
		read := 0
		for range 50 {
			n, _ := p.drain(p.b, read)
			read += n
			off += p.fill(p.a, off, 50_000)
		}
		if used := p.budget.Used(); used < most || used > most+chunk {
			t.Errorf("buffers of %d bytes in the end", used)
		}
	})
}

// Buffers are large where there is much to send, small where there is little.
func TestPipeFitsBuffers(t *testing.T) {
	p := newTube(t, 2, plenty)
	room := func() int {
		n := len(p.a.Reserve(plenty))
		p.a.Commit(0)
		return n
	}
	const small, large = 2 << 10, 60 << 10
	if n := room(); n > small {
		t.Errorf("room for %d bytes at first", n)
	}
	off := 0
	for range 3 {
		n := p.fill(p.a, off, 50_000)
		p.drain(p.b, off)
		off += n
	}
	if n := room(); n < large {
		t.Errorf("room for %d bytes among many", n)
	}
	for range 3 {
		p.write(p.a, off, 100)
		p.drain(p.b, off)
		off += 100
	}
	if n := room(); n > small {
		t.Errorf("room for %d bytes after few", n)
	}
}

// Many small writes share buffers: what a stalled reader holds up is bounded
// by capacity, and that is no more than twice the bytes.
func TestPipePacksSmallWrites(t *testing.T) {
	for _, piece := range []int{1, 100, 1000, 3000, 40_000} {
		p := newTube(t, 2, plenty)
		n := p.fill(p.a, 0, piece)
		if used := p.budget.Used(); used > 128<<10 || int64(n) < used/2 {
			t.Errorf("writes of %d: %d bytes in buffers of %d", piece, n, used)
		}
	}
}

// Without a budget a direction still takes a little, so that no connection
// stops for ever.
func TestPipeBudget(t *testing.T) {
	for _, max := range []int64{0, 3000, 20 << 10, 100 << 10} {
		all := splice.NewBudget(max, nil)
		loop := &steps{}
		b := splice.NewBudget(plenty, all)
		var ends [4]*splice.PipeEnd
		p := &tube{t: t, loops: []*steps{loop}, budget: all}
		for i := 0; i < len(ends); i += 2 {
			ends[i], ends[i+1] = splice.Pipe(loop, loop, b, b)
		}
		const smallest = 2 << 10
		for i, e := range ends {
			if n := p.fill(e, 0, 50_000); n < smallest {
				t.Errorf("budget %d: direction %d took %d bytes", max, i, n)
			}
		}
		if used := all.Used(); used > max+int64(len(ends))*smallest || used != b.Used() {
			t.Errorf("budget %d: %d bytes in use, %d of the part", max, used, b.Used())
		}
		woken := 0
		ends[0].Notify(func() { woken++ })
		loop.run(t)
		woken = 0
		p.drain(ends[1], 0)
		if loop.run(t); woken == 0 {
			t.Errorf("budget %d: the writer is not told of room", max)
		}
		for _, e := range ends {
			e.Reset(nil)
		}
		p.wantUsed("in the end", 0)
	}
}

// Each loop is woken once for what it waits for and not for what it does not;
// on one loop no Post is needed.
func TestPipeWakesNobodyInVain(t *testing.T) {
	eachTube(t, func(t *testing.T, p *tube) {
		var ran [2]int
		p.a.Notify(func() { ran[0]++ })
		p.b.Notify(func() { ran[1]++ })
		p.run()
		check := func(why string, a, b int) {
			t.Helper()
			posts := p.posts()
			if p.run(); ran != [2]int{a, b} {
				t.Errorf("%s: a ran %d and b %d times, want %d and %d", why, ran[0], ran[1], a, b)
			}
			if want := (a + b) * (len(p.loops) - 1); posts != want {
				t.Errorf("%s: %d posts, want %d", why, posts, want)
			}
			ran = [2]int{}
			for _, l := range p.loops {
				l.posts = 0
			}
		}
		if p.run(); ran != [2]int{1, 1} || p.posts() != 0 {
			t.Errorf("Notify ran %v times with %d posts, want once each with none", ran, p.posts())
		}
		ran = [2]int{}
		check("at rest", 0, 0)
		p.write(p.a, 0, 10)
		check("b has not looked for bytes", 0, 0)
		p.drain(p.b, 0)
		check("all read", 0, 0)
		for i := range 5 {
			p.write(p.a, 10+i, 1)
		}
		check("b had found nothing", 0, 1)
		p.drain(p.b, 10)
		off := 15 + p.fill(p.a, 15, 50_000)
		check("a found no room", 0, 1)
		buf := make([]byte, 1000)
		if _, err := p.b.Read(buf); err != nil {
			t.Fatal(err)
		}
		check("a little room", 0, 0)
		p.drain(p.b, 15+len(buf))
		check("much room", 1, 0)
		p.write(p.a, off, 1)
		_ = p.a.CloseWrite()
		check("bytes and the end at once", 0, 1)
		p.drain(p.b, off)
		p.b.Reset(nil)
		check("a reset nobody waits for", 1, 0)
	})
}

// An end that waits for bytes and for room is told of both at once, and the end
// of the stream ends a wait too.
func TestPipeWakesOnce(t *testing.T) {
	eachTube(t, func(t *testing.T, p *tube) {
		ran := 0
		p.a.Notify(func() { ran++ })
		p.drain(p.a, 0)
		p.fill(p.a, 0, 50_000)
		p.run()
		ran = 0
		p.drain(p.b, 0)
		p.write(p.b, 0, 10)
		if posts := p.posts(); posts > 1 {
			t.Errorf("%d posts for room and bytes", posts)
		}
		if p.run(); ran != 1 {
			t.Errorf("ran %d times for room and bytes, want once", ran)
		}
		p.drain(p.a, 0)
		_ = p.b.CloseWrite()
		if p.run(); ran != 2 {
			t.Errorf("ran %d times after the end too, want twice", ran)
		}
	})
}

// Of a large window half has to be free before the writer is woken.
func TestPipeWakesForMuchRoom(t *testing.T) {
	p := newTube(t, 2, plenty)
	off, read := 0, 0
	for range 50 {
		off += p.fill(p.a, off, 50_000)
		n, _ := p.drain(p.b, read)
		read += n
	}
	off += p.fill(p.a, off, 50_000)
	ran := 0
	p.a.Notify(func() { ran++ })
	p.run()
	ran = 0
	before := p.budget.Used()
	for buf := make([]byte, 10_000); ran == 0; p.run() {
		n, err := p.b.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		read += n
	}
	if used := p.budget.Used(); used > before/2+64<<10 || used < before/4 {
		t.Errorf("woken at %d bytes in buffers of %d", used, before)
	}
}

// A pair of Joins around a Pipe, as two pods of one node are joined.
type joined struct {
	*tube
	apps    [2]*fake
	joins   [2]*splice.Join
	results [2]*splice.Result
}

func newJoined(t testing.TB, loops int, max int64, kinds [2]func(*fake) splice.End, opt splice.Options) *joined {
	r := &joined{tube: newTube(t, loops, max)}
	for i, end := range []splice.End{r.a, r.b} {
		loop := r.loops[i*(loops-1)]
		r.apps[i] = newFake(t, "ab"[i:i+1], loop)
		ends := [2]splice.End{kinds[i](r.apps[i]), end}
		if i == 1 {
			ends[0], ends[1] = ends[1], ends[0]
		}
		r.joins[i] = splice.Start(loop, ends[0], ends[1], opt, func(res splice.Result) {
			if r.results[i] != nil {
				t.Error("done was called twice")
			}
			r.results[i] = &res
		})
	}
	return r
}

// FuzzPipe lets the fuzzer choose what two apps do that are joined through a
// Pipe, on one loop or two, with much memory or little, and holds the outcome
// against a model: bytes in order and all of them unless something failed, an
// end only after the app's end, a reset on both sides whoever began, and no
// buffer left.
func FuzzPipe(f *testing.F) {
	f.Add([]byte{0, 0, 0x10, 0x81, 0x20, 0x31})
	f.Add([]byte{1, 0, 0xf0, 0xf8, 0x07, 0x0f, 0x04, 0x0c, 0x17, 0x1f})
	f.Add([]byte{3, 2, 0xf0, 0xf1, 0x07, 0x0f, 0xff, 0xf2, 0xfa, 0x05, 0xfd})
	f.Add([]byte{7, 5, 0xf0, 0xf8, 0xa7, 0x0f, 0xe2, 0xfa, 0x04, 0xe7, 0x0f, 0xf6})
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) < 2 || len(script) > 300 {
			return
		}
		how, k := script[0], int(script[1])
		max := int64(plenty)
		if how&2 != 0 {
			max = int64(how) << 8
		}
		app := [2]func(*fake) splice.End{kinds[k%len(kinds)].end, kinds[k/len(kinds)%len(kinds)].end}
		r := newJoined(t, 1+int(how&1), max, app, splice.Options{Budget: k * 500})
		var sent [2]int
		var closed, resets [2]bool
		cut := false
		for _, op := range script[2:] {
			i := int(op >> 3 & 1)
			e := r.apps[i]
			size := 1 << (op >> 4)
			if e.closed && op&7 != 7 {
				continue
			}
			switch op & 7 {
			case 0, 1:
				if !closed[i] && !resets[i] {
					e.send(bytesAt(sent[i]%period, size))
					sent[i] += size
				}
			case 2, 3:
				e.allow(size)
			case 4:
				if !resets[i] {
					e.stop(io.EOF, false)
					closed[i] = true
				}
			case 5:
				if size > 1<<10 {
					resets[i] = true
					e.stop(errReset, size > 1<<12)
				}
			case 6:
				if size == 1<<15 {
					cut = true
					r.joins[i].Cut(nil)
				}
			case 7:
				for range min(size, 8) {
					r.loops[i*(len(r.loops)-1)].step()
				}
			}
		}
		for _, e := range r.apps {
			if !e.closed {
				e.allow(1 << 24)
			}
		}
		r.run()
		failed := cut || resets[0] || resets[1]
		for i, from := range r.apps {
			to := r.apps[1-i]
			if !inOrder(to.out) || len(to.out) > sent[i] || !failed && len(to.out) != sent[i] {
				t.Fatalf("%s got %d bytes of %d, or other ones", to.name, len(to.out), sent[i])
			}
			if to.closedWrite && !closed[i] {
				t.Fatalf("%s was closed, %s was not", to.name, from.name)
			}
		}
		switch x, y := r.results[0], r.results[1]; {
		case (x == nil) != (y == nil):
			t.Fatalf("one side has ended: %+v, %+v", x, y)
		case x == nil:
			if failed || closed[0] && closed[1] {
				t.Fatal("the joins go on")
			}
		case x.Err == nil && y.Err == nil:
			if !closed[0] || !closed[1] {
				t.Fatal("a clean end without both apps' ends")
			}
		case !failed:
			t.Fatalf("ended by %v and %v", x.Err, y.Err)
		case x.Err == nil || y.Err == nil:
			// One side had all it needed before the other failed.
			if !closed[0] || !closed[1] {
				t.Fatalf("ended by %v and %v", x.Err, y.Err)
			}
		}
		if r.results[0] != nil {
			r.wantUsed("in the end", 0)
		} else if len(r.apps[0].in)+len(r.apps[1].in) == 0 {
			r.wantUsed("idle", 0)
		}
	})
}

// TestPipeBetweenThreads moves megabytes both ways between apps whose loops
// are goroutines, and now and then one of them resets in the middle: every
// byte that arrives is the right one, both sides end, and no buffer is left.
func TestPipeBetweenThreads(t *testing.T) {
	for _, loops := range []int{1, 2} {
		for round := range uint64(12) {
			t.Run(fmt.Sprintf("%d loops, round %d", loops, round), func(t *testing.T) { between(t, loops, round) })
		}
	}
}

func between(t *testing.T, loops int, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, uint64(loops)))
	reset := seed%3 == 2
	budget := splice.NewBudget(int64(rng.IntN(1<<20)), nil)
	var on [2]*splicetest.Loop
	on[0] = splicetest.NewLoop()
	defer on[0].Close()
	if on[1] = on[0]; loops == 2 {
		on[1] = splicetest.NewLoop()
		defer on[1].Close()
	}
	var pipe [2]*splice.PipeEnd
	pipe[0], pipe[1] = splice.Pipe(on[0], on[1], budget, budget)
	var apps [2]*app
	results := make(chan splice.Result, 2)
	size := 1 + rng.IntN(1<<20)
	for i := range apps {
		a := &app{rng: rand.New(rand.NewPCG(seed, uint64(i))), left: size, most: 1 + rng.IntN(50000), sent: sha256.New(), received: sha256.New(), done: make(chan error, 2)}
		if reset && i == 0 {
			a.resetAt = size / 2
		}
		apps[i] = a
		room := 1 + rng.IntN(100<<10)
		on[i].Do(func() {
			var end *splicetest.PipeEnd
			a.end, end = splicetest.Pipe(on[i], room)
			ends := [2]splice.End{end, pipe[i]}
			if i == 1 {
				ends[0], ends[1] = ends[1], ends[0]
			}
			splice.Start(on[i], ends[0], ends[1], splice.Options{}, func(r splice.Result) { results <- r })
			a.end.Notify(a.run)
		})
	}
	for _, a := range apps {
		if err := <-a.done; (err != nil) != reset {
			t.Errorf("app: %v, reset %v", err, reset)
		}
	}
	for range apps {
		if r := <-results; (r.Err != nil) != reset || r.Err == nil && (r.AtoB != uint64(size) || r.BtoA != uint64(size)) {
			t.Errorf("result %+v, want %d bytes both ways, reset %v", r, size, reset)
		}
	}
	if !reset && (!bytes.Equal(apps[0].sent.Sum(nil), apps[1].received.Sum(nil)) || !bytes.Equal(apps[1].sent.Sum(nil), apps[0].received.Sum(nil))) {
		t.Error("other bytes arrived than were sent")
	}
	if n := budget.Used(); n != 0 {
		t.Errorf("%d bytes of buffers are left", n)
	}
}
