package mesh

import (
	"hash/maphash"
	"iter"
	"math/bits"
	"slices"
)

// A pmap is a persistent hash map: set and remove return a new map and leave
// the old one as it was, sharing all but the path to the key (a hash array
// mapped trie of 32-way nodes, so 3 or 4 small nodes at 10,000 keys). Within
// one batch a node that the batch has already copied is changed in place. The
// zero value is empty.
type pmap[K comparable, V any] struct {
	root *node[K, V]
	n    int
}

// A batch owns the nodes that were made for it. It must not be used again once
// a map that it changed has been published.
type batch struct{ _ byte }

// A node keeps entries and children apart, each indexed by the population
// count of its bitmap. Below maxShift all hash bits are used up, and a node is
// just a list of entries.
type node[K comparable, V any] struct {
	owner    *batch
	data     uint32
	kids     uint32
	entries  []entry[K, V]
	children []*node[K, V]
}

type entry[K comparable, V any] struct {
	key K
	val V
}

const (
	shiftStep = 5
	maxShift  = 60
)

var hashSeed = maphash.MakeSeed()

func hash[K comparable](k K) uint64 { return maphash.Comparable(hashSeed, k) }

func (m pmap[K, V]) len() int { return m.n }

func (m pmap[K, V]) get(k K) (v V, ok bool) {
	h := hash(k)
	n := m.root
	for shift := uint(0); n != nil; shift += shiftStep {
		if shift > maxShift {
			if i := n.index(k); i >= 0 {
				return n.entries[i].val, true
			}
			return v, false
		}
		bit := uint32(1) << (h >> shift & 31)
		if n.data&bit != 0 {
			e := &n.entries[at(n.data, bit)]
			if e.key == k {
				return e.val, true
			}
			return v, false
		}
		if n.kids&bit == 0 {
			return v, false
		}
		n = n.children[at(n.kids, bit)]
	}
	return v, false
}

func (m pmap[K, V]) set(b *batch, k K, v V) pmap[K, V] {
	root := m.root
	if root == nil {
		root = &node[K, V]{owner: b}
	}
	root, added := root.set(b, hash(k), 0, entry[K, V]{k, v})
	if added {
		m.n++
	}
	m.root = root
	return m
}

func (m pmap[K, V]) remove(b *batch, k K) pmap[K, V] {
	if m.root == nil {
		return m
	}
	root, removed := m.root.remove(b, hash(k), 0, k)
	if removed {
		m.root = root
		m.n--
	}
	return m
}

// all yields every entry, in no order.
func (m pmap[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if m.root != nil {
			m.root.each(yield)
		}
	}
}

func (n *node[K, V]) each(yield func(K, V) bool) bool {
	for i := range n.entries {
		if !yield(n.entries[i].key, n.entries[i].val) {
			return false
		}
	}
	for _, c := range n.children {
		if !c.each(yield) {
			return false
		}
	}
	return true
}

// at is the index in a packed slice of the element for bit.
func at(bitmap, bit uint32) int { return bits.OnesCount32(bitmap & (bit - 1)) }

func (n *node[K, V]) index(k K) int {
	return slices.IndexFunc(n.entries, func(e entry[K, V]) bool { return e.key == k })
}

// edit returns n if the batch owns it, else a copy that it does.
func (n *node[K, V]) edit(b *batch) *node[K, V] {
	if n.owner == b {
		return n
	}
	return &node[K, V]{
		owner:    b,
		data:     n.data,
		kids:     n.kids,
		entries:  slices.Clone(n.entries),
		children: slices.Clone(n.children),
	}
}

func (n *node[K, V]) set(b *batch, h uint64, shift uint, e entry[K, V]) (_ *node[K, V], added bool) {
	n = n.edit(b)
	if shift > maxShift {
		if i := n.index(e.key); i >= 0 {
			n.entries[i] = e
			return n, false
		}
		n.entries = append(n.entries, e)
		return n, true
	}
	bit := uint32(1) << (h >> shift & 31)
	switch {
	case n.kids&bit != 0:
		i := at(n.kids, bit)
		n.children[i], added = n.children[i].set(b, h, shift+shiftStep, e)
		return n, added
	case n.data&bit == 0:
		n.entries = slices.Insert(n.entries, at(n.data, bit), e)
		n.data |= bit
		return n, true
	}
	i := at(n.data, bit)
	old := n.entries[i]
	if old.key == e.key {
		n.entries[i] = e
		return n, false
	}
	child := &node[K, V]{owner: b}
	child, _ = child.set(b, hash(old.key), shift+shiftStep, old)
	child, _ = child.set(b, h, shift+shiftStep, e)
	n.entries = slices.Delete(n.entries, i, i+1)
	n.data &^= bit
	n.children = slices.Insert(n.children, at(n.kids, bit), child)
	n.kids |= bit
	return n, true
}

func (n *node[K, V]) remove(b *batch, h uint64, shift uint, k K) (_ *node[K, V], removed bool) {
	if shift > maxShift {
		i := n.index(k)
		if i < 0 {
			return n, false
		}
		n = n.edit(b)
		n.entries = slices.Delete(n.entries, i, i+1)
		return n, true
	}
	bit := uint32(1) << (h >> shift & 31)
	switch {
	case n.data&bit != 0:
		i := at(n.data, bit)
		if n.entries[i].key != k {
			return n, false
		}
		n = n.edit(b)
		n.entries = slices.Delete(n.entries, i, i+1)
		n.data &^= bit
		return n, true
	case n.kids&bit == 0:
		return n, false
	}
	i := at(n.kids, bit)
	child, removed := n.children[i].remove(b, h, shift+shiftStep, k)
	if !removed {
		return n, false
	}
	n = n.edit(b)
	if len(child.children) == 0 && len(child.entries) == 1 {
		n.children = slices.Delete(n.children, i, i+1)
		n.kids &^= bit
		n.entries = slices.Insert(n.entries, at(n.data, bit), child.entries[0])
		n.data |= bit
		return n, true
	}
	n.children[i] = child
	return n, true
}
