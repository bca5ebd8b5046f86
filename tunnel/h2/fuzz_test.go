package h2

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A stepLoop is a splice.Loop that runs when it is told to, without goroutine
// and without time: timers never fire.
type stepLoop struct {
	posted     []func()
	soon, last []*splice.Task
	scratch    []byte
}

func newStepLoop() *stepLoop { return &stepLoop{scratch: make([]byte, splice.ScratchSize)} }

func (l *stepLoop) Post(f func())                                 { l.posted = append(l.posted, f) }
func (l *stepLoop) Soon(t *splice.Task)                           { enqueue(&l.soon, t) }
func (l *stepLoop) Last(t *splice.Task)                           { enqueue(&l.last, t) }
func (l *stepLoop) AfterFunc(time.Duration, func()) (stop func()) { return func() {} }
func (l *stepLoop) Scratch() []byte                               { return l.scratch }

func enqueue(q *[]*splice.Task, t *splice.Task) {
	if !t.Queued {
		t.Queued = true
		*q = append(*q, t)
	}
}

// run runs until nothing is queued, or n tasks have run.
func (l *stepLoop) run(n int) (idle bool) {
	for range n {
		var q *[]*splice.Task
		switch {
		case len(l.soon) > 0:
			q = &l.soon
		case len(l.last) > 0:
			q = &l.last
		default:
			return true
		}
		t := (*q)[0]
		copy(*q, (*q)[1:])
		*q = (*q)[:len(*q)-1]
		t.Queued = false
		t.Run()
	}
	return false
}

// A byteEnd feeds bytes in chunks of the given sizes and takes what is
// written, now and then less than all.
type byteEnd struct {
	in     []byte
	sizes  []byte
	writes int
	out    int
	stuck  bool // takes nothing
	ready  func()
	reset  error
	closed bool
}

func (e *byteEnd) Read(p []byte) (int, error) {
	if e.reset != nil || e.closed {
		return 0, io.ErrClosedPipe
	}
	if len(e.in) == 0 {
		return 0, io.EOF
	}
	n := len(p)
	if len(e.sizes) > 0 {
		n = int(e.sizes[0])
		e.sizes = e.sizes[1:]
		if n == 0 {
			return 0, splice.ErrAgain
		}
	}
	n = copy(p[:min(n, len(p))], e.in)
	e.in = e.in[n:]
	return n, nil
}

func (e *byteEnd) Write(p []byte) (int, error) {
	if e.stuck {
		return 0, splice.ErrAgain
	}
	if e.writes++; e.writes%3 == 0 {
		e.out += len(p) / 2
		return len(p) / 2, splice.ErrAgain
	}
	e.out += len(p)
	return len(p), nil
}

func (e *byteEnd) CloseWrite() error   { return nil }
func (e *byteEnd) Reset(cause error)   { e.reset = cause }
func (e *byteEnd) Close()              { e.closed = true }
func (e *byteEnd) Notify(ready func()) { e.ready = ready }

// feedConn runs a Conn over hostile bytes and checks what must hold whatever
// they are. act is what the user does with each stream.
func feedConn(t *testing.T, cfg Config, in, sizes []byte, stuck bool, start func(c *Conn)) {
	loop := newStepLoop()
	end := &byteEnd{in: in, sizes: sizes, stuck: stuck}
	ended := 0
	cfg.OnClose = func(error) { ended++ }
	c := New(loop, end, &cfg)
	if start != nil {
		start(c)
	}
	for i := 0; c.state != stateClosed && i < 2*len(sizes)+100; i++ {
		end.ready()
		if !loop.run(100000) {
			t.Fatal("busy for ever")
		}
		if n := cap(c.out.buf); n > 1<<20 {
			t.Fatalf("%d bytes of output pending", n)
		}
		if n := cap(c.in.block); n > 4*blockFactor*int(c.cfg.MaxHeaderList) {
			t.Fatalf("header block of %d bytes", n)
		}
		if kept := c.stats.DataKept; kept < 0 || int64(kept) > c.recv.size {
			t.Fatalf("%d bytes kept", kept)
		}
		if n := len(c.streams); n > int(c.cfg.MaxStreams) {
			t.Fatalf("%d streams", n)
		}
		if c.zombies < 0 || c.out.granted < 0 || c.recv.win < 0 {
			t.Fatalf("zombies %d, granted %d, window %d", c.zombies, c.out.granted, c.recv.win)
		}
	}
	if c.state == stateOpen {
		t.Fatal("still open after EOF")
	}
	if ended != 1 {
		t.Fatalf("OnClose ran %d times", ended)
	}
	if len(c.streams) != 0 {
		t.Fatalf("%d streams outlive the connection", len(c.streams))
	}
}

// seedFrames is one of everything, for a server.
func seedFrames(headers ...string) []byte {
	var b, block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for i := 0; i < len(headers); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: headers[i], Value: headers[i+1]})
	}
	fr := http2.NewFramer(&b, nil)
	fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
	fr.WriteSettingsAck()
	h := block.Bytes()
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: h[:len(h)/2]})
	fr.WriteContinuation(1, true, h[len(h)/2:])
	fr.WriteData(1, false, []byte("hello"))
	fr.WriteDataPadded(1, false, []byte("hello"), make([]byte, 4))
	fr.WriteWindowUpdate(0, 1000)
	fr.WriteWindowUpdate(1, 1000)
	fr.WritePing(false, [8]byte{1})
	fr.WritePriority(1, http2.PriorityParam{})
	fr.WriteRawFrame(0x99, 0, 0, []byte("x"))
	fr.WriteData(1, true, nil)
	fr.WriteRSTStream(1, 8)
	fr.WriteGoAway(1, 0, []byte("bye"))
	return b.Bytes()
}

func FuzzServerFrames(f *testing.F) {
	seed := seedFrames(":method", "CONNECT", ":authority", "10.0.0.2:80", "forwarded", "for=x")
	for mode := range 6 {
		f.Add(seed, []byte{}, byte(mode))
		f.Add(seed, []byte{1, 1, 0, 200, 3, 0, 9, 9}, byte(mode))
	}
	f.Add(seedFrames(":method", "GET", ":path", "/", ":scheme", "http"), []byte{7, 7}, byte(0))
	f.Fuzz(func(t *testing.T, frames, sizes []byte, mode byte) {
		cfg := Config{InitialWindow: 65535, MaxWindow: 65535, ConnWindow: 65535, MaxStreams: 20, MaxHeaderList: 2000}
		cfg.OnStream = func(s *Stream, r Request) { hostileUser(s, mode) }
		feedConn(t, cfg, append(bytes.Clone(clientPreface), frames...), sizes, mode&0x80 != 0, nil)
	})
}

// hostileUser does one of the things a user may do.
func hostileUser(s *Stream, mode byte) {
	if mode&7 != 5 {
		s.Respond(Response{Status: 200})
	}
	buf := make([]byte, 1000)
	drain := func() {
		for {
			if n, _ := s.Read(buf); n == 0 {
				return
			}
		}
	}
	switch mode & 7 {
	case 0:
		s.Push(func(p []byte) int { s.Write(p); return len(p) })
		s.Notify(func() { s.Write(buf) })
	case 1:
		s.Push(func(p []byte) int { return len(p) / 2 })
		s.Notify(func() {
			drain()
			if s.Failure() != nil {
				s.Close()
			}
		})
	case 2:
		s.Push(func(p []byte) int { s.Reset(ErrCancel); return 1 })
	case 3: // takes nothing
	case 4:
		s.Notify(func() { drain(); s.CloseWrite(); s.Close() })
	case 5:
		s.Notify(func() { s.Respond(Response{Status: 503, EndStream: true}); s.Close() })
	case 6:
		s.Push(func(p []byte) int { s.Conn().GoAway(); return len(p) })
	case 7:
		s.Push(func(p []byte) int { s.Conn().Close(nil); return len(p) })
	}
}

func FuzzClientFrames(f *testing.F) {
	seed := seedFrames(":status", "200", "baggage", "x")
	for mode := range 6 {
		f.Add(seed, []byte{}, byte(mode))
		f.Add(seed, []byte{1, 1, 0, 200, 3, 0, 9, 9}, byte(mode))
	}
	f.Add(seedFrames(":status", "401"), []byte{7, 7}, byte(0))
	f.Add(seedFrames(":status", "103"), []byte{7, 7}, byte(0))
	f.Fuzz(func(t *testing.T, frames, sizes []byte, mode byte) {
		cfg := Config{Client: true, InitialWindow: 65535, MaxWindow: 65535, ConnWindow: 65535, MaxHeaderList: 2000}
		answers := 0
		const streams = 5
		feedConn(t, cfg, frames, sizes, mode&0x80 != 0, func(c *Conn) {
			for range streams {
				var s *Stream
				s, err := c.Open(Request{Authority: "a:1"}, func(r Response, err error) {
					answers++
					if err == nil {
						hostileUser(s, mode)
					}
				})
				if err != nil {
					t.Fatal(err)
				}
			}
		})
		if answers != streams {
			t.Fatalf("onResponse ran %d times for %d streams", answers, streams)
		}
	})
}

// FuzzDataFlow sends two streams of data through a pair of Conns, cut up in
// every place by script, and wants the bytes to arrive as they were.
func FuzzDataFlow(f *testing.F) {
	f.Add([]byte{}, uint16(1000), uint16(0))
	f.Add([]byte{1, 2, 3, 255, 128, 7, 64, 90, 33, 12}, uint16(50000), uint16(3))
	f.Add(bytes.Repeat([]byte{201, 17, 0, 99}, 30), uint16(65535), uint16(1))
	f.Fuzz(dataFlow)
}

func dataFlow(t *testing.T, script []byte, size, pipe uint16) {
	loop := newStepLoop()
	a, b := splicetest.Pipe(loop, int(pipe)+64)
	next := func() int {
		if len(script) == 0 {
			return 255
		}
		v := int(script[0])
		script = script[1:]
		return v
	}
	received := map[string]*bytes.Buffer{}
	cfg := &Config{InitialWindow: 65535, MaxWindow: 1 << 17, ConnWindow: 1 << 17, OnStream: func(s *Stream, r Request) {
		s.Respond(Response{Status: 200})
		scriptedEcho(s, next)
	}}
	server := New(loop, b, cfg)
	client := New(loop, a, &Config{Client: true, InitialWindow: 65535, MaxWindow: 1 << 17, ConnWindow: 1 << 17})
	ends := 0
	want := map[string][]byte{}
	for i, name := range []string{"one:1", "two:2"} {
		data := make([]byte, int(size)*(i+1))
		for j := range data {
			data[j] = byte(j*7 + j>>8 + i)
		}
		want[name] = data
		got := &bytes.Buffer{}
		received[name] = got
		var s *Stream
		s, err := client.Open(Request{Authority: name}, func(r Response, err error) {
			if err != nil {
				t.Fatal(err)
			}
			scriptedSend(s, data, next)
		})
		if err != nil {
			t.Fatal(err)
		}
		s.Push(func(p []byte) int {
			n := min(len(p), 1+next()*40)
			got.Write(p[:n])
			if n < len(p) {
				s.poke()
			}
			return n
		})
		ready := func() {
			buf := make([]byte, 1+next()*100)
			for {
				n, err := s.Read(buf)
				got.Write(buf[:n])
				if err == io.EOF && !s.released {
					ends++
					s.Close()
				}
				if err != nil {
					return
				}
			}
		}
		recv := ready
		s.Notify(func() { recv(); resend(s) })
	}
	for range 1000000 {
		if loop.run(1) {
			break
		}
	}
	if ends != 2 {
		for _, c := range []*Conn{client, server} {
			t.Logf("client=%v state %d err %v send %d recv %+v queued %d blocked %v waiters %d granted %d kept %d", c.cfg.Client, c.state, c.err, c.send, c.recv, c.queued(), c.out.blocked, len(c.out.waiters), c.out.granted, c.stats.DataKept)
			for _, s := range c.streams {
				t.Logf("  stream %d: send %d blocked %v waiting %v recv %+v kept %d ends %v %v", s.id, s.send, s.windowBlocked, s.waiting, s.recv, s.kept.n, s.sentEnd, s.gotEnd)
			}
		}
	}
	for name, data := range want {
		if !bytes.Equal(received[name].Bytes(), data) {
			t.Fatalf("%s: %d bytes arrived of %d, or others (%d ended)", name, received[name].Len(), len(data), ends)
		}
	}
	if ends != 2 || client.Streams()+server.Streams() != 0 {
		t.Fatalf("%d ends, %d and %d streams open", ends, client.Streams(), server.Streams())
	}
}

// senders hold what scriptedSend has not sent yet.
var senders = map[*Stream]func(){}

func resend(s *Stream) {
	if f := senders[s]; f != nil {
		f()
	}
}

func scriptedSend(s *Stream, data []byte, next func() int) {
	senders[s] = func() {
		for len(data) > 0 {
			m := min(len(data), 1+next()*next())
			var n int
			var err error
			if next()%2 == 0 {
				n, err = s.Write(data[:m])
			} else if room := s.Reserve(m); room != nil {
				n = copy(room, data[:m])
				s.Commit(n)
			} else {
				err = splice.ErrAgain
			}
			data = data[n:]
			if errors.Is(err, splice.ErrAgain) {
				return
			}
		}
		delete(senders, s)
		s.CloseWrite()
	}
	resend(s)
}

func scriptedEcho(s *Stream, next func() int) {
	var pending []byte
	eof := false
	s.Push(func(p []byte) int {
		if len(pending) > 0 {
			return 0
		}
		n, _ := s.Write(p[:min(len(p), 1+next()*30)])
		if n < len(p) {
			s.poke()
		}
		return n
	})
	buf := make([]byte, 10000)
	s.Notify(func() {
		for {
			n, _ := s.Write(pending)
			if pending = pending[n:]; len(pending) > 0 {
				return
			}
			if eof {
				s.CloseWrite()
				s.Close()
				return
			}
			n, err := s.Read(buf[:1+next()*35])
			pending = buf[:n]
			if err == io.EOF {
				eof = true
			} else if err != nil {
				return
			}
		}
	})
}
