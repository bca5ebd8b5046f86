package h2

import (
	"time"

	"golang.org/x/net/http2"
)

// The payloads are constant: those of a stock ztunnel. keepalivePing asks for
// a sign of life, goAwayPing whether the first GOAWAY has arrived.
var (
	keepalivePing = [8]byte{0x3b, 0x7c, 0xdb, 0x7a, 0x0b, 0x87, 0x16, 0xb4}
	goAwayPing    = [8]byte{0x0b, 0x7b, 0xa2, 0xf0, 0x8b, 0x9b, 0xfe, 0x54}
)

// A peer that sends something but no PONG may have it queued behind data on a
// slow path: it is waited for maxPingWaits times as long.
const maxPingWaits = 3

type pinger struct {
	stop    func() // the running timer
	pending bool   // a PING has not been answered
	sentAt  time.Time
	waits   int
	alive   bool          // something was received since the timer was set
	rtt     time.Duration // the shortest seen, 0 for none
}

func (p *pinger) end() {
	if p.stop != nil {
		p.stop()
		p.stop = nil
	}
}

func (p *pinger) measured(rtt time.Duration) {
	if p.rtt == 0 || rtt < p.rtt {
		p.rtt = rtt
	}
}

// schedulePing arms the next PING.
func (c *Conn) schedulePing() {
	if c.cfg.PingEvery < 0 {
		return
	}
	c.ping.stop = c.loop.AfterFunc(c.cfg.PingEvery, c.sendPing)
}

func (c *Conn) sendPing() {
	p := &c.ping
	p.pending, p.sentAt, p.waits, p.alive = true, time.Now(), 0, false
	c.stats.PingsSent++
	c.check(c.hdrs.wr.WritePing(false, keepalivePing))
	p.stop = c.loop.AfterFunc(c.cfg.PingTimeout, c.pingTimeout)
}

func (c *Conn) pingTimeout() {
	p := &c.ping
	if p.waits++; p.alive && p.waits < maxPingWaits {
		p.alive = false
		p.stop = c.loop.AfterFunc(c.cfg.PingTimeout, c.pingTimeout)
		return
	}
	c.Close(ErrPingTimeout)
}

// onPing handles a whole PING frame.
func (c *Conn) onPing(f frameHead, b []byte) {
	if len(b) != 8 {
		c.fail(&ConnError{Code: CodeFrameSize, Detail: "ping length"})
		return
	}
	payload := [8]byte(b)
	switch {
	case !f.has(http2.FlagPingAck):
		if !c.tooMany(LimitPings) {
			c.check(c.hdrs.wr.WritePing(true, payload))
		}
	case payload == keepalivePing && c.ping.pending:
		c.ping.end()
		c.ping.pending = false
		c.ping.measured(time.Since(c.ping.sentAt))
		c.schedulePing()
	case payload == goAwayPing && c.away.pinged:
		c.finalGoAway()
	default:
		c.ignored()
	}
}
