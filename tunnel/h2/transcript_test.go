package h2

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A testConn is a Conn and a fake peer that writes frames and says which it
// wants to see. It lives in a synctest bubble.
type testConn struct {
	t    *testing.T
	loop *splicetest.Loop
	conn *Conn
	end  *splicetest.PipeEnd // the peer's side

	fr   *http2.Framer // writes to the Conn, reads what it sent
	henc *hpack.Encoder
	hbuf bytes.Buffer
	got  bytes.Buffer // sent by the Conn, not yet looked at
	gone error        // how the Conn ended t

	closed []error // arguments of OnClose
	goAway int     // calls of OnGoAway

	// A server's streams, in order.
	requests []Request
	streams  []*testStream
}

// A testStream is a Stream and what happened to it.
type testStream struct {
	tc       *testConn
	s        *Stream
	response []Response
	respErr  []error
	ready    int
}

type testOption func(*Config)

// run runs f in a bubble with a Conn in the given role.
func run(t *testing.T, f func(tc *testConn), opts ...testOption) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		tc := newTestConn(t, 4<<20, opts...)
		defer tc.loop.Close()
		f(tc)
	})
}

func asClient(c *Config) { c.Client = true }

// asZtunnel sets what a stock ztunnel announces.
func asZtunnel(c *Config) { c.InitialWindow = 4 << 20 }

func noPing(c *Config) { c.PingEvery = -1 }

func newTestConn(t *testing.T, pipe int, opts ...testOption) *testConn {
	tc := &testConn{t: t, loop: splicetest.NewLoop()}
	tc.henc = hpack.NewEncoder(&tc.hbuf)
	tc.fr = http2.NewFramer(peerWriter{tc}, &tc.got)
	tc.fr.AllowIllegalWrites = true
	tc.fr.SetMaxReadFrameSize(1<<24 - 1)
	tc.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	cfg := &Config{
		OnClose:  func(err error) { tc.closed = append(tc.closed, err) },
		OnGoAway: func() { tc.goAway++ },
		OnStream: func(s *Stream, r Request) {
			tc.requests = append(tc.requests, r)
			tc.streams = append(tc.streams, tc.track(s))
		},
	}
	for _, o := range opts {
		o(cfg)
	}
	tc.loop.Do(func() {
		var ours *splicetest.PipeEnd
		ours, tc.end = splicetest.Pipe(tc.loop, pipe)
		tc.end.Notify(tc.receive)
		tc.conn = New(tc.loop, ours, cfg)
	})
	synctest.Wait()
	return tc
}

func (tc *testConn) track(s *Stream) *testStream {
	ts := &testStream{tc: tc, s: s}
	s.Notify(func() { ts.ready++ })
	return ts
}

// receive takes what the Conn sent.
func (tc *testConn) receive() {
	buf := make([]byte, 32<<10)
	for tc.gone == nil {
		n, err := tc.end.Read(buf)
		tc.got.Write(buf[:n])
		switch {
		case errors.Is(err, splice.ErrAgain):
			return
		case err != nil:
			tc.gone = err
		}
	}
}

type peerWriter struct{ tc *testConn }

func (w peerWriter) Write(p []byte) (int, error) { return len(p), w.tc.raw(p) }

// raw writes bytes to the Conn.
func (tc *testConn) raw(p []byte) (err error) {
	tc.t.Helper()
	for p = bytes.Clone(p); len(p) > 0; {
		n := 0
		tc.do(func() { n, err = tc.end.Write(p) })
		if p = p[n:]; err != nil && !errors.Is(err, splice.ErrAgain) {
			return err
		}
	}
	return nil
}

// do runs f on the loop and lets everything settle.
func (tc *testConn) do(f func()) {
	tc.t.Helper()
	tc.loop.Do(f)
	synctest.Wait()
}

// greet does the peer's part of the setup, and skips the Conn's.
func (tc *testConn) greet(settings ...http2.Setting) {
	tc.t.Helper()
	if !tc.conn.cfg.Client {
		tc.raw([]byte(http2.ClientPreface))
	}
	tc.fr.WriteSettings(settings...)
	tc.fr.WriteSettingsAck()
	tc.skip(3)
}

// block encodes a header list: name, value, name, value.
func (tc *testConn) block(kv ...string) []byte {
	tc.hbuf.Reset()
	for i := 0; i < len(kv); i += 2 {
		tc.henc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return bytes.Clone(tc.hbuf.Bytes())
}

func (tc *testConn) headers(id uint32, end bool, kv ...string) {
	tc.t.Helper()
	tc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: tc.block(kv...), EndHeaders: true, EndStream: end})
}

// connect opens a stream on a server.
func (tc *testConn) connect(id uint32) *testStream {
	tc.t.Helper()
	n := len(tc.streams)
	tc.headers(id, false, ":method", "CONNECT", ":authority", "10.0.0.2:8080")
	if len(tc.streams) != n+1 {
		tc.t.Fatalf("stream %d was not accepted", id)
	}
	return tc.streams[n]
}

// accept opens a stream on a server and lets it answer 200.
func (tc *testConn) accept(id uint32) *testStream {
	tc.t.Helper()
	s := tc.connect(id)
	s.respond(200, false)
	tc.skip(1)
	return s
}

// open makes a client open a stream.
func (tc *testConn) open() *testStream {
	tc.t.Helper()
	var ts *testStream
	tc.do(func() {
		returned := false
		s, err := tc.conn.Open(Request{Authority: "10.0.0.2:8080"}, func(r Response, err error) {
			if !returned {
				tc.t.Error("onResponse ran before Open returned")
			}
			if err != nil {
				ts.respErr = append(ts.respErr, err)
			} else {
				ts.response = append(ts.response, r)
			}
		})
		returned = true
		if err != nil {
			tc.t.Fatalf("Open: %v", err)
		}
		ts = tc.track(s)
	})
	return ts
}

// opened opens a stream as client and answers 200.
func (tc *testConn) opened() *testStream {
	tc.t.Helper()
	s := tc.open()
	tc.skip(1)
	tc.headers(s.s.id, false, ":status", "200")
	if len(s.response) != 1 {
		tc.t.Fatalf("stream %d: no response", s.s.id)
	}
	return s
}

func (ts *testStream) respond(status int, end bool, kv ...string) {
	ts.tc.t.Helper()
	ts.tc.do(func() {
		r := Response{Status: status, EndStream: end}
		for i := 0; i < len(kv); i += 2 {
			r.Headers = append(r.Headers, Header{Name: kv[i], Value: kv[i+1]})
		}
		if err := ts.s.Respond(r); err != nil {
			ts.tc.t.Errorf("Respond: %v", err)
		}
	})
}

// write writes all of p, and wants that to be possible.
func (ts *testStream) write(p string) {
	ts.tc.t.Helper()
	ts.tc.do(func() {
		if n, err := ts.s.Write([]byte(p)); n != len(p) || err != nil {
			ts.tc.t.Errorf("Write(%d bytes) = %d, %v", len(p), n, err)
		}
	})
}

func (ts *testStream) closeWrite() {
	ts.tc.t.Helper()
	ts.tc.do(func() {
		if err := ts.s.CloseWrite(); err != nil {
			ts.tc.t.Errorf("CloseWrite: %v", err)
		}
	})
}

// read reads until there is no more and returns the data and how it ended.
func (ts *testStream) read() (string, error) {
	var b strings.Builder
	var err error
	ts.tc.do(func() {
		buf := make([]byte, 8<<10)
		for err == nil {
			var n int
			n, err = ts.s.Read(buf)
			b.Write(buf[:n])
		}
	})
	return b.String(), err
}

func (ts *testStream) wantRead(data string, end error) {
	ts.tc.t.Helper()
	got, err := ts.read()
	if got != data || !errors.Is(err, end) {
		ts.tc.t.Errorf("stream %d: read %.40q (%d bytes), %v; want %.40q (%d bytes), %v", ts.s.id, got, len(got), err, data, len(data), end)
	}
}

// next returns the next frame that the Conn sent in words, "" for none.
func (tc *testConn) next() string {
	tc.t.Helper()
	var line string
	tc.do(func() {
		if tc.got.Len() == 0 {
			return
		}
		if bytes.HasPrefix(tc.got.Bytes(), clientPreface) {
			tc.got.Next(len(clientPreface))
			line = "preface"
			return
		}
		f, err := tc.fr.ReadFrame()
		if err != nil {
			line = "error " + err.Error()
			return
		}
		line = describe(f)
	})
	return line
}

// skip takes n frames without looking, a preface not counted.
func (tc *testConn) skip(n int) {
	tc.t.Helper()
	for range n {
		if tc.next() == "preface" {
			tc.next()
		}
	}
}

// want checks that the Conn has sent these frames and no more.
func (tc *testConn) want(why string, frames ...string) {
	tc.t.Helper()
	for i, want := range frames {
		if got := tc.next(); got != want {
			tc.t.Fatalf("%s: frame %d:\n got %s\nwant %s", why, i, got, want)
		}
	}
	if got := tc.next(); got != "" {
		tc.t.Fatalf("%s: unexpected frame: %s", why, got)
	}
}

// wantClosed checks that the Conn has ended, with an error that matches err.
func (tc *testConn) wantClosed(err error) {
	tc.t.Helper()
	tc.do(func() {})
	if len(tc.closed) != 1 || !errors.Is(tc.closed[0], err) {
		tc.t.Fatalf("OnClose calls: %v, want one with %v", tc.closed, err)
	}
}

// wantConnError checks for GOAWAY with the code and for OnClose's argument.
func (tc *testConn) wantConnError(code Code, limit Limit) {
	tc.t.Helper()
	var last string
	for {
		f := tc.next()
		if f == "" {
			break
		}
		last = f
	}
	if !strings.HasPrefix(last, "GOAWAY") || !strings.HasSuffix(last, " "+code.String()) {
		tc.t.Errorf("last frame %q, want GOAWAY %v", last, code)
	}
	if len(tc.closed) != 1 {
		tc.t.Fatalf("OnClose calls: %v, want one", tc.closed)
	}
	ce, ok := errors.AsType[*ConnError](tc.closed[0])
	if !ok || ce.Code != code || ce.Remote || ce.Limit != limit {
		tc.t.Errorf("OnClose(%#v), want code %v limit %q", tc.closed[0], code, limit)
	}
	if tc.gone == nil {
		tc.t.Errorf("our side of the transport was not closed")
	}
}

// wantAlive checks that the Conn answers a PING.
func (tc *testConn) wantAlive() {
	tc.t.Helper()
	if len(tc.closed) > 0 {
		tc.t.Fatalf("connection ended: %v", tc.closed[0])
	}
	tc.fr.WritePing(false, [8]byte{1})
	tc.want("alive", "PING ACK 0100000000000000")
}

func describe(f http2.Frame) string {
	h := f.Header()
	var b strings.Builder
	fmt.Fprint(&b, h.Type)
	if h.StreamID != 0 {
		fmt.Fprintf(&b, " %d", h.StreamID)
	}
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if f.IsAck() {
			b.WriteString(" ACK")
		}
		f.ForeachSetting(func(s http2.Setting) error {
			fmt.Fprintf(&b, " %v=%d", s.ID, s.Val)
			return nil
		})
	case *http2.WindowUpdateFrame:
		fmt.Fprintf(&b, " +%d", f.Increment)
	case *http2.PingFrame:
		if f.IsAck() {
			b.WriteString(" ACK")
		}
		fmt.Fprintf(&b, " %x", f.Data)
	case *http2.DataFrame:
		if len(f.Data()) <= 32 {
			fmt.Fprintf(&b, " %q", f.Data())
		} else {
			fmt.Fprintf(&b, " len=%d", len(f.Data()))
		}
		if f.StreamEnded() {
			b.WriteString(" END_STREAM")
		}
	case *http2.MetaHeadersFrame:
		if f.StreamEnded() {
			b.WriteString(" END_STREAM")
		}
		for _, hf := range f.Fields {
			fmt.Fprintf(&b, " %s=%s", hf.Name, hf.Value)
		}
	case *http2.RSTStreamFrame:
		fmt.Fprintf(&b, " %v", f.ErrCode)
	case *http2.GoAwayFrame:
		fmt.Fprintf(&b, " last=%d %v", f.LastStreamID, f.ErrCode)
	}
	return b.String()
}

// hangUp makes the peer close its side.
func (tc *testConn) hangUp() {
	tc.t.Helper()
	tc.do(func() { tc.end.CloseWrite() })
}

func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (tc *testConn) state() (s connState) {
	tc.do(func() { s = tc.conn.state })
	return s
}
