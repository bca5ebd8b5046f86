package fuzz

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone/hbonetest"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

// A verdict is what an endpoint makes of a frame; a worse one is greater.
type verdict int

const (
	fine        verdict = iota
	streamError         // RST_STREAM with an error
	connError           // GOAWAY with an error, or the connection is gone
)

func (v verdict) String() string { return [...]string{"fine", "stream error", "connection error"}[v] }

// allowed differences: frames that x/net takes for worse than we do, each with
// the sentence that lets us.
var differences = []struct {
	why    string // RFC 9113
	frames func(j *judged) bool
}{
	{
		"PRIORITY of a wrong length, of ourselves, or in HEADERS: \"A PRIORITY frame with a length other than 5 octets MUST be treated as a stream error\" (6.3), and \"this update to HTTP/2 deprecates the priority signaling defined in RFC 7540\" (5.3.2)",
		func(j *judged) bool { return j.frame.kind == http2.FramePriority },
	},
	{
		"a setting twice: \"Each parameter in a SETTINGS frame replaces any existing value for that parameter. Settings are processed in the order in which they appear\" (6.5)",
		func(j *judged) bool { return j.frame.kind == http2.FrameSettings && j.frame.repeats() },
	},
	{
		"an acknowledgement of SETTINGS that nobody waits for: none is called an error, \"the sender of the altered settings can rely on the values from the oldest unacknowledged SETTINGS frame having been applied\" (6.5.3)",
		func(j *judged) bool {
			return j.frame.kind == http2.FrameSettings && j.frame.flags.Has(http2.FlagSettingsAck) && len(j.frame.payload) == 0
		},
	},
	{
		"a malformed request that we answer 400: \"For malformed requests, a server MAY send an HTTP response prior to closing or resetting the stream\" (8.1.1)",
		func(j *judged) bool { return !j.client && j.refused },
	},
	{
		"frames on streams up to one whose request was malformed, which x/net never counts as opened: \"The first use of a new stream identifier implicitly closes all streams in the 'idle' state that might have been initiated by that peer with a lower-valued stream identifier\" (5.1.1)",
		func(j *judged) bool { return j.malformed && j.frame.id != 0 && j.frame.id <= j.highest },
	},
	{
		"HEADERS that follow an answer: they \"MUST NOT be sent on a connected stream and MUST be treated as a stream error if received\" (8.5)",
		func(j *judged) bool {
			return j.client && j.frame.kind == http2.FrameHeaders && j.ours == streamError
		},
	},
	{
		"WINDOW_UPDATE, of 0 too, on a stream that has ended: \"a receiver could receive a WINDOW_UPDATE frame on a stream in a 'half-closed (remote)' or 'closed' state. A receiver MUST NOT treat this as an error\" (6.9)",
		func(j *judged) bool {
			return j.frame.kind == http2.FrameWindowUpdate && len(j.frame.payload) == 4 && (j.gone[j.frame.id] || j.ended[j.frame.id])
		},
	},
	{
		"the padding of DATA on a stream that was reset, or is for this frame: \"An endpoint MUST minimally process and then discard any frames it receives in this state\" (5.1)",
		func(j *judged) bool {
			return j.frame.kind == http2.FrameData && (j.gone[j.frame.id] || j.ours == streamError)
		},
	},
}

// A judged frame is one that was sent to both, and what was sent before.
type judged struct {
	frame  rawFrame
	before []rawFrame
	ours   verdict
	client bool // they are clients
	// highest is the highest stream that was opened; malformed says that one was
	// reset for its request.
	highest   uint32
	malformed bool
	// gone are streams that either side has reset, ended those that the sender
	// has ended.
	gone, ended map[uint32]bool
	// refused says that we have just ended our side of a stream.
	refused bool
}

// A rawFrame is a frame as it goes on the wire.
type rawFrame struct {
	kind    http2.FrameType
	flags   http2.Flags
	id      uint32
	length  int // what the head says; -1: that of payload
	payload []byte
}

func (f rawFrame) String() string {
	return fmt.Sprintf("%v flags=%#x stream=%d length=%d %x", f.kind, uint8(f.flags), f.id, f.length, f.payload[:min(len(f.payload), 40)])
}

// repeats reports whether SETTINGS have a setting twice.
func (f rawFrame) repeats() bool {
	seen := make(map[uint16]bool)
	for p := f.payload; len(p) >= 6; p = p[6:] {
		id := binary.BigEndian.Uint16(p)
		if seen[id] {
			return true
		}
		seen[id] = true
	}
	return false
}

// leavesBlock reports whether more of a header block is to follow.
func (f rawFrame) leavesBlock() bool {
	return (f.kind == http2.FrameHeaders || f.kind == http2.FrameContinuation) && !f.flags.Has(http2.FlagHeadersEndHeaders)
}

func (f rawFrame) bytes() []byte {
	n := len(f.payload)
	if f.length >= 0 {
		n = f.length
	}
	b := []byte{byte(n >> 16), byte(n >> 8), byte(n), byte(f.kind), byte(f.flags)}
	return append(binary.BigEndian.AppendUint32(b, f.id), f.payload...)
}

// frame draws a frame: mostly such as make sense, in any order.
func (s *script) frame(client bool) rawFrame {
	f := rawFrame{id: choose[uint32](s, 1, 1, 1, 3, 0, 2, 5, 7), length: -1}
	be := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	switch s.pick(14) {
	case 0, 1:
		f.kind, f.flags = http2.FrameData, choose(s, http2.Flags(0), http2.FlagDataEndStream)
		f.payload = make([]byte, s.pick(256)*s.pick(8))
	case 2, 3:
		f.kind, f.flags = http2.FrameHeaders, choose(s, http2.FlagHeadersEndHeaders, http2.FlagHeadersEndHeaders, http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, 0)
		f.payload = s.headers(client)
	case 4:
		f.kind, f.id = http2.FrameSettings, 0
		for range s.pick(3) {
			f.payload = binary.BigEndian.AppendUint16(f.payload, choose[uint16](s, 1, 2, 3, 4, 5, 6, 99))
			f.payload = append(f.payload, be(choose[uint32](s, 0, 1, 100, 16384, 1<<24-1, 1<<24, 1<<31-1, 1<<31))...)
		}
	case 5:
		f.kind, f.id, f.flags = http2.FrameSettings, 0, http2.FlagSettingsAck
	case 6:
		f.kind, f.payload = http2.FrameWindowUpdate, be(choose[uint32](s, 1, 0, 1000, 1<<31-1, 1<<30))
	case 7:
		f.kind, f.payload = http2.FrameRSTStream, be(uint32(s.pick(14)))
	case 8:
		f.kind, f.id, f.payload = http2.FramePing, 0, make([]byte, 8)
	case 9:
		f.kind, f.id, f.payload = http2.FrameGoAway, 0, append(be(uint32(s.pick(8))), be(0)...)
	case 10:
		f.kind, f.payload = http2.FramePriority, append(be(choose[uint32](s, 0, 1, 3)), byte(s.pick(256)))
	case 11:
		f.kind, f.flags, f.payload = http2.FrameContinuation, choose(s, http2.FlagContinuationEndHeaders, 0), s.headers(client)
	case 12:
		f.kind, f.flags, f.payload = http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, append(be(2), s.headers(client)...)
	case 13:
		f.kind, f.flags, f.payload = http2.FrameType(s.pick(14)), http2.Flags(s.byte()), s.bytes(s.pick(20))
		if s.one(4) {
			f.length = s.pick(3) * 16384
			f.payload = nil
		}
	}
	switch s.pick(16) {
	case 15:
		f.payload = f.payload[:min(len(f.payload), s.pick(10))]
	case 14:
		f.payload = append(f.payload, s.bytes(3)...)
	case 13:
		f.id = 0
	case 12:
		f.flags |= http2.FlagDataPadded
		f.payload = append([]byte{byte(s.pick(20))}, append(f.payload, make([]byte, 8)...)...)
	}
	return f
}

// headers draws a header block. Nothing goes into the compression table, so
// that a block means the same wherever it comes.
func (s *script) headers(client bool) []byte {
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	put := func(name, value string) {
		_ = enc.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: true})
	}
	if client {
		put(":status", choose(s, "200", "200", "200", "100", "503", "101", "x", ""))
	} else {
		put(":method", choose(s, "CONNECT", "CONNECT", "CONNECT", "GET", ""))
		put(":authority", choose(s, "a:80", "a:80", "", "b:81"))
	}
	for range s.pick(3) {
		put(choose(s, "x-a", "baggage", "Upper", ":path", ":scheme", "connection", "te", ":status", "", "x y", ":protocol"), choose(s, "v", "", "trailers", "\x00", "/"))
	}
	p := b.Bytes()
	if s.pick(16) == 15 {
		p = p[:len(p)/2]
	}
	return p
}

// hostileFrames are scripts that servers end a stream or the connection for.
var hostileFrames = [][]byte{
	slices.Concat(opened, []byte{0, 0, 0, 0, 0, 12, 19}), // DATA with more padding than payload
	slices.Concat(opened, []byte{0, 6, 1, 0}),            // WINDOW_UPDATE of 0
	slices.Concat(opened, []byte{0, 6, 3, 0}),            // and beyond 2^31-1
	slices.Concat(opened, []byte{0, 11, 0, 0}),           // CONTINUATION of nothing
	{0, 5, 2, 0, 0, 0, 0, 0, 0},                          // an even stream
	{0, 0, 0, 0, 1, 1, 0},                                // DATA on an idle stream
}

// opened is the script of a CONNECT on stream 1.
var opened = []byte{0, 0, 2, 0, 0, 0, 0, 0, 0}

// An endpoint is one that frames are sent to.
type endpoint struct {
	name string
	conn *hbonetest.Conn
	in   bytes.Buffer
	dead bool
	// refused: an end of a stream was among what was looked at last.
	refused bool
}

// feed sends bytes and returns what is made of them.
func (e *endpoint) feed(b []byte) verdict {
	if _, err := e.conn.Write(b); err != nil {
		e.dead = true
	}
	return e.look()
}

// look reads what the endpoint has sent by now.
func (e *endpoint) look() verdict {
	synctest.Wait()
	worst := fine
	e.refused = false
	buf := make([]byte, 64<<10)
	for e.conn.Buffered() > 0 {
		n, err := e.conn.Read(buf)
		e.in.Write(buf[:n])
		if err != nil {
			break
		}
	}
	for {
		b := e.in.Bytes()
		if bytes.HasPrefix(b, []byte(http2.ClientPreface)) {
			e.in.Next(len(http2.ClientPreface))
			continue
		}
		if len(b) < 9 {
			break
		}
		n := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
		if len(b) < 9+n {
			break
		}
		f := e.in.Next(9 + n)
		switch http2.FrameType(f[3]) {
		case http2.FrameHeaders, http2.FrameData:
			e.refused = e.refused || f[4]&byte(http2.FlagHeadersEndStream) != 0
		case http2.FrameGoAway:
			if binary.BigEndian.Uint32(f[13:]) != 0 {
				worst = connError
			}
		case http2.FrameRSTStream:
			if binary.BigEndian.Uint32(f[9:]) != uint32(http2.ErrCodeNo) {
				worst = max(worst, streamError)
			}
		}
	}
	if e.dead || e.closed() {
		worst = connError
	}
	return worst
}

// closed reports whether the endpoint has ended the connection.
func (e *endpoint) closed() bool {
	if e.conn.Buffered() > 0 {
		return false
	}
	_ = e.conn.SetReadDeadline(time.Unix(1, 0))
	_, err := e.conn.Read(make([]byte, 1))
	_ = e.conn.SetReadDeadline(time.Time{})
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// newEndpoint returns an endpoint and the connection to serve for it.
func newEndpoint(loop *splicetest.Loop, name string) (*endpoint, *splicetest.PipeEnd) {
	c, end := hbonetest.Pipe(loop, 1<<20)
	return &endpoint{name: name, conn: c}, end
}

// newForeign is newEndpoint for one that wants a net.Conn.
func newForeign(loop *splicetest.Loop, name string) (*endpoint, *hbonetest.Conn) {
	e, end := newEndpoint(loop, name)
	var c *hbonetest.Conn
	loop.Do(func() { c = hbonetest.New(loop, end) })
	return e, c
}

// compareServers sends the same frames to our server and to x/net's.
func compareServers(t *testing.T, s *script) {
	loop := splicetest.NewLoop()
	defer loop.Close()
	ours, end := newEndpoint(loop, "ours")
	var conn *h2.Conn
	loop.Do(func() {
		conn = h2.New(loop, end, &h2.Config{PingEvery: -1, InitialWindow: 65535, MaxWindow: 65535, ConnWindow: 65535, MaxFrameSize: 16384, OnStream: swallow})
	})
	theirs, nc := newForeign(loop, "x/net")
	served := make(chan struct{})
	go func() {
		defer close(served)
		foreign{16384, 65535, 65535}.serve(nc, swallowHTTP)
	}()
	compare(t, s, false, ours, theirs, []byte(http2.ClientPreface))
	loop.Do(func() { conn.Close(nil) })
	ours.conn.Close()
	theirs.conn.Close()
	<-served
	synctest.Wait()
}

// swallow answers 200 and reads to the end.
func swallow(s *h2.Stream, _ h2.Request) {
	_ = s.Respond(h2.Response{Status: 200})
	drain(s)
}

func drain(s *h2.Stream) {
	buf := make([]byte, 4096)
	s.Notify(func() {
		for {
			switch _, err := s.Read(buf); {
			case err == nil:
			case err == io.EOF:
				_ = s.CloseWrite()
				s.Close()
				return
			case s.Failure() != nil:
				s.Close()
				return
			default:
				return
			}
		}
	})
}

func swallowHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect {
		w.WriteHeader(400)
		return
	}
	w.WriteHeader(200)
	_ = http.NewResponseController(w).Flush()
	_, _ = io.Copy(io.Discard, r.Body)
}

// compareClients sends the same frames to our client and to x/net's, each with
// two streams open.
func compareClients(t *testing.T, s *script) {
	loop := splicetest.NewLoop()
	defer loop.Close()
	ours, end := newEndpoint(loop, "ours")
	var conn *h2.Conn
	loop.Do(func() {
		conn = h2.New(loop, end, &h2.Config{Client: true, PingEvery: -1, InitialWindow: 65535, MaxWindow: 65535, ConnWindow: 65535, MaxFrameSize: 16384})
		for range 2 {
			var st *h2.Stream
			st, _ = conn.Open(h2.Request{Authority: "a:80"}, func(r h2.Response, err error) {
				if err != nil {
					st.Close()
					return
				}
				drain(st)
			})
		}
	})
	theirs, nc := newForeign(loop, "x/net")
	cc, err := foreign{frame: 16384}.client(nc)
	if err != nil {
		t.Fatal(err)
	}
	body, feed := io.Pipe()
	for range 2 {
		go func() {
			resp, err := cc.RoundTrip(&http.Request{Method: http.MethodConnect, URL: &url.URL{Host: "a:80"}, Host: "a:80", Body: io.NopCloser(body), ContentLength: -1, Header: http.Header{}})
			if err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		}()
		synctest.Wait()
	}
	compare(t, s, true, ours, theirs, nil)
	feed.CloseWithError(io.ErrClosedPipe)
	loop.Do(func() { conn.Close(nil) })
	cc.Close()
	ours.conn.Close()
	theirs.conn.Close()
	synctest.Wait()
}

// compare feeds frames until one is judged badly.
func compare(t *testing.T, s *script, clients bool, ours, theirs *endpoint, first []byte) {
	t.Helper()
	first = append(first, rawFrame{kind: http2.FrameSettings, length: -1}.bytes()...)
	if s.one(16) {
		first = s.bytes(9)
	}
	if o, x := ours.feed(first), theirs.feed(first); o < x {
		t.Errorf("x/net takes the beginning %q for a %v, we for %v", first, x, o)
		return
	} else if o != fine {
		return
	}
	j := judged{client: clients, gone: make(map[uint32]bool), ended: make(map[uint32]bool)}
	for s.more() {
		j.frame = s.frame(clients)
		b := j.frame.bytes()
		o, x := ours.feed(b), theirs.feed(b)
		if o < x && j.frame.leavesBlock() {
			// "A receiver reassembles the field block by concatenating its fragments"
			// (4.3): we judge it then.
			o = ours.feed(rawFrame{kind: http2.FrameContinuation, flags: http2.FlagContinuationEndHeaders, id: j.frame.id, length: -1}.bytes())
		}
		if j.refused, j.ours = ours.refused, o; o < x && !isAllowed(&j) {
			t.Errorf("x/net takes %v for a %v, we for %v; before it %v", j.frame, x, o, j.before)
			return
		}
		if o != x || o == connError || !clients && ours.refused != theirs.refused {
			return // They are of different minds about what comes from now on.
		}
		j.note(o)
		j.before = append(j.before, j.frame)
		if j.frame.length > len(j.frame.payload) {
			return // The rest of the frame does not come.
		}
	}
}

func isAllowed(j *judged) bool {
	for _, d := range differences {
		if d.frames(j) {
			return true
		}
	}
	return false
}

// note remembers what a frame has opened and ended.
func (j *judged) note(v verdict) {
	if j.frame.kind == http2.FrameRSTStream || v == streamError {
		j.gone[j.frame.id] = true
	}
	if (j.frame.kind == http2.FrameData || j.frame.kind == http2.FrameHeaders) && j.frame.flags.Has(http2.FlagDataEndStream) {
		j.ended[j.frame.id] = true
	}
	if f := j.frame; f.kind == http2.FrameHeaders && f.id >= j.highest {
		j.highest = f.id
		j.malformed = j.malformed || v == streamError
	}
}
