package h2

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/net/http2"
)

var errUnanswered = errors.New("h2: write before response")

// Statuses that the package answers by itself.
const (
	statusBadRequest     = 400
	statusHeadersTooLong = 431
)

// onRequest handles the header block of a request.
func (c *Conn) onRequest(m *http2.MetaHeadersFrame) {
	if s := c.streams[m.StreamID]; s != nil {
		// "Frame types other than DATA or stream management frames (...) MUST
		// be treated as a stream error if received" on a connected stream.
		if s.gotEnd {
			s.fault(CodeStreamClosed, "headers after end of stream")
		} else {
			s.fault(CodeProtocol, "headers on a connected stream")
		}
		return
	}
	s := c.admit(m.StreamID)
	if s == nil {
		return
	}
	s.gotEnd = m.StreamEnded()
	authority := m.PseudoValue("authority")
	method := m.PseudoValue("method")
	hasTarget := hasPseudo(m, ":scheme") || hasPseudo(m, ":path")
	switch {
	case m.Truncated:
		c.refuse(s, statusHeadersTooLong)
	case method == "" || hasPseudo(m, ":status") || hasPseudo(m, ":protocol") || connectionSpecific(m.RegularFields()),
		method == "CONNECT" && hasTarget:
		c.stats.BadRequests++
		s.answered = true // nobody works for it
		s.fault(CodeProtocol, "malformed request")
	case method != "CONNECT" || authority == "":
		c.refuse(s, statusBadRequest)
	default:
		if c.cfg.OnStream == nil {
			c.refuse(s, statusBadRequest)
			return
		}
		c.cfg.OnStream(s, Request{Authority: authority, Headers: toHeaders(m.RegularFields())})
	}
}

// admit makes a stream of a new id, or refuses it.
func (c *Conn) admit(id uint32) *Stream {
	if id%2 == 0 {
		c.fail(&ConnError{Code: CodeProtocol, Detail: "even stream id"})
		return nil
	}
	if id <= c.lastID {
		c.onOtherStream(frameHead{kind: http2.FrameHeaders, id: id}, 0)
		return nil
	}
	c.lastID = id
	if c.away.final || len(c.streams)+c.zombies >= int(c.cfg.MaxStreams) {
		c.stats.StreamsRefused++
		c.stats.ResetsSent++
		c.expectLate(int64(c.cfg.InitialWindow))
		if !c.tooMany(LimitRefused) {
			c.check(c.hdrs.wr.WriteRSTStream(id, http2.ErrCodeRefusedStream))
		}
		return nil
	}
	c.acted = id
	return c.newStream(id)
}

// refuse answers a request that the user does not get to see.
func (c *Conn) refuse(s *Stream, status int) {
	c.stats.BadRequests++
	if err := s.Respond(Response{Status: status, EndStream: true}); err != nil {
		s.Reset(err)
	}
	s.Close()
	c.tooMany(LimitBadRequests)
}

// Respond answers the request, once. With EndStream, the usual refusal, the
// stream has ended, and only Close is left to be called.
func (s *Stream) Respond(r Response) error {
	s.buried()
	switch {
	case s.err != nil:
		return s.err
	case s.released:
		return ErrClosed
	case s.c.cfg.Client || s.answered:
		return errors.New("h2: response not wanted")
	case r.Status < 200 || r.Status > 599:
		return fmt.Errorf("h2: bad response status %d", r.Status)
	}
	if err := validHeaders(r.Headers); err != nil {
		return err
	}
	pseudo := []Header{{Name: ":status", Value: strconv.Itoa(r.Status)}}
	if listSize(pseudo)+listSize(r.Headers) > s.c.peer.maxHeaderList {
		return ErrHeaderList
	}
	s.answered = true
	s.c.writeHeaders(s.id, r.EndStream, pseudo, r.Headers)
	if !r.EndStream {
		return nil
	}
	s.sentEnd = true
	if s.gotEnd {
		s.leave()
		return nil
	}
	// The answer is complete; the rest of the request is not wanted.
	s.sendReset(CodeNo)
	s.terminate(&StreamError{Code: CodeNo})
	return nil
}
