package fuzz

import "math/rand/v2"

// A script is an input of the fuzzer, drawn from as choices. Behind its end
// every choice is 0.
type script struct{ b []byte }

// maxScript bounds what one run costs.
const maxScript = 1 << 10

func newScript(b []byte) *script { return &script{b[:min(len(b), maxScript)]} }

func (s *script) more() bool { return len(s.b) > 0 }

func (s *script) byte() byte {
	if len(s.b) == 0 {
		return 0
	}
	v := s.b[0]
	s.b = s.b[1:]
	return v
}

// pick draws a number from 0 to n-1, n at most 256.
func (s *script) pick(n int) int { return int(s.byte()) % n }

// one draws true once in n.
func (s *script) one(n int) bool { return s.pick(n) == n-1 }

func (s *script) uint16() uint16 { return uint16(s.byte())<<8 | uint16(s.byte()) }

func (s *script) uint32() uint32 { return uint32(s.uint16())<<16 | uint32(s.uint16()) }

// bytes takes up to n bytes as they are.
func (s *script) bytes(n int) []byte {
	n = min(n, len(s.b))
	p := s.b[:n]
	s.b = s.b[n:]
	return p
}

// choose draws one of a list.
func choose[T any](s *script, list ...T) T { return list[s.pick(len(list))] }

// noise is a long script to begin with, always the same for a seed.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0] = byte(seed)
	rand.NewChaCha8(key).Read(b)
	return b
}
