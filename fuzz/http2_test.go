package fuzz

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone/hbonetest"
	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// FuzzHTTP2 holds tunnel/h2 against x/net in both roles: streams of data with
// any windows, chunks and ends must arrive as they were sent, and hostile
// frames that x/net takes for a protocol error must be one here (verdict_test.go).
func FuzzHTTP2(f *testing.F) {
	for mode := range 4 {
		for i := range 3 {
			f.Add(byte(mode), noise(uint64(10*mode+i), 40*(i+1)))
		}
	}
	for _, frames := range hostileFrames {
		f.Add(byte(2), frames)
		f.Add(byte(3), frames)
	}
	f.Fuzz(func(t *testing.T, mode byte, in []byte) {
		synctest.Test(t, func(t *testing.T) {
			s := newScript(in)
			switch mode % 4 {
			case 0:
				newTraffic(t, s).ourServer()
			case 1:
				newTraffic(t, s).ourClient()
			case 2:
				compareServers(t, s)
			case 3:
				compareClients(t, s)
			}
		})
	})
}

// A talk is the plan of one stream.
type talk struct {
	up, down           int // bytes of the client and of the server
	upChunks, dnChunks []byte
	clientResets       bool // behind its bytes, instead of an end
	serverResets       bool
	refused            bool // the server answers 503

	gotUp, gotDown []byte
	upErr, downErr error // how the server and the client saw the other end
	status         int
	done           chan struct{} // both have seen
}

// plan is tk without its data.
func (tk *talk) plan() *talk {
	p := *tk
	p.gotUp, p.gotDown = nil, nil
	return &p
}

// traffic is a few talks over one connection.
type traffic struct {
	*testing.T
	s     *script
	loop  *splicetest.Loop
	talks []*talk
	pipe  int
	ours  h2.Config
	frame uint32
}

func newTraffic(t *testing.T, s *script) *traffic {
	tr := &traffic{T: t, s: s, loop: splicetest.NewLoop(), pipe: 64 << s.pick(12)}
	window := func() uint32 { return choose[uint32](s, 65535, 70000, 1, 100, 1<<20, 16384) }
	tr.ours = h2.Config{PingEvery: -1, InitialWindow: window(), MaxWindow: window(), ConnWindow: window(), MaxFrameSize: 16384 << s.pick(3)}
	tr.frame = 16384 << s.pick(3)
	for range 1 + s.pick(4) {
		sizes := []int{0, 1, 100, 5000, 70000, 300000}
		tk := &talk{up: choose(s, sizes...), down: choose(s, sizes...), done: make(chan struct{}, 2)}
		switch s.pick(8) {
		case 7:
			tk.clientResets = true
		case 6:
			tk.serverResets = true
		case 5:
			tk.refused = true
		}
		tk.upChunks, tk.dnChunks = s.bytes(s.pick(8)), s.bytes(s.pick(8))
		tr.talks = append(tr.talks, tk)
	}
	return tr
}

// pattern is the i-th stream's data in a direction.
func pattern(i, n int, down bool) []byte {
	b := make([]byte, n)
	for j := range b {
		b[j] = byte(j*7 + j>>8 + i)
		if down {
			b[j] ^= 0x5a
		}
	}
	return b
}

// chunk is the j-th piece of what is left: small ones, but not many thousands.
func chunk(sizes []byte, j int, p []byte) []byte {
	if len(sizes) == 0 {
		return p
	}
	v := int(sizes[j%len(sizes)])
	return p[:min(len(p), max(1+v*v, len(p)/300))]
}

// An end drives one of our streams: it sends what a plan says and notes what
// comes.
type end struct {
	stream *h2.Stream
	out    []byte
	chunks []byte
	resets bool
	last   bool // ends behind the other side: x/net's transport takes an early end for the end of both
	got    *[]byte
	err    *error
	told   func()
	n      int
	sent   bool
	seen   bool
	buf    []byte
}

func (e *end) run() {
	e.buf = make([]byte, 32<<10)
	e.stream.Notify(e.ready)
}

func (e *end) ready() {
	e.write()
	e.read()
	if e.write(); e.sent && e.seen {
		e.stream.Close()
	}
}

func (e *end) write() {
	for !e.sent {
		if len(e.out) == 0 {
			if e.last && !e.seen && !e.resets {
				return
			}
			e.sent = true
			if e.resets {
				e.stream.Reset(h2.ErrCancel)
				e.end(io.ErrClosedPipe)
				return
			}
			_ = e.stream.CloseWrite()
			return
		}
		p := chunk(e.chunks, e.n, e.out)
		n, err := 0, error(nil)
		if e.n%2 == 1 {
			if room := e.stream.Reserve(len(p)); room != nil {
				n = copy(room, p)
				e.stream.Commit(n)
			} else {
				err = splice.ErrAgain
			}
		} else {
			n, err = e.stream.Write(p)
		}
		e.n++
		e.out = e.out[n:]
		switch {
		case errors.Is(err, splice.ErrAgain):
			return
		case err != nil:
			e.sent = true
		}
	}
}

func (e *end) read() {
	for !e.seen {
		n, err := e.stream.Read(e.buf[:len(chunk(e.chunks, e.n, e.buf))])
		*e.got = append(*e.got, e.buf[:n]...)
		switch {
		case errors.Is(err, splice.ErrAgain):
			return
		case err != nil:
			e.end(err)
		}
	}
}

func (e *end) end(err error) {
	if !e.seen {
		e.seen = true
		*e.err = err
		e.told()
	}
}

// ourServer is our server and x/net's transport.
func (tr *traffic) ourServer() {
	nc, pipe := hbonetest.Pipe(tr.loop, tr.pipe)
	defer tr.loop.Close()
	tr.ours.OnStream = tr.serve
	var conn *h2.Conn
	tr.loop.Do(func() { conn = h2.New(tr.loop, pipe, &tr.ours) })
	cc, err := foreign{frame: tr.frame}.client(nc)
	if err != nil {
		tr.Fatal(err)
	}
	for i, tk := range tr.talks {
		go tr.roundTrip(cc, i, tk)
	}
	tr.wait()
	tr.loop.Do(func() { conn.Close(nil) })
	cc.Close()
	synctest.Wait()
}

// serve takes a stream of our server; its authority is the number of the talk.
func (tr *traffic) serve(s *h2.Stream, r h2.Request) {
	i, err := strconv.Atoi(r.Authority[:1])
	if err != nil || i >= len(tr.talks) {
		tr.Errorf("authority %q", r.Authority)
		s.Reset(err)
		return
	}
	tk := tr.talks[i]
	told := func() { tk.done <- struct{}{} }
	if tk.refused {
		_ = s.Respond(h2.Response{Status: 503, EndStream: true})
		s.Close()
		told()
		return
	}
	if err := s.Respond(h2.Response{Status: 200}); err != nil {
		tr.Errorf("respond: %v", err)
	}
	(&end{stream: s, out: pattern(i, tk.down, true), chunks: tk.dnChunks, resets: tk.serverResets, last: true, got: &tk.gotUp, err: &tk.upErr, told: told}).run()
}

// roundTrip is one talk of x/net's transport.
func (tr *traffic) roundTrip(cc requester, i int, tk *talk) {
	defer func() { tk.done <- struct{}{} }()
	body := &upload{data: pattern(i, tk.up, false), chunks: tk.upChunks, resets: tk.clientResets}
	host := strconv.Itoa(i) + ".test:80"
	resp, err := cc.RoundTrip(&http.Request{Method: http.MethodConnect, URL: &url.URL{Host: host}, Host: host, Body: body, ContentLength: -1, Header: http.Header{}})
	if err != nil {
		tk.downErr = err
		return
	}
	defer resp.Body.Close()
	tk.status = resp.StatusCode
	tk.gotDown, tk.downErr = readAll(resp.Body, tk.dnChunks)
}

var errAborted = errors.New("the client gives up")

// upload is a request's body in chunks.
type upload struct {
	data, chunks []byte
	resets       bool
	n            int
}

func (u *upload) Read(p []byte) (int, error) {
	if len(u.data) == 0 {
		if u.resets {
			return 0, errAborted
		}
		return 0, io.EOF
	}
	n := copy(p, chunk(u.chunks, u.n, u.data))
	u.n++
	u.data = u.data[n:]
	return n, nil
}

func (u *upload) Close() error { return nil }

// readAll is io.ReadAll in chunks, with io.EOF as an error.
func readAll(r io.Reader, chunks []byte) (all []byte, err error) {
	buf := make([]byte, 32<<10)
	for j := 0; ; j++ {
		n, err := r.Read(buf[:len(chunk(chunks, j, buf))])
		all = append(all, buf[:n]...)
		if err != nil {
			return all, err
		}
	}
}

// ourClient is our client and x/net's server.
func (tr *traffic) ourClient() {
	nc, pipe := hbonetest.Pipe(tr.loop, tr.pipe)
	defer tr.loop.Close()
	theirs := foreign{tr.frame, int32(65535 << tr.s.pick(4)), int32(65535 << tr.s.pick(4))}
	served := make(chan struct{})
	go func() {
		defer close(served)
		theirs.serve(nc, tr.handle)
	}()
	tr.ours.Client = true
	var conn *h2.Conn
	tr.loop.Do(func() {
		conn = h2.New(tr.loop, pipe, &tr.ours)
		for i, tk := range tr.talks {
			tr.open(conn, i, tk)
		}
	})
	tr.wait()
	tr.loop.Do(func() { conn.Close(nil) })
	<-served
	synctest.Wait()
}

func (tr *traffic) open(conn *h2.Conn, i int, tk *talk) {
	told := func() { tk.done <- struct{}{} }
	var s *h2.Stream
	s, err := conn.Open(h2.Request{Authority: strconv.Itoa(i) + ".test:80"}, func(r h2.Response, err error) {
		tk.status = r.Status
		if err != nil || r.Status != 200 {
			tk.downErr = err
			s.Close()
			told()
			return
		}
		(&end{stream: s, out: pattern(i, tk.up, false), chunks: tk.upChunks, resets: tk.clientResets, got: &tk.gotDown, err: &tk.downErr, told: told}).run()
	})
	if err != nil {
		tr.Errorf("open: %v", err)
	}
}

// handle is one talk of x/net's server.
func (tr *traffic) handle(w http.ResponseWriter, r *http.Request) {
	i, _ := strconv.Atoi(r.Host[:1])
	tk := tr.talks[i]
	if tk.refused {
		w.WriteHeader(503)
		tk.done <- struct{}{}
		return
	}
	rc := http.NewResponseController(w)
	w.WriteHeader(200)
	_ = rc.Flush()
	read := make(chan struct{})
	go func() {
		defer close(read)
		tk.gotUp, tk.upErr = readAll(r.Body, tk.upChunks)
	}()
	out := pattern(i, tk.down, true)
	for j := 0; len(out) > 0; j++ {
		n, err := w.Write(chunk(tk.dnChunks, j, out))
		if err == nil {
			err = rc.Flush()
		}
		if err != nil {
			break
		}
		out = out[n:]
	}
	if tk.serverResets {
		tk.done <- struct{}{}
		panic(http.ErrAbortHandler)
	}
	<-read
	tk.done <- struct{}{}
}

// wait waits for both sides of every talk, then checks them.
func (tr *traffic) wait() {
	tr.Helper()
	limit := time.After(time.Hour) // of the bubble
	for i, tk := range tr.talks {
		for range 2 {
			select {
			case <-tk.done:
			case <-limit:
				tr.Logf("pipe %d, ours %+v, frames of %d", tr.pipe, tr.ours, tr.frame)
				for i, tk := range tr.talks {
					tr.Logf("stream %d: %+v", i, *tk.plan())
				}
				tr.Fatalf("stream %d of %d stands still: %d of %d bytes up, %d of %d down", i, len(tr.talks), len(tk.gotUp), tk.up, len(tk.gotDown), tk.down)
			}
		}
	}
	for i, tk := range tr.talks {
		tr.check(i, tk)
	}
}

// check: bytes come once and in order, and an end as what it is. A side that
// is reset may lack bytes, and never has wrong ones.
func (tr *traffic) check(i int, tk *talk) {
	tr.Helper()
	up, down := pattern(i, tk.up, false), pattern(i, tk.down, true)
	if tk.refused {
		if tk.status != 503 || len(tk.gotUp)+len(tk.gotDown) > 0 {
			tr.Errorf("stream %d: refused with %d, %v", i, tk.status, tk.downErr)
		}
		return
	}
	if !bytes.HasPrefix(up, tk.gotUp) || !bytes.HasPrefix(down, tk.gotDown) {
		tr.Errorf("stream %d: other bytes than were sent", i)
	}
	if tk.clientResets || tk.serverResets {
		// Who resets sees nothing of the other end; who is reset must not take
		// it for an end, unless it had ended its own side and all has come.
		if tk.clientResets && tk.upErr == io.EOF {
			tr.Errorf("stream %d: the client's reset came as an end", i)
		}
		if tk.serverResets && tk.downErr == io.EOF {
			tr.Errorf("stream %d: the server's reset came as an end", i)
		}
		return
	}
	if len(tk.gotUp) != tk.up || tk.upErr != io.EOF || len(tk.gotDown) != tk.down || tk.downErr != io.EOF {
		tr.Errorf("stream %d: %d of %d bytes up, %v; %d of %d down, %v", i, len(tk.gotUp), tk.up, tk.upErr, len(tk.gotDown), tk.down, tk.downErr)
	}
}
