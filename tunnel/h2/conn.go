package h2

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

// A Conn is an HTTP/2 connection in either role.
type Conn struct {
	// Set by New, read-only after.
	loop splice.Loop
	t    splice.End
	cfg  Config

	state connState
	err   error // what ended it

	in   input
	out  output
	hdrs headerCodec
	peer peerSettings
	recv recvFlow // what the peer may send on all streams together
	send int64    // what we may

	streams map[uint32]*Stream
	lastID  uint32 // the highest stream opened, by whichever side opens them
	acted   uint32 // the highest that a server did not refuse
	zombies int    // reset by the peer before the user answered or gave up

	setup  setup
	ping   pinger
	away   goAway
	abuse  abuse
	linger linger
	stats  Stats
}

// Stats count what happened on a Conn.
type Stats struct {
	StreamsOpened  uint64 // by either side
	StreamsRefused uint64 // of the peer, with REFUSED_STREAM
	BadRequests    uint64 // of the peer, answered 400 or 431, or reset as malformed
	ResetsSent     uint64
	ResetsReceived uint64
	DataSent       uint64 // bytes of DATA payload
	DataReceived   uint64
	DataKept       int // bytes received that nobody has taken yet, now
	PingsSent      uint64
	FramesIgnored  uint64 // without effect, or of an unknown type
}

type connState uint8

const (
	stateOpen   connState = iota
	stateLinger           // ended; the peer may still read our last frames
	stateClosed           // t has been given back
)

// lingerTime and lingerBytes bound how long an ended connection waits for the
// peer to close, reading what it still sends: closing with unread bytes would
// be a TCP reset, which can overtake our GOAWAY.
const (
	lingerTime  = time.Second
	lingerBytes = 1 << 20
)

type linger struct {
	closedWrite bool
	eof         bool
	read        int
	stop        func()
	endTask     splice.Task // runs OnClose
}

// setup is the wait for the peer's SETTINGS and for the answer to ours.
type setup struct {
	gotSettings bool
	gotAck      bool
	sentAt      time.Time
	stop        func()
}

// New starts a connection on t, which it owns from now on: it sends the
// client's preface, if it is one, and SETTINGS. t must not use Loop.Scratch
// within Read, which is called with a part of it.
func New(loop splice.Loop, t splice.End, cfg *Config) *Conn {
	c := &Conn{
		loop:    loop,
		t:       t,
		cfg:     cfg.withDefaults(),
		peer:    defaultPeerSettings,
		send:    initialWindow,
		streams: make(map[uint32]*Stream),
	}
	c.recv = recvFlow{win: initialWindow, size: int64(c.cfg.ConnWindow), initial: int64(c.cfg.ConnWindow), max: int64(c.cfg.ConnWindow)}
	c.abuse.limits = c.cfg.Limits
	c.hdrs.init(c)
	c.in.task.Run = c.readPass
	c.out.task.Run = c.lastTask
	c.out.turn = 1
	c.linger.endTask.Run = c.runOnClose
	if !c.cfg.Client {
		c.in.state = wantPreface
	}
	c.sendSetup()
	c.schedulePing()
	t.Notify(c.onReady)
	return c
}

// sendSetup sends the preface, SETTINGS and the connection's window.
func (c *Conn) sendSetup() {
	if c.cfg.Client {
		c.appendBytes(clientPreface)
	}
	c.check(c.hdrs.wr.WriteSettings(c.cfg.settings()...))
	if inc := c.recv.size - c.recv.win; inc > 0 {
		c.recv.win = c.recv.size
		c.check(c.hdrs.wr.WriteWindowUpdate(0, uint32(inc)))
	}
	c.setup.sentAt = time.Now()
	c.setup.stop = c.loop.AfterFunc(c.cfg.SetupTimeout, func() {
		c.fail(&ConnError{Code: CodeSettingsTimeout, Detail: "no settings in time", cause: ErrSetupTimeout})
	})
}

// Slots is how many more streams Open would allow now.
func (c *Conn) Slots() int {
	if c.openable() != nil {
		return 0
	}
	return max(0, int(min(c.cfg.MaxStreams, c.peer.maxStreams))-len(c.streams))
}

// Streams is how many streams are open.
func (c *Conn) Streams() int { return len(c.streams) }

// Stats returns what was counted so far.
func (c *Conn) Stats() Stats { return c.stats }

// Err is nil while the Conn lives, then what ended it: ErrClosed if that was
// graceful.
func (c *Conn) Err() error {
	switch {
	case c.state == stateOpen:
		return nil
	case c.err == nil:
		return ErrClosed
	}
	return c.err
}

// Close ends the Conn at once and resets every stream. The peer is told by a
// GOAWAY with the code of a *ConnError in err, else NO_ERROR. OnClose gets err.
func (c *Conn) Close(err error) {
	if c.state != stateOpen {
		return
	}
	code := CodeNo
	if ce, ok := errors.AsType[*ConnError](err); ok {
		code = ce.Code
	}
	c.end(err, code)
}

// fail ends the connection for a fault of the peer.
func (c *Conn) fail(e *ConnError) {
	if c.state == stateOpen {
		c.end(e, e.Code)
	}
}

// end tells the peer, resets what is open and starts to linger.
func (c *Conn) end(err error, code Code) {
	c.writeGoAway(c.lastPeerStream(), code)
	c.finish(err)
	c.lingerStep()
}

// lost ends the connection because t did.
func (c *Conn) lost(err error) {
	if err == nil {
		err = io.ErrShortWrite
	}
	switch c.state {
	case stateOpen:
		if c.away.remoteErr != nil {
			err = c.away.remoteErr
		}
		c.finish(fmt.Errorf("%w: %w", ErrConnLost, err))
	case stateClosed:
		return
	}
	c.release(err)
}

// finish makes the connection unusable: c.err is set, the streams have ended,
// timers are stopped and OnClose will run.
func (c *Conn) finish(err error) {
	c.state, c.err = stateLinger, err
	c.setup.end()
	c.ping.end()
	c.away.end()
	cause := err
	if cause == nil {
		cause = ErrClosed
	}
	for _, s := range c.streams {
		s.terminate(&lostError{cause: cause})
	}
	c.out.waiters = nil
	c.in.drop()
	c.loop.Soon(&c.linger.endTask)
	c.linger.stop = c.loop.AfterFunc(lingerTime, func() { c.release(ErrClosed) })
}

func (c *Conn) runOnClose() {
	if c.cfg.OnClose != nil {
		c.cfg.OnClose(c.err)
	}
}

// lingerStep sends what is queued, closes our side and waits for the peer's.
func (c *Conn) lingerStep() {
	if c.state != stateLinger {
		return
	}
	c.flush()
	if c.state != stateLinger || c.queued() > 0 {
		return
	}
	if !c.linger.closedWrite {
		c.linger.closedWrite = true
		if err := c.t.CloseWrite(); err != nil {
			c.release(err)
			return
		}
	}
	buf := c.loop.Scratch()
	for !c.linger.eof {
		n, err := c.t.Read(buf)
		c.linger.read += n
		switch {
		case err == io.EOF:
			c.linger.eof = true
		case errors.Is(err, splice.ErrAgain) && c.linger.read < lingerBytes:
			return
		case err != nil || c.linger.read >= lingerBytes:
			c.release(err)
			return
		}
	}
	c.release(nil)
}

// release gives t back. Unless both sides were closed it is reset.
func (c *Conn) release(err error) {
	if c.state == stateClosed {
		return
	}
	c.state = stateClosed
	if c.linger.stop != nil {
		c.linger.stop()
	}
	c.dropOutput()
	if err != nil {
		c.t.Reset(err)
	}
	c.t.Close()
}

// onReady runs when t may be read or written again.
func (c *Conn) onReady() {
	wasBlocked := c.out.blocked
	c.out.blocked = false
	switch c.state {
	case stateOpen:
		if wasBlocked {
			c.flush()
			c.wakeWriters()
			c.flushLater()
		}
		c.readPass()
	case stateLinger:
		c.lingerStep()
	}
}

// eof runs when the peer has closed its side of t.
func (c *Conn) eof() {
	c.linger.eof = true
	var cause error
	switch {
	case c.away.remoteErr != nil:
		cause = c.away.remoteErr
	case len(c.streams) > 0 || c.in.headN > 0 || c.in.state != wantHead:
		cause = fmt.Errorf("%w: %w", ErrConnLost, io.ErrUnexpectedEOF)
	}
	c.finish(cause)
	c.lingerStep()
}

// check turns the error of a write to memory into the failure it would be.
func (c *Conn) check(err error) {
	if err != nil {
		c.fail(&ConnError{Code: CodeInternal, Detail: "frame not writable", cause: err})
	}
}

func (s *setup) end() {
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

var clientPreface = []byte(http2.ClientPreface)
