package h2

import (
	"errors"
	"io"
	"slices"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

// A Stream is one CONNECT.
type Stream struct {
	// Set when it is opened, read-only after.
	c  *Conn
	id uint32

	// How it stands. A stream is open, and in Conn.streams, until both ends
	// have been sent and received, or err is set.
	open      bool
	answered  bool // a response was sent or received
	gotEnd    bool // END_STREAM received
	sentEnd   bool
	connected bool // the response a client received was a success
	released  bool // by Close or Reset: the user is done with it
	zombie    bool // reset by the peer, counted in Conn.zombies
	err       error

	onResponse func(Response, error) // until it has run
	task       splice.Task           // runs onResponse with err, then ready
	ready      func()
	sink       func([]byte) int

	recv recvFlow
	kept queue // received, not taken

	send          int64 // what we may send
	reserved      bool  // between Reserve and Commit
	windowBlocked bool  // a write found send used up
	waiting       bool  // in Conn.out.waiters
	turn          uint64
	spent, grant  int  // bytes queued in that turn, and still set aside for it
	offered       int  // the room that Reserve gave last
	full          bool // all of it was used: there is probably more to come
}

var (
	_ splice.End      = (*Stream)(nil)
	_ splice.Reserver = (*Stream)(nil)
	_ splice.Pusher   = (*Stream)(nil)
	_ splice.Failer   = (*Stream)(nil)
)

// newStream registers a stream that was opened by either side.
func (c *Conn) newStream(id uint32) *Stream {
	size := int64(c.cfg.InitialWindow)
	s := &Stream{c: c, id: id, open: true, send: c.peer.window}
	s.recv = recvFlow{win: size, size: size, initial: size, max: int64(c.cfg.MaxWindow)}
	s.task.Run = s.run
	c.streams[id] = s
	c.stats.StreamsOpened++
	return s
}

// ID is the stream's number on its connection.
func (s *Stream) ID() uint32 { return s.id }

// Conn is the connection that carries the stream.
func (s *Stream) Conn() *Conn { return s.c }

// poke runs ready soon.
func (s *Stream) poke() { s.c.loop.Soon(&s.task) }

func (s *Stream) run() {
	if f := s.onResponse; f != nil && s.err != nil {
		s.onResponse = nil
		f(Response{}, s.err)
	}
	if s.ready != nil {
		s.ready()
	}
}

// Notify implements splice.End.
func (s *Stream) Notify(ready func()) {
	if s.released {
		return
	}
	s.ready = ready
	s.poke()
}

// Push implements splice.Pusher.
func (s *Stream) Push(sink func(p []byte) (n int)) {
	if s.released {
		return
	}
	s.sink = sink
	if s.kept.n > 0 {
		s.poke()
	}
}

// Read implements splice.End. A reset by the peer or the loss of the
// connection is an error that matches splice.ErrReset. What came before is
// still returned if the peer had ended its side already.
func (s *Stream) Read(p []byte) (int, error) {
	if s.released {
		return 0, ErrClosed
	}
	if s.kept.n > 0 && len(p) > 0 {
		n := s.kept.read(p)
		s.c.stats.DataKept -= n
		s.took(n)
		return n, nil
	}
	switch {
	case s.err != nil && !s.endedCleanly():
		return 0, s.err
	case s.gotEnd:
		return 0, io.EOF
	}
	return 0, splice.ErrAgain
}

// Failure implements splice.Failer.
func (s *Stream) Failure() error {
	if s.err == nil || s.endedCleanly() && s.sentEnd {
		return nil
	}
	return s.err
}

// endedCleanly is for a server that has answered in full and then asks for no
// more (RFC 9113 section 8.1).
func (s *Stream) endedCleanly() bool {
	se, ok := s.err.(*StreamError)
	return ok && s.gotEnd && se.Remote && se.Code == CodeNo
}

// deliver hands over what was received. p is valid during the call only.
func (s *Stream) deliver(p []byte) {
	if len(p) == 0 {
		return
	}
	taken := 0
	if s.sink != nil && s.kept.n == 0 && s.err == nil {
		taken = min(max(s.sink(p), 0), len(p))
	}
	rest := p[taken:]
	if s.released || s.err != nil {
		// Nobody will read it.
		s.c.credit(len(p))
		return
	}
	s.took(taken)
	if len(rest) == 0 {
		return
	}
	s.kept.write(rest)
	s.c.stats.DataKept += len(rest)
	if int64(s.kept.n) > s.recv.size/2 {
		s.recv.slow = true
	}
	if s.sink == nil {
		s.poke()
	}
}

// took gives n bytes back to the peer's windows.
func (s *Stream) took(n int) {
	s.c.credit(n)
	if s.c.state != stateOpen || !s.open || s.gotEnd || n == 0 {
		return
	}
	if inc := s.recv.take(n, s.c.ping.rtt); inc > 0 {
		s.c.check(s.c.hdrs.wr.WriteWindowUpdate(s.id, uint32(inc)))
	}
}

// receivedEnd runs when END_STREAM came and all before it was delivered.
func (s *Stream) receivedEnd() {
	if s.gotEnd || s.err != nil {
		return
	}
	s.gotEnd = true
	s.poke()
	s.maybeDone()
}

// maybeDone takes the stream off the connection once both sides have ended.
func (s *Stream) maybeDone() {
	if s.gotEnd && s.sentEnd {
		s.leave()
	}
}

// leave takes the stream off the connection.
func (s *Stream) leave() {
	if !s.open {
		return
	}
	s.open = false
	delete(s.c.streams, s.id)
	if s.waiting {
		s.waiting = false
		s.c.out.waiters = slices.DeleteFunc(s.c.out.waiters, func(w *Stream) bool { return w == s })
	}
	s.c.maybeFinish()
}

// terminate ends the stream with err, which the user finds on its next call.
func (s *Stream) terminate(err error) {
	if s.err != nil || !s.open {
		return
	}
	s.err = err
	if !s.gotEnd {
		s.dropKept()
	}
	s.poke()
	s.leave()
}

func (s *Stream) dropKept() {
	n := s.kept.n
	s.kept.drop()
	s.c.stats.DataKept -= n
	s.c.credit(n)
}

// windowOpened wakes a writer that waited for the stream's window.
func (s *Stream) windowOpened() {
	if s.windowBlocked && s.send > 0 {
		s.windowBlocked = false
		s.poke()
	}
}

// writeErr says why nothing can be written any more.
func (s *Stream) writeErr() error {
	switch {
	case s.err != nil:
		return s.err
	case s.released || s.sentEnd:
		return ErrClosed
	case !s.answered && !s.c.cfg.Client:
		return errUnanswered
	}
	return nil
}

// CloseWrite implements splice.End: a DATA frame without data and with
// END_STREAM.
func (s *Stream) CloseWrite() error {
	if s.sentEnd && s.err == nil {
		return nil
	}
	if err := s.writeErr(); err != nil {
		return err
	}
	var head [frameHeadLen]byte
	putFrameHead(head[:], 0, http2.FrameData, http2.FlagDataEndStream, s.id)
	s.c.appendBytes(head[:])
	s.sentEnd = true
	s.maybeDone()
	return nil
}

// Reset implements splice.End. It sends RST_STREAM with CONNECT_ERROR, with
// CANCEL if cause is ErrCancel, or with the code of a *StreamError in cause.
func (s *Stream) Reset(cause error) {
	code := CodeConnect
	if se, ok := errors.AsType[*StreamError](cause); ok && !se.Remote {
		code = se.Code
	} else if errors.Is(cause, ErrCancel) {
		code = CodeCancel
	}
	s.release(code)
}

// Close implements splice.End. With a direction still open it resets the
// stream with CANCEL.
func (s *Stream) Close() { s.release(CodeCancel) }

// release ends what is open with RST_STREAM and forgets the user.
func (s *Stream) release(code Code) {
	if s.released {
		return
	}
	s.released = true
	s.ready, s.sink = nil, nil
	s.buried()
	if s.open {
		s.sendReset(code)
		s.terminate(&StreamError{Code: code})
	}
	s.dropKept()
	if s.onResponse != nil {
		s.poke()
	}
}

// sendReset writes RST_STREAM and allows for what crosses it.
func (s *Stream) sendReset(code Code) {
	c := s.c
	if !s.gotEnd {
		c.expectLate(s.recv.win)
	}
	c.stats.ResetsSent++
	c.check(c.hdrs.wr.WriteRSTStream(s.id, http2.ErrCode(code)))
}

// fault resets the stream for a mistake of the peer's, which counts against
// it: streams that a peer makes us reset cost as much as those it resets.
func (s *Stream) fault(code Code, detail string) {
	s.sendReset(code)
	s.mourn()
	s.terminate(&StreamError{Code: code, Detail: detail})
	s.c.tooMany(LimitResets)
}

// resetByPeer handles RST_STREAM.
func (s *Stream) resetByPeer(code Code) {
	answered := s.answered
	s.mourn()
	s.terminate(&StreamError{Code: code, Remote: true})
	if !answered && !s.c.cfg.Client {
		s.c.tooMany(LimitResets)
	}
}

// mourn counts a stream that has ended while the server's user still works
// for it.
func (s *Stream) mourn() {
	if !s.c.cfg.Client && !s.answered && !s.released && !s.zombie {
		s.zombie = true
		s.c.zombies++
	}
}

// buried is the user's sign that it no longer works for the stream.
func (s *Stream) buried() {
	if s.zombie {
		s.zombie = false
		s.c.zombies--
	}
}
