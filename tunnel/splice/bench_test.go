package splice_test

import (
	"testing"

	"github.com/ztun/ztun/tunnel/splice"
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
