package mesh

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func contents[K comparable, V any](m pmap[K, V]) map[K]V { return maps.Collect(m.all()) }

// Every version of the map must stay what it was when it was made.
func TestPmapVersionsDoNotChange(t *testing.T) {
	type version struct {
		m    pmap[int, int]
		want map[int]int
	}
	r := rand.New(rand.NewPCG(1, 2))
	var now pmap[int, int]
	want := make(map[int]int)
	versions := []version{{now, maps.Clone(want)}}
	for range 60 {
		b := new(batch)
		for range r.IntN(40) {
			k, v := r.IntN(200), r.Int()
			if r.IntN(3) == 0 {
				now = now.remove(b, k)
				delete(want, k)
			} else {
				now = now.set(b, k, v)
				want[k] = v
			}
		}
		versions = append(versions, version{now, maps.Clone(want)})
	}
	for i, v := range versions {
		if diff := cmp.Diff(v.want, contents(v.m)); diff != "" {
			t.Fatalf("version %d: -want +got\n%s", i, diff)
		}
		if v.m.len() != len(v.want) {
			t.Errorf("version %d: len = %d, want %d", i, v.m.len(), len(v.want))
		}
		for k := range 200 {
			got, ok := v.m.get(k)
			if want, wantOK := v.want[k]; got != want || ok != wantOK {
				t.Fatalf("version %d: get(%d) = %d, %v, want %d, %v", i, k, got, ok, want, wantOK)
			}
		}
	}
}

func TestPmapLarge(t *testing.T) {
	b := new(batch)
	var m pmap[string, int]
	const n = 50_000
	for i := range n {
		m = m.set(b, fmt.Sprint(i), i)
	}
	full := m
	b = new(batch)
	for i := range n {
		if got, ok := m.get(fmt.Sprint(i)); !ok || got != i {
			t.Fatalf("get(%d) = %d, %v", i, got, ok)
		}
		m = m.remove(b, fmt.Sprint(i))
	}
	if m.len() != 0 || len(m.root.entries)+len(m.root.children) != 0 {
		t.Errorf("emptied map has length %d, root %d+%d", m.len(), len(m.root.entries), len(m.root.children))
	}
	if len(contents(full)) != n {
		t.Errorf("the older version has %d keys, want %d", len(contents(full)), n)
	}
	for range full.all() {
		break // Stopping early must be possible.
	}
}

// Below the last level a node is a list, as if all hash bits were equal.
func TestPmapCollisions(t *testing.T) {
	n := &node[string, int]{}
	var added bool
	for i, k := range []string{"a", "b", "c", "b"} {
		n, added = n.set(new(batch), 0, maxShift+shiftStep, entry[string, int]{k, i})
		if added != (i < 3) {
			t.Errorf("set(%s) added = %v", k, added)
		}
	}
	m := pmap[string, int]{n, 3}
	if diff := cmp.Diff(map[string]int{"a": 0, "b": 3, "c": 2}, contents(m)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	after, removed := n.remove(new(batch), 0, maxShift+shiftStep, "b")
	if _, again := after.remove(new(batch), 0, maxShift+shiftStep, "b"); !removed || again {
		t.Errorf("removed = %v, then %v, want true, then false", removed, again)
	}
	if n.index("b") < 0 || after.index("b") >= 0 {
		t.Error("remove must change the new node and not the old one")
	}
}

func FuzzPmap(f *testing.F) {
	f.Add([]byte{1, 2, 3, 0x81, 2, 0xff})
	f.Fuzz(func(t *testing.T, ops []byte) {
		var m pmap[byte, int]
		want := make(map[byte]int)
		b := new(batch)
		for i, op := range ops {
			if i%7 == 0 {
				b = new(batch)
			}
			if k := op & 0x7f; op&0x80 != 0 {
				m = m.remove(b, k)
				delete(want, k)
			} else {
				m = m.set(b, k, i)
				want[k] = i
			}
		}
		if diff := cmp.Diff(want, contents(m)); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
	})
}

func TestLookupsDoNotAllocate(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(pod("default", "a", "10.0.0.1"))
	s, ip := w.Snapshot(), addrOf("10.0.0.1")
	if n := testing.AllocsPerRun(100, func() {
		if s.WorkloadByIP("", ip) == nil || s.Workload("cluster1//Pod/default/a") == nil {
			t.Fatal("not found")
		}
	}); n != 0 {
		t.Errorf("lookups allocate %v times", n)
	}
}
