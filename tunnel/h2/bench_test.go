package h2

import (
	"errors"
	"io"
	"testing"

	"github.com/ztun/ztun/tunnel/splice"
)

// A ringEnd is one end of a pair in memory that allocates nothing.
type ringEnd struct {
	loop *stepLoop
	peer *ringEnd
	task splice.Task
	in   []byte // [off:] is to be read
	off  int
	eof  bool
}

const ringSize = 256 << 10

func ringPipe(loop *stepLoop) (a, b *ringEnd) {
	a, b = &ringEnd{loop: loop}, &ringEnd{loop: loop}
	a.peer, b.peer = b, a
	a.in, b.in = make([]byte, 0, ringSize), make([]byte, 0, ringSize)
	return a, b
}

func (e *ringEnd) Read(p []byte) (int, error) {
	n := copy(p, e.in[e.off:])
	if e.off += n; n > 0 {
		if e.off == len(e.in) {
			e.in, e.off = e.in[:0], 0
			e.loop.Soon(&e.peer.task)
		}
		return n, nil
	}
	if e.eof {
		return 0, io.EOF
	}
	return 0, splice.ErrAgain
}

func (e *ringEnd) Write(p []byte) (int, error) {
	to := e.peer
	n := min(len(p), cap(to.in)-len(to.in))
	to.in = append(to.in, p[:n]...)
	e.loop.Soon(&to.task)
	if n < len(p) {
		return n, splice.ErrAgain
	}
	return n, nil
}

func (e *ringEnd) CloseWrite() error {
	e.peer.eof = true
	e.loop.Soon(&e.peer.task)
	return nil
}

func (e *ringEnd) Reset(error)         {}
func (e *ringEnd) Close()              {}
func (e *ringEnd) Notify(ready func()) { e.task.Run = ready; e.loop.Soon(&e.task) }

// benchPair connects a client and a server whose streams serve handles.
func benchPair(serve func(*Stream)) (loop *stepLoop, client *Conn) {
	loop = newStepLoop()
	a, b := ringPipe(loop)
	cfg := Config{InitialWindow: 4 << 20, Limits: Limits{WindowUpdates: 1 << 30, Pings: 1 << 30}}
	cfg.OnStream = func(s *Stream, r Request) {
		s.Respond(Response{Status: 200})
		serve(s)
	}
	New(loop, b, &cfg)
	cfg.Client = true
	client = New(loop, a, &cfg)
	loop.run(1 << 30)
	return loop, client
}

func benchOpen(b *testing.B, loop *stepLoop, c *Conn) *Stream {
	answered := false
	s, err := c.Open(Request{Authority: "10.0.0.2:8080"}, func(r Response, err error) { answered = err == nil })
	if err != nil {
		b.Fatal(err)
	}
	loop.run(1 << 30)
	if !answered {
		b.Fatal("no answer")
	}
	return s
}

// One stream in one direction, filled in place and taken in place.
func BenchmarkBulk(b *testing.B) {
	received := 0
	loop, client := benchPair(func(s *Stream) {
		s.Push(func(p []byte) int { received += len(p); return len(p) })
	})
	s := benchOpen(b, loop, client)
	b.SetBytes(bulkFrame)
	b.ReportAllocs()
	sent := 0
	for b.Loop() {
		for left := bulkFrame; left > 0; {
			room := s.Reserve(left)
			if room == nil {
				loop.run(1 << 30)
				continue
			}
			s.Commit(len(room))
			left -= len(room)
			sent += len(room)
		}
	}
	loop.run(1 << 30)
	if received != sent {
		b.Fatalf("received %d of %d", received, sent)
	}
}

// A message of 100 bytes there and back on each of 64 streams, all in a pass.
func BenchmarkSmallMessages64Streams(b *testing.B) {
	loop, client := benchPair(func(s *Stream) {
		s.Push(func(p []byte) int { n, _ := s.Write(p); return n })
	})
	var streams [64]*Stream
	answers := 0
	for i := range streams {
		streams[i] = benchOpen(b, loop, client)
		streams[i].Push(func(p []byte) int { answers++; return len(p) })
	}
	message := make([]byte, 100)
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		for _, s := range streams {
			if _, err := s.Write(message); err != nil {
				b.Fatal(err)
			}
		}
		loop.run(1 << 30)
		n += len(streams)
	}
	if answers != n {
		b.Fatalf("%d answers to %d messages", answers, n)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/message")
}

// CONNECT, 200, a clean end from both sides.
func BenchmarkOpenClose(b *testing.B) {
	finish := func(s *Stream) func() {
		var one [1]byte
		return func() {
			if _, err := s.Read(one[:]); err == nil || errors.Is(err, splice.ErrAgain) {
				return
			}
			s.CloseWrite()
			s.Close()
		}
	}
	loop, client := benchPair(func(s *Stream) { s.Notify(finish(s)) })
	b.ReportAllocs()
	for b.Loop() {
		s := benchOpen(b, loop, client)
		s.CloseWrite()
		s.Notify(finish(s))
		loop.run(1 << 30)
		if client.Streams() != 0 {
			b.Fatal("still open")
		}
	}
}
