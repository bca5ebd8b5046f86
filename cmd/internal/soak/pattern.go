package soak

import (
	"encoding/binary"
	"fmt"
)

// Every byte of a connection says where it belongs: the eight bytes at each
// multiple of eight are the connection's number, the direction and the place in
// the stream, scrambled. Data that is lost, doubled, swapped or on another
// connection is found, and told apart.

const (
	idBits    = 28
	indexBits = 63 - idBits
)

// A place is where eight bytes of pattern belong.
type place struct {
	id    uint64 // of the connection, less than 1<<idBits
	dir   uint64 // 0: from the client, 1: from the server
	index uint64 // of the word in the stream
}

func (p place) String() string {
	from := "client"
	if p.dir == 1 {
		from = "server"
	}
	return fmt.Sprintf("byte %d of what the %s of connection %d sends", p.index*8, from, p.id)
}

const (
	mulA, invA = 0x9e3779b97f4a7c15, 0xf1de83e19937733d
	mulB, invB = 0xbf58476d1ce4e5b9, 0x96de1b173f119089
)

// scramble is one to one, so that unscramble can say where a word comes from.
func scramble(z uint64) uint64 {
	z *= mulA
	z = (z ^ z>>32) * mulB
	return z ^ z>>32
}

func unscramble(z uint64) uint64 {
	z = (z ^ z>>32) * invB
	return (z ^ z>>32) * invA
}

func (p place) word() uint64 { return scramble(p.id<<(indexBits+1) | p.dir<<indexBits | p.index) }

func placeOf(word uint64) place {
	z := unscramble(word)
	return place{id: z >> (indexBits + 1), dir: z >> indexBits & 1, index: z & (1<<indexBits - 1)}
}

// fill writes the pattern of a direction from byte pos on into b.
func fill(b []byte, id uint64, dir int, pos int64) {
	p := place{id, uint64(dir), uint64(pos / 8)}
	if skip := int(pos % 8); skip > 0 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], p.word())
		b = b[copy(b, w[skip:]):]
		p.index++
	}
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, p.word())
		p.index++
	}
	if len(b) > 0 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], p.word())
		copy(b, w[:])
	}
}

// check compares b with the pattern of a direction from byte pos on.
func check(b []byte, id uint64, dir int, pos int64) error {
	p := place{id, uint64(dir), uint64(pos / 8)}
	at := 0
	if skip := int(pos % 8); skip > 0 {
		at = min(8-skip, len(b))
		if !p.holds(b[:at], skip) {
			return p.wrong(b, 0, pos)
		}
		p.index++
	}
	for ; len(b)-at >= 8; at += 8 {
		if binary.LittleEndian.Uint64(b[at:]) != p.word() {
			return p.wrong(b, at, pos)
		}
		p.index++
	}
	if !p.holds(b[at:], 0) {
		return p.wrong(b, at, pos)
	}
	return nil
}

// holds says that b is what is at the place, but for its first skip bytes.
func (p place) holds(b []byte, skip int) bool {
	var w [8]byte
	binary.LittleEndian.PutUint64(w[:], p.word())
	return string(b) == string(w[skip:skip+len(b)])
}

// wrong tells of the word at b[at:], where b begins at byte pos of the stream.
func (p place) wrong(b []byte, at int, pos int64) error {
	return fmt.Errorf("soak: %d bytes that were read at byte %d are wrong from byte %d or a few on, where there should be %v: %x; %s",
		len(b), pos, pos+int64(at), p, b[at:min(at+16, len(b))], origin(b[at:]))
}

// origin says where bytes belong that are not where they were found.
func origin(b []byte) string {
	for at := 0; at < 8 && at+16 <= len(b); at++ {
		p, q := placeOf(binary.LittleEndian.Uint64(b[at:])), placeOf(binary.LittleEndian.Uint64(b[at+8:]))
		if p.id == q.id && p.dir == q.dir && p.index+1 == q.index {
			return fmt.Sprintf("%d bytes on comes %v", at, p)
		}
	}
	return "it is no pattern"
}
