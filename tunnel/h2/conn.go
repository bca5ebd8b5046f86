package h2

import "github.com/ztun/ztun/tunnel/splice"

// A Conn is an HTTP/2 connection in either role.
type Conn struct{}

// New starts a connection on t, which it owns from now on: it sends the
// client's preface, if it is one, and SETTINGS. t must not use Loop.Scratch
// within Read, which is called with a part of it.
func New(loop splice.Loop, t splice.End, cfg *Config) *Conn { panic("todo") }

// Open sends a CONNECT. onResponse runs exactly once, never before Open has
// returned: with the answer, or with the error that ended the stream before
// one came. It need not wait for the peer's SETTINGS.
// The error is ErrNoSlot, ErrGoingAway, ErrHeaderList or what ended the Conn.
func (c *Conn) Open(r Request, onResponse func(Response, error)) (*Stream, error) { panic("todo") }

// Slots is how many more streams Open would allow now.
func (c *Conn) Slots() int { panic("todo") }

// Streams is how many streams are open.
func (c *Conn) Streams() int { panic("todo") }

// GoAway lets the streams finish and takes no more; then the Conn ends.
func (c *Conn) GoAway() { panic("todo") }

// Close ends the Conn at once and resets every stream. The peer is told by a
// GOAWAY with the code of a *ConnError in err, else NO_ERROR. OnClose gets err.
func (c *Conn) Close(err error) { panic("todo") }

// Err is nil while the Conn lives, then what ended it, ErrClosed if that was
// graceful.
func (c *Conn) Err() error { panic("todo") }

// Stats returns what was counted so far.
func (c *Conn) Stats() Stats { panic("todo") }

// Stats count what happened on a Conn.
type Stats struct {
	StreamsOpened  uint64 // by either side
	StreamsRefused uint64 // of the peer, with REFUSED_STREAM
	BadRequests    uint64 // of the peer, answered 400 or 431 or reset as malformed
	ResetsSent     uint64
	ResetsReceived uint64
	DataSent       uint64 // bytes of DATA payload
	DataReceived   uint64
	DataKept       int // bytes received that nobody has taken yet, now
	PingsSent      uint64
	FramesIgnored  uint64 // without effect, or of an unknown type
}
