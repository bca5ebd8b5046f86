package splice_test

import (
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// source gives bytes without end as long as it is fed, drain takes what it is
// given; stream does so by the fast paths.

type source struct {
	splice.End
	fed int
}

func (s *source) Read(p []byte) (int, error) {
	n := min(len(p), s.fed)
	if n == 0 {
		return 0, splice.ErrAgain
	}
	s.fed -= n
	return n, nil
}

func (s *source) Write(p []byte) (int, error) { return len(p), nil }
func (s *source) Notify(func())               {}
func (s *source) Failure() error              { return nil }

// drain takes half of what it is offered at first, so that there is residue.
type drain struct {
	source
	short bool
}

func (d *drain) Write(p []byte) (int, error) {
	if d.short = !d.short; d.short {
		return len(p) / 2, splice.ErrAgain
	}
	return len(p), nil
}

type fast struct {
	source
	room [64 << 10]byte
	sink func([]byte) int
}

func (f *fast) Reserve(n int) []byte           { return f.room[:min(n, len(f.room))] }
func (f *fast) Commit(int)                     {}
func (f *fast) Push(sink func([]byte) (n int)) { f.sink = sink }

// steady runs one turn of a Join for each feeding of n bytes to src.
func steady(b *testing.B, src *source, a, z splice.End, n int) {
	loop := &steps{}
	join := splice.Start(loop, a, z, splice.Options{}, func(splice.Result) { b.Error("the join ended") })
	loop.run(b)
	task := loop.lastRun
	b.SetBytes(int64(n))
	b.ReportAllocs()
	for b.Loop() {
		src.fed += n
		loop.Soon(task)
		loop.step()
		loop.Soon(task)
		loop.step()
	}
	if ab, _ := join.Counts(); ab == 0 || src.fed > 0 {
		b.Errorf("%d bytes moved, %d left", ab, src.fed)
	}
}

func benchmarks() map[string]func(*testing.B) {
	return map[string]func(*testing.B){
		"plain-128":   func(b *testing.B) { s := &source{}; steady(b, s, s, &source{}, 128) },
		"plain-64K":   func(b *testing.B) { s := &source{}; steady(b, s, s, &source{}, 64<<10) },
		"residue-64K": func(b *testing.B) { s := &source{}; steady(b, s, s, &drain{}, 64<<10) },
		"reserve-128": func(b *testing.B) { s := &source{}; steady(b, s, s, &fast{}, 128) },
		"reserve-64K": func(b *testing.B) { s := &source{}; steady(b, s, s, &fast{}, 64<<10) },
		"push-64K": func(b *testing.B) {
			f := &fast{}
			loop := &steps{}
			splice.Start(loop, f, &source{}, splice.Options{}, nil)
			loop.run(b)
			b.SetBytes(64 << 10)
			b.ReportAllocs()
			for b.Loop() {
				if f.sink(f.room[:]) != len(f.room) {
					b.Fatal("not all taken")
				}
			}
		},
	}
}

func BenchmarkJoin(b *testing.B) {
	for name, f := range benchmarks() {
		b.Run(name, f)
	}
}

func TestSteadyStateDoesNotAllocate(t *testing.T) {
	tests := map[string]struct {
		a splice.End
		z splice.End
	}{
		"plain": {&source{}, &source{}}, "residue": {&source{}, &drain{}}, "reserve": {&source{}, &fast{}}, "push": {&fast{}, &source{}},
	}
	for name, tt := range tests {
		loop := &steps{}
		splice.Start(loop, tt.a, tt.z, splice.Options{}, nil)
		loop.run(t)
		task := loop.lastRun
		n := testing.AllocsPerRun(1000, func() {
			switch a := tt.a.(type) {
			case *source:
				a.fed += 100 << 10
			case *fast:
				a.sink(a.room[:])
			}
			loop.Soon(task)
			loop.run(t)
		})
		if n > 0.1 { // the pool may lose a buffer to the garbage collector
			t.Errorf("%s: %v allocations a turn", name, n)
		}
	}
}

func TestPipeDoesNotAllocate(t *testing.T) {
	for loops := 1; loops <= 2; loops++ {
		for _, size := range []int{100, 60 << 10} {
			p := newTube(t, loops, plenty)
			p.a.Notify(func() {})
			p.b.Notify(func() {})
			src, buf := make([]byte, size), make([]byte, size)
			n := testing.AllocsPerRun(500, func() {
				for sent := 0; sent < size; {
					m, _ := p.a.Write(src[sent:])
					sent += m
					p.run()
					for {
						if m, err := p.b.Read(buf); m == 0 || err != nil {
							break
						}
					}
				}
			})
			if n > 0.1 { // the pool may lose a buffer to the garbage collector
				t.Errorf("%d loops, %d bytes: %v allocations", loops, size, n)
			}
		}
	}
}

// BenchmarkPipe is what a join in memory costs between its two Joins: a
// message there and back, and 64 KiB one way. The same through net.Pipe and
// through a TCP connection over loopback, each read by a goroutine, stands
// beside it.
func BenchmarkPipe(b *testing.B) {
	for _, size := range []int{64, 1 << 10} {
		for loops := 1; loops <= 2; loops++ {
			b.Run(fmt.Sprintf("request-%d/loops-%d", size, loops), func(b *testing.B) { pipeRequest(b, loops, size) })
		}
		for name, dial := range conns {
			b.Run(fmt.Sprintf("request-%d/%s", size, name), func(b *testing.B) { connRequest(b, dial, size) })
		}
	}
	for loops := 1; loops <= 2; loops++ {
		b.Run(fmt.Sprintf("bulk-64K/loops-%d", loops), func(b *testing.B) { pipeBulk(b, loops) })
	}
	for name, dial := range conns {
		b.Run("bulk-64K/"+name, func(b *testing.B) { connBulk(b, dial) })
	}
}

// threads is a Pipe whose loops are goroutines.
func threads(b *testing.B, loops int) (on [2]*splicetest.Loop, ends [2]*splice.PipeEnd) {
	for i := range loops {
		on[i] = splicetest.NewLoop()
		b.Cleanup(on[i].Close)
	}
	if loops == 1 {
		on[1] = on[0]
	}
	budget := splice.NewBudget(plenty, nil)
	ends[0], ends[1] = splice.Pipe(on[0], on[1], budget, budget)
	return on, ends
}

func pipeRequest(b *testing.B, loops, size int) {
	on, ends := threads(b, loops)
	msg := make([]byte, size)
	done := make(chan struct{})
	left := b.N
	// each calls f with every message that comes to e.
	each := func(e *splice.PipeEnd, f func()) func() {
		got := 0
		return func() {
			for {
				p, err := e.Peek()
				if err != nil {
					return
				}
				got += len(p)
				e.Discard(len(p))
				if got == size {
					got = 0
					f()
				}
			}
		}
	}
	send := func(e *splice.PipeEnd) {
		for n := 0; n < size; {
			m := copy(e.Reserve(size-n), msg)
			e.Commit(m)
			n += m
		}
	}
	on[1].Do(func() { ends[1].Notify(each(ends[1], func() { send(ends[1]) })) })
	b.ReportAllocs()
	b.ResetTimer()
	on[0].Do(func() {
		ends[0].Notify(each(ends[0], func() {
			if left--; left == 0 {
				close(done)
				return
			}
			send(ends[0])
		}))
		send(ends[0])
	})
	<-done
}

func pipeBulk(b *testing.B, loops int) {
	on, ends := threads(b, loops)
	const chunk = 64 << 10
	total := b.N * chunk
	done := make(chan struct{})
	src, dst := make([]byte, chunk), make([]byte, chunk)
	sent, got := 0, 0
	on[1].Do(func() {
		ends[1].Notify(func() {
			for got < total {
				p, err := ends[1].Peek()
				if err != nil {
					return
				}
				copy(dst, p)
				got += len(p)
				ends[1].Discard(len(p))
				if got == total {
					close(done)
				}
			}
		})
	})
	b.SetBytes(chunk)
	b.ReportAllocs()
	b.ResetTimer()
	on[0].Do(func() {
		ends[0].Notify(func() {
			for sent < total {
				room := ends[0].Reserve(total - sent)
				if len(room) == 0 {
					return
				}
				n := copy(room, src)
				ends[0].Commit(n)
				sent += n
			}
		})
	})
	<-done
}

// conns are what else could carry bytes from thread to thread.
var conns = map[string]func(testing.TB) (a, b net.Conn){
	"net.Pipe": func(testing.TB) (a, b net.Conn) { return net.Pipe() },
	"loopback": func(t testing.TB) (a, b net.Conn) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if a, err = net.Dial("tcp", l.Addr().String()); err == nil {
			b, err = l.Accept()
		}
		if err != nil {
			t.Fatal(err)
		}
		return a, b
	},
}

func connRequest(b *testing.B, dial func(testing.TB) (x, y net.Conn), size int) {
	x, y := dial(b)
	defer x.Close()
	defer y.Close()
	go func() {
		buf := make([]byte, size)
		for {
			if _, err := io.ReadFull(y, buf); err != nil {
				return
			}
			_, _ = y.Write(buf)
		}
	}()
	buf := make([]byte, size)
	b.ReportAllocs()
	for b.Loop() {
		_, _ = x.Write(buf)
		if _, err := io.ReadFull(x, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func connBulk(b *testing.B, dial func(testing.TB) (x, y net.Conn)) {
	x, y := dial(b)
	defer x.Close()
	defer y.Close()
	src, dst := make([]byte, 64<<10), make([]byte, 64<<10)
	go func() {
		for {
			if _, err := x.Write(src); err != nil {
				return
			}
		}
	}()
	b.SetBytes(int64(len(dst)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := io.ReadFull(y, dst); err != nil {
			b.Fatal(err)
		}
	}
}
