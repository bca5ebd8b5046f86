package h2

import (
	"time"

	"golang.org/x/net/http2"
)

// goAwayWait bounds the time between the two GOAWAYs of a server, if the peer
// does not answer the PING between them.
const goAwayWait = time.Second

// goAway is how far the end of the connection has been announced.
type goAway struct {
	sent   bool // by us: the first, or the only one of a client
	final  bool // our last; streams above finalID are refused
	last   uint32
	pinged bool
	stop   func()

	received  bool
	remoteID  uint32
	remoteErr error // what the peer said was wrong
}

func (a *goAway) end() {
	if a.stop != nil {
		a.stop()
		a.stop = nil
	}
}

// GoAway lets the streams finish and takes no more; then the Conn ends.
// A server says so twice (RFC 9113 section 6.8): first without refusing what
// the client may have sent meanwhile, then, a round trip later, for good.
func (c *Conn) GoAway() {
	if c.state != stateOpen || c.away.sent {
		return
	}
	if c.cfg.Client {
		c.away.final = true
		c.writeGoAway(0, CodeNo)
		c.maybeFinish()
		return
	}
	c.writeGoAway(1<<31-1, CodeNo)
	c.check(c.hdrs.wr.WritePing(false, goAwayPing))
	c.away.pinged = true
	c.away.stop = c.loop.AfterFunc(goAwayWait, c.finalGoAway)
}

func (c *Conn) finalGoAway() {
	if c.state != stateOpen || c.away.final {
		return
	}
	c.away.end()
	c.away.final = true
	c.writeGoAway(c.lastPeerStream(), CodeNo)
	c.maybeFinish()
}

func (c *Conn) writeGoAway(last uint32, code Code) {
	c.away.sent, c.away.last = true, last
	c.check(c.hdrs.wr.WriteGoAway(last, http2.ErrCode(code), nil))
}

// lastPeerStream is the highest stream that the peer opened and we acted on.
func (c *Conn) lastPeerStream() uint32 {
	if c.cfg.Client {
		return 0
	}
	return c.acted
}

// onGoAway handles a GOAWAY frame; of its debug data a part may be missing.
func (c *Conn) onGoAway(p []byte) {
	if len(p) < 8 {
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "goaway length"})
		return
	}
	last, code := be32(p)&maxWindow, Code(be32(p[4:]))
	again := c.away.received
	// "Endpoints MUST NOT increase the value they send".
	if again && last > c.away.remoteID {
		c.fail(&ConnError{Code: CodeProtocol, Detail: "goaway with a higher stream"})
		return
	}
	c.away.received, c.away.remoteID = true, last
	if code != CodeNo {
		c.away.remoteErr = &ConnError{Code: code, Remote: true}
	}
	if again {
		c.ignored()
	}
	if c.cfg.Client {
		c.failUnprocessed(last)
	}
	if !again && c.cfg.OnGoAway != nil {
		c.cfg.OnGoAway()
	}
	c.maybeFinish()
}

// failUnprocessed ends the streams that the peer will not act upon.
func (c *Conn) failUnprocessed(last uint32) {
	cause := c.away.remoteErr
	if cause == nil {
		cause = ErrGoingAway
	}
	for id, s := range c.streams {
		if id > last {
			s.terminate(&lostError{cause: cause, notProcessed: true})
		}
	}
}

// maybeFinish ends a connection that takes no more streams and has none.
func (c *Conn) maybeFinish() {
	if c.state != stateOpen || len(c.streams) > 0 || !c.away.final && !c.away.received {
		return
	}
	if !c.away.final {
		c.writeGoAway(c.lastPeerStream(), CodeNo)
	}
	c.finish(c.away.remoteErr)
	c.lingerStep()
}
