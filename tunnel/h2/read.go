package h2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

const (
	// readBudget is how much a connection reads before others get their turn.
	readBudget = 256 << 10
	// maxControl bounds the payload of SETTINGS and the like; of GOAWAY's
	// debug data no more is kept.
	maxControl = 6 * maxSettings
)

// inputState says what the next bytes are.
type inputState uint8

const (
	wantHead    inputState = iota
	wantPreface            // the client's, before anything else
	wantPadLen             // the first byte of padded DATA
	wantData
	wantSkip  // padding or payload that nobody wants
	wantFrame // the payload of a control frame
	wantBlock // the payload of HEADERS or CONTINUATION
)

// A frameHead is the head of a frame (RFC 9113 section 4.1).
type frameHead struct {
	kind  http2.FrameType
	flags http2.Flags
	id    uint32
	n     int // length of the payload
}

func (f frameHead) has(flag http2.Flags) bool { return f.flags.Has(flag) }

// input is the state of the parser between passes.
type input struct {
	task  splice.Task // reads on after the budget was used
	state inputState
	head  [len(http2.ClientPreface)]byte
	headN int

	frame frameHead
	left  int     // of the payload, padding not counted
	pad   int     // padding that follows
	cur   *Stream // whose DATA it is, nil if nobody's
	bytes []byte  // control frame payload so far

	block         []byte // HEADERS and CONTINUATION, with heads, until END_HEADERS
	blockID       uint32 // nonzero while a block is open
	continuations int
}

// drop frees what an ended connection needs no more.
func (in *input) drop() { in.cur, in.bytes, in.block = nil, nil, nil }

// gatherMax is how much DATA of a stream is handed over at once: what fits a
// TCP super-segment, as bulkFrame does. Behind it the next frame's head fits.
const gatherMax = bulkFrame

var _ [splice.ScratchSize - gatherMax - frameHeadLen]byte // which must not be negative

// A gather is DATA of one stream in the loop's scratch buffer. It does not
// outlive a pass.
type gather struct {
	c   *Conn
	buf []byte
	n   int
	s   *Stream
	end bool // END_STREAM came
}

// flush hands over what was gathered.
func (g *gather) flush() {
	s, n, end := g.s, g.n, g.end
	g.s, g.n, g.end = nil, 0, false
	if s == nil {
		return
	}
	s.deliver(g.buf[:n])
	if end {
		s.receivedEnd()
	}
}

// readPass reads until t has no more or the budget is used.
func (c *Conn) readPass() {
	if c.state != stateOpen {
		return
	}
	g := gather{c: c, buf: c.loop.Scratch()}
	for budget := readBudget; budget > 0; {
		n, err := c.readStep(&g)
		budget -= n
		if err == nil && c.state == stateOpen {
			continue
		}
		g.flush()
		switch {
		case c.state != stateOpen || errors.Is(err, splice.ErrAgain):
		case err == io.EOF:
			c.eof()
		default:
			c.lost(err)
		}
		return
	}
	g.flush()
	c.loop.Soon(&c.in.task)
}

// readStep reads once from t and acts on what came.
func (c *Conn) readStep(g *gather) (n int, err error) {
	in := &c.in
	switch in.state {
	case wantHead, wantPreface:
		return c.readHead(g)
	case wantData:
		return c.readData(g)
	case wantPadLen:
		return c.readPadLen(g)
	}
	buf := g.buf[g.n:]
	n, err = c.t.Read(buf[:min(in.left, len(buf))])
	if n == 0 {
		return 0, err
	}
	c.ping.alive = true
	in.left -= n
	p := buf[:n]
	switch in.state {
	case wantSkip:
		if in.frame.kind == http2.FrameData && in.cur == nil {
			c.credit(n)
		}
	case wantFrame:
		in.bytes = append(in.bytes, p[:min(n, maxControl-len(in.bytes))]...)
	case wantBlock:
		in.block = append(in.block, p...)
	}
	if in.left == 0 {
		c.endFrame(g)
	}
	return n, nil
}

func (c *Conn) readHead(g *gather) (n int, err error) {
	in := &c.in
	want := frameHeadLen
	if in.state == wantPreface {
		want = len(http2.ClientPreface)
	}
	n, err = c.t.Read(in.head[in.headN:want])
	if n == 0 {
		return 0, err
	}
	c.ping.alive = true
	in.headN += n
	if in.state == wantPreface && !bytes.Equal(in.head[:in.headN], clientPreface[:in.headN]) {
		c.fail(&ConnError{Code: CodeProtocol, Detail: "no preface"})
		return n, nil
	}
	if in.headN == want {
		c.gotHead(g)
	}
	return n, nil
}

// gotHead acts on a whole preface or frame head.
func (c *Conn) gotHead(g *gather) {
	in := &c.in
	in.headN = 0
	if in.state == wantPreface {
		in.state = wantHead
		return
	}
	h := in.head[:frameHeadLen]
	in.frame = frameHead{
		n:     int(h[0])<<16 | int(h[1])<<8 | int(h[2]),
		kind:  http2.FrameType(h[3]),
		flags: http2.Flags(h[4]),
		id:    binary.BigEndian.Uint32(h[5:]) & (1<<31 - 1),
	}
	if in.frame.kind != http2.FrameData || g.end || g.s != nil && g.s.id != in.frame.id {
		g.flush()
	}
	if c.state == stateOpen {
		c.beginFrame(g)
	}
}

// readData reads payload behind what is gathered, and with the end of a frame
// the head of the next.
func (c *Conn) readData(g *gather) (n int, err error) {
	in := &c.in
	if g.n == gatherMax {
		g.flush()
		if c.state != stateOpen {
			return 0, nil
		}
	}
	if g.s == nil {
		g.s = in.cur
	}
	want := min(in.left, gatherMax-g.n)
	ahead := 0
	if want == in.left && in.pad == 0 {
		ahead = frameHeadLen
	}
	n, err = c.t.Read(g.buf[g.n : g.n+want+ahead])
	if n == 0 {
		return 0, err
	}
	c.ping.alive = true
	data := min(n, want)
	if n > want {
		in.headN = copy(in.head[:], g.buf[g.n+want:g.n+n])
	}
	g.n += data
	in.left -= data
	c.stats.DataReceived += uint64(data)
	if in.left > 0 {
		return n, nil
	}
	c.endFrame(g)
	if in.headN == frameHeadLen && c.state == stateOpen {
		c.gotHead(g)
	}
	return n, nil
}

func (c *Conn) readPadLen(g *gather) (n int, err error) {
	in := &c.in
	n, err = c.t.Read(in.head[:1])
	if n == 0 {
		return 0, err
	}
	in.left--
	in.pad = int(in.head[0])
	// "If the length of the padding is the length of the frame payload or
	// greater, the recipient MUST treat this as a connection error".
	if in.pad > in.left {
		c.fail(&ConnError{Code: CodeProtocol, Detail: "padding too long"})
		return n, nil
	}
	in.left -= in.pad
	if in.cur != nil {
		in.cur.took(1)
	}
	if in.left == 0 {
		if !in.frame.has(http2.FlagDataEndStream) && c.tooMany(LimitEmptyData) {
			return n, nil
		}
		c.endFrame(g)
		return n, nil
	}
	in.state = wantData
	return n, nil
}

// endFrame runs when the payload of a frame is complete.
func (c *Conn) endFrame(g *gather) {
	in := &c.in
	state := in.state
	if in.pad > 0 {
		if in.cur != nil {
			in.cur.took(in.pad)
		}
		in.state, in.left, in.pad = wantSkip, in.pad, 0
		return
	}
	in.state = wantHead
	switch {
	case state == wantFrame:
		f := in.frame
		c.onFrame(f, in.bytes)
		in.bytes = in.bytes[:0]
	case state == wantBlock:
		if in.frame.has(http2.FlagHeadersEndHeaders) {
			c.endBlock()
		}
	case in.cur != nil:
		s := in.cur
		in.cur = nil
		if in.frame.has(http2.FlagDataEndStream) {
			g.s, g.end = s, true
		}
	}
}

// beginFrame acts on a frame's head.
func (c *Conn) beginFrame(g *gather) {
	in := &c.in
	f := in.frame
	if f.n > int(c.cfg.MaxFrameSize) {
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "frame too long"})
		return
	}
	if !c.inOrder(f) {
		return
	}
	in.left, in.pad, in.cur = f.n, 0, nil
	switch f.kind {
	case http2.FrameData:
		c.beginData(g)
		return
	case http2.FrameHeaders, http2.FrameContinuation:
		c.beginBlock()
	case http2.FrameSettings, http2.FramePing, http2.FrameWindowUpdate, http2.FrameRSTStream:
		if f.n > maxControl {
			c.fail(&ConnError{Code: CodeFrameSize, Detail: "control frame too long"})
			return
		}
		in.state = wantFrame
	case http2.FrameGoAway:
		in.state = wantFrame
	case http2.FramePushPromise:
		c.fail(&ConnError{Code: CodeProtocol, Detail: "push promise"})
		return
	case http2.FramePriority:
		c.beginPriority(f)
	default:
		// "Implementations MUST ignore and discard frames of unknown types."
		in.state = wantSkip
		c.ignored()
	}
	if in.left == 0 && c.state == stateOpen {
		c.endFrame(g)
	}
}

// inOrder checks what may follow what, and which frames belong to a stream.
func (c *Conn) inOrder(f frameHead) bool {
	in := &c.in
	detail := ""
	switch {
	case !c.setup.gotSettings && (f.kind != http2.FrameSettings || f.has(http2.FlagSettingsAck)):
		detail = "first frame is not settings"
	case in.blockID != 0 && (f.kind != http2.FrameContinuation || f.id != in.blockID):
		detail = "header block interrupted"
	case in.blockID == 0 && f.kind == http2.FrameContinuation:
		detail = "continuation without headers"
	}
	switch f.kind {
	case http2.FrameSettings, http2.FramePing, http2.FrameGoAway:
		if f.id != 0 {
			detail = "stream id on a connection frame"
		}
	case http2.FrameData, http2.FrameHeaders, http2.FramePriority, http2.FrameRSTStream, http2.FrameContinuation, http2.FramePushPromise:
		if f.id == 0 {
			detail = "no stream id on a stream frame"
		}
	}
	if detail != "" {
		c.fail(&ConnError{Code: CodeProtocol, Detail: detail})
	}
	return detail == ""
}

// beginData checks a DATA frame against the windows and the stream's state.
func (c *Conn) beginData(g *gather) {
	in := &c.in
	f := in.frame
	if int64(f.n) > c.recv.win {
		c.fail(&ConnError{Code: CodeFlowControl, Detail: "connection window exceeded"})
		return
	}
	c.recv.win -= int64(f.n)
	s := g.s
	if s == nil || s.id != f.id {
		s = c.streams[f.id]
	}
	if s == nil || !s.open {
		c.onOtherStream(f, f.n)
	} else {
		c.admitData(s, f)
	}
	if c.state != stateOpen {
		return
	}
	in.state = wantData
	switch {
	case f.has(http2.FlagDataPadded) && f.n == 0:
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "padded frame without length"})
	case in.cur == nil:
		in.state = wantSkip
		if f.n == 0 {
			in.state = wantHead
		}
	case f.has(http2.FlagDataPadded):
		in.state = wantPadLen
	case f.n == 0:
		if f.has(http2.FlagDataEndStream) || !c.tooMany(LimitEmptyData) {
			c.endFrame(g)
		}
	}
}

// admitData sets the frame's stream, if it may have the frame.
func (c *Conn) admitData(s *Stream, f frameHead) {
	switch {
	case s.gotEnd:
		s.fault(CodeStreamClosed, "data after end of stream")
	case c.cfg.Client && !s.answered:
		s.fault(CodeProtocol, "data before response")
	case int64(f.n) > s.recv.win:
		s.fault(CodeFlowControl, "stream window exceeded")
	default:
		s.recv.win -= int64(f.n)
		c.in.cur = s
	}
}

func (c *Conn) beginPriority(f frameHead) {
	c.in.state = wantSkip
	// "A PRIORITY frame with a length other than 5 octets MUST be treated as
	// a stream error of type FRAME_SIZE_ERROR."
	if s := c.streams[f.id]; f.n != 5 && s != nil {
		s.fault(CodeFrameSize, "priority length")
	}
	c.ignored()
}

// onFrame handles a control frame.
func (c *Conn) onFrame(f frameHead, p []byte) {
	switch f.kind {
	case http2.FrameSettings:
		c.onSettings(f, p)
	case http2.FramePing:
		c.onPing(f, p)
	case http2.FrameWindowUpdate:
		c.onWindowUpdate(f, p)
	case http2.FrameRSTStream:
		c.onReset(f, p)
	case http2.FrameGoAway:
		c.onGoAway(p)
	}
}

func (c *Conn) onReset(f frameHead, p []byte) {
	if len(p) != 4 {
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "reset length"})
		return
	}
	c.stats.ResetsReceived++
	s := c.streams[f.id]
	if s == nil {
		c.onOtherStream(f, 0)
		return
	}
	s.resetByPeer(Code(be32(p)))
}

// onOtherStream handles a frame with n bytes of payload for a stream that is
// not open: it is ignored if it may have crossed a reset of ours.
func (c *Conn) onOtherStream(f frameHead, n int) {
	switch {
	case f.id > c.lastID || f.id%2 == 0:
		c.fail(&ConnError{Code: CodeProtocol, Detail: "frame on an idle stream"})
	case f.kind == http2.FrameWindowUpdate || f.kind == http2.FrameRSTStream:
		// Both may arrive a while after the end of a stream.
		c.ignored()
	case !c.isLate(n):
		c.fail(&ConnError{Code: CodeStreamClosed, Detail: "frame on a closed stream"})
	default:
		c.stats.FramesIgnored++
	}
}

func be32(p []byte) uint32 { return binary.BigEndian.Uint32(p) }
