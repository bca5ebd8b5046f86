package h2

import "golang.org/x/net/http2"

// Open sends a CONNECT. onResponse runs exactly once, never before Open has
// returned: with the answer, or with the error that ended the stream before
// one came. It need not wait for the peer's SETTINGS.
// The error is ErrNoSlot, ErrGoingAway, ErrHeaderList or what ended the Conn.
func (c *Conn) Open(r Request, onResponse func(Response, error)) (*Stream, error) {
	if err := c.openable(); err != nil {
		return nil, err
	}
	if c.Slots() == 0 {
		return nil, ErrNoSlot
	}
	pseudo := []Header{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: r.Authority}}
	if err := validHeaders(r.Headers); err != nil {
		return nil, err
	}
	if err := validHeaders([]Header{{Name: "authority", Value: r.Authority}}); err != nil {
		return nil, err
	}
	if listSize(pseudo)+listSize(r.Headers) > c.peer.maxHeaderList {
		return nil, ErrHeaderList
	}
	if c.lastID == 0 {
		c.lastID = 1
	} else {
		c.lastID += 2
	}
	s := c.newStream(c.lastID)
	s.onResponse = onResponse
	c.writeHeaders(s.id, false, pseudo, r.Headers)
	return s, nil
}

// openable says why no stream can be opened on this connection, now or ever.
func (c *Conn) openable() error {
	switch {
	case c.state != stateOpen:
		return c.Err()
	case !c.cfg.Client || c.away.sent || c.away.received || c.lastID >= 1<<31-1:
		return ErrGoingAway
	case c.queued() > maxPending+bulkFrame+c.cfg.Limits.QueuedControls/2:
		return ErrNoSlot
	}
	return nil
}

// onResponse handles the header block of a response.
func (c *Conn) onResponse(m *http2.MetaHeadersFrame) {
	s := c.streams[m.StreamID]
	if s == nil {
		c.onOtherStream(frameHead{kind: http2.FrameHeaders, id: m.StreamID}, 0)
		return
	}
	if s.gotEnd {
		s.fault(CodeStreamClosed, "headers after end of stream")
		return
	}
	if s.answered {
		// "Frame types other than DATA or stream management frames MUST NOT be
		// sent on a connected stream". Only a refusal may have trailers.
		if s.connected || !m.StreamEnded() || len(m.PseudoFields()) > 0 {
			s.fault(CodeProtocol, "headers on a connected stream")
			return
		}
		s.receivedEnd()
		return
	}
	status := statusCode(m.PseudoValue("status"))
	switch {
	case m.Truncated:
		s.fault(CodeCancel, "response headers too large")
	case status == 0 || status == 101 || len(m.PseudoFields()) != 1 || connectionSpecific(m.RegularFields()):
		s.fault(CodeProtocol, "malformed response")
	case status < 200:
		// "An interim response with END_STREAM is malformed."
		if m.StreamEnded() {
			s.fault(CodeProtocol, "interim response ends the stream")
			return
		}
		c.ignored()
	default:
		s.answeredBy(Response{Status: status, Headers: toHeaders(m.RegularFields()), EndStream: m.StreamEnded()})
	}
}

// answeredBy hands the response over.
func (s *Stream) answeredBy(r Response) {
	s.answered, s.connected = true, r.Status < 300
	f := s.onResponse
	s.onResponse = nil
	if r.EndStream {
		s.receivedEnd()
	}
	if f != nil {
		f(r, nil)
	}
}
