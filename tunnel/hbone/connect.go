package hbone

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"time"

	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
)

// A Dialer opens TCP connections; netstack.Stack is one. done runs on the
// dialer's loop exactly once and never before Dial has returned, unless cancel
// was called before. Its error matches syscall.ECONNREFUSED, EHOSTUNREACH,
// ENETUNREACH, ETIMEDOUT or EADDRINUSE where that is what happened.
type Dialer interface {
	Dial(src, dst netip.AddrPort, timeout time.Duration, done func(splice.End, error)) (cancel func())
}

// A Connect is what a client asks of a peer for one connection.
type Connect struct {
	Authority string
	Baggage   string         // describes the source workload, see Baggage.String
	Client    netip.AddrPort // the app's end
	Host      string         // the service that the app called, or ""
	Trace     Trace
	Network   string // x-forwarded-network, or ""
}

func (c *Connect) request() h2.Request {
	r := h2.Request{Authority: c.Authority, Headers: make([]h2.Header, 0, 4)}
	r.Headers = append(r.Headers,
		h2.Header{Name: HeaderBaggage, Value: c.Baggage},
		h2.Header{Name: HeaderForwarded, Value: Forwarded(c.Client, c.Host), Once: true},
		h2.Header{Name: HeaderTraceparent, Value: c.Trace.String(), Once: true})
	if c.Network != "" {
		r.Headers = append(r.Headers, h2.Header{Name: HeaderNetwork, Value: c.Network})
	}
	return r
}

// NewTrace returns a trace context that no other connection has.
func NewTrace() Trace {
	var t Trace
	binary.BigEndian.PutUint64(t.ID[:8], rand.Uint64())
	binary.BigEndian.PutUint64(t.ID[8:], rand.Uint64())
	binary.BigEndian.PutUint64(t.Span[:], rand.Uint64())
	return t
}

// A Tunnel is a CONNECT that the peer answered with 200. Whoever gets it owns
// the Stream.
type Tunnel struct {
	Stream  *h2.Stream
	Peer    identity.ID // proven by the peer's certificate
	Baggage Baggage     // what the peer says of itself; zero if nothing
}

// A StatusError is an answer other than 200.
type StatusError struct {
	Status int
	Proxy  ProxyError // "" if the peer does not say
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("http status: %d", e.Status)
	if text := http.StatusText(e.Status); text != "" {
		s += " " + text
	}
	if e.Proxy != "" {
		s += " (" + string(e.Proxy) + ")"
	}
	return s
}

// A Stage is how far a Connect came.
type Stage uint8

// The stages of a Connect.
const (
	StageQueue       Stage = iota // waiting for its turn
	StageCertificate              // waiting for the own certificate
	StageDial                     // TCP
	StageHandshake                // TLS
	StageAnswer                   // the CONNECT was sent
)

func (s Stage) String() string {
	return [...]string{"queue", "certificate", "dial", "handshake", "answer"}[s]
}

// A ConnectError says where a Connect failed.
type ConnectError struct {
	Stage Stage
	Err   error
}

func (e *ConnectError) Error() string { return fmt.Sprintf("hbone: %v: %v", e.Stage, e.Err) }
func (e *ConnectError) Unwrap() error { return e.Err }

var (
	// ErrTimeout is a deadline of this package that has passed.
	ErrTimeout = errors.New("hbone: timed out")
	// ErrLimit refuses what would exceed a bound of this package's.
	ErrLimit = errors.New("hbone: too many connections")
	// ErrDraining refuses what is new while what exists may finish.
	ErrDraining = errors.New("hbone: draining")
)
