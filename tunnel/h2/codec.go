package h2

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// headerCodec turns header lists into frames and back, and writes the other
// control frames.
type headerCodec struct {
	wr  *http2.Framer // writes to the output buffer
	enc *hpack.Encoder
	buf bytes.Buffer // what enc writes

	rd  *http2.Framer // reads whole header blocks from src
	src bytes.Reader
}

func (h *headerCodec) init(c *Conn) {
	h.wr = http2.NewFramer(frameWriter{c}, nil)
	h.enc = hpack.NewEncoder(&h.buf)
	h.newReader(&c.cfg, hpack.NewDecoder(headerTableSize, nil))
}

// newReader makes the Framer that reads header blocks. It keeps a buffer of
// the size of the largest.
func (h *headerCodec) newReader(cfg *Config, dec *hpack.Decoder) {
	h.rd = http2.NewFramer(nil, &h.src)
	h.rd.SetMaxReadFrameSize(cfg.MaxFrameSize)
	h.rd.ReadMetaHeaders = dec
	h.rd.MaxHeaderListSize = cfg.MaxHeaderList
}

// validHeaders guards against what a caller put into a value.
func validHeaders(hs []Header) error {
	for _, h := range hs {
		if !httpguts.ValidHeaderFieldName(h.Name) || strings.ToLower(h.Name) != h.Name {
			return fmt.Errorf("h2: bad header name %q", h.Name)
		}
		if !httpguts.ValidHeaderFieldValue(h.Value) {
			return fmt.Errorf("h2: bad value of header %s", h.Name)
		}
	}
	return nil
}

// listSize is the size of a header list (RFC 9113 section 6.5.2).
func listSize(hs []Header) (n uint32) {
	for _, h := range hs {
		n += hpack.HeaderField{Name: h.Name, Value: h.Value}.Size()
	}
	return n
}

// writeHeaders sends a header block for stream id.
func (c *Conn) writeHeaders(id uint32, end bool, pseudo, headers []Header) {
	h := &c.hdrs
	h.buf.Reset()
	for _, list := range [...][]Header{pseudo, headers} {
		for _, f := range list {
			c.check(h.enc.WriteField(hpack.HeaderField{Name: f.Name, Value: f.Value, Sensitive: f.Once}))
		}
	}
	block := h.buf.Bytes()
	for first := true; first || len(block) > 0; first = false {
		frag := block[:min(len(block), int(c.peer.maxFrame))]
		block = block[len(frag):]
		if first {
			c.check(h.wr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: frag, EndStream: end, EndHeaders: len(block) == 0}))
			continue
		}
		c.check(h.wr.WriteContinuation(id, len(block) == 0, frag))
	}
}

// beginBlock prepares for the payload of HEADERS or CONTINUATION.
func (c *Conn) beginBlock() {
	in := &c.in
	f := in.frame
	if f.kind == http2.FrameHeaders {
		in.block, in.continuations = in.block[:0], 0
	} else if in.continuations++; in.continuations > c.cfg.Limits.Continuations {
		c.overLimit(LimitContinuations)
		return
	}
	if len(in.block)+f.n > blockFactor*int(c.cfg.MaxHeaderList) {
		c.overLimit(LimitHeaderBlock)
		return
	}
	in.blockID = f.id
	in.state = wantBlock
	in.block = append(in.block, in.head[:frameHeadLen]...)
}

// endBlock decodes a whole header block. It has to be, whatever becomes of the
// stream: the decoder's state belongs to the connection.
func (c *Conn) endBlock() {
	in, h := &c.in, &c.hdrs
	id := in.blockID
	in.blockID = 0
	h.src.Reset(in.block)
	frame, err := h.rd.ReadFrame()
	if cap(in.block) > smallChunk {
		in.block = nil
		defer h.newReader(&c.cfg, h.rd.ReadMetaHeaders)
	}
	switch e := err.(type) {
	case nil:
	case http2.StreamError:
		if e.Cause == nil {
			// Padding longer than the frame: the block was not decoded.
			c.fail(&ConnError{Code: CodeProtocol, Detail: "bad headers frame"})
			return
		}
		c.malformed(id, "malformed headers")
		return
	case http2.ConnectionError:
		c.fail(&ConnError{Code: Code(e), Detail: "bad header block"})
		return
	default:
		c.fail(&ConnError{Code: CodeProtocol, Detail: "bad headers frame", cause: err})
		return
	}
	meta, ok := frame.(*http2.MetaHeadersFrame)
	if !ok {
		c.fail(&ConnError{Code: CodeInternal, Detail: "no header frame"})
		return
	}
	if c.cfg.Client {
		c.onResponse(meta)
	} else {
		c.onRequest(meta)
	}
}

// malformed resets a stream whose header block was decoded but is not valid.
func (c *Conn) malformed(id uint32, detail string) {
	s := c.streams[id]
	if s == nil && !c.cfg.Client {
		if s = c.admit(id); s == nil {
			return
		}
		s.answered = true // nobody works for it
		c.stats.BadRequests++
	}
	if s == nil {
		c.onOtherStream(frameHead{kind: http2.FrameHeaders, id: id}, 0)
		return
	}
	s.fault(CodeProtocol, detail)
}

// connectionSpecific header fields make a message malformed (RFC 9113 section
// 8.2.2).
func connectionSpecific(fields []hpack.HeaderField) bool {
	for _, f := range fields {
		switch f.Name {
		case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
			return true
		case "te":
			return f.Value != "trailers"
		}
	}
	return false
}

func hasPseudo(m *http2.MetaHeadersFrame, name string) bool {
	for _, f := range m.PseudoFields() {
		if f.Name == name {
			return true
		}
	}
	return false
}

func toHeaders(fields []hpack.HeaderField) []Header {
	hs := make([]Header, len(fields))
	for i, f := range fields {
		hs[i] = Header{Name: f.Name, Value: f.Value, Once: f.Sensitive}
	}
	return hs
}

// statusCode parses :status, 0 if it is none.
func statusCode(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil || len(s) != 3 || n < 100 {
		return 0
	}
	return n
}
