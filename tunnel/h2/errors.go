package h2

import (
	"errors"
	"fmt"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

// A Code is an HTTP/2 error code (RFC 9113 section 7).
type Code uint32

// The codes of RFC 9113 section 7.
const (
	CodeNo                 = Code(http2.ErrCodeNo)
	CodeProtocol           = Code(http2.ErrCodeProtocol)
	CodeInternal           = Code(http2.ErrCodeInternal)
	CodeFlowControl        = Code(http2.ErrCodeFlowControl)
	CodeSettingsTimeout    = Code(http2.ErrCodeSettingsTimeout)
	CodeStreamClosed       = Code(http2.ErrCodeStreamClosed)
	CodeFrameSize          = Code(http2.ErrCodeFrameSize)
	CodeRefusedStream      = Code(http2.ErrCodeRefusedStream)
	CodeCancel             = Code(http2.ErrCodeCancel)
	CodeCompression        = Code(http2.ErrCodeCompression)
	CodeConnect            = Code(http2.ErrCodeConnect)
	CodeEnhanceYourCalm    = Code(http2.ErrCodeEnhanceYourCalm)
	CodeInadequateSecurity = Code(http2.ErrCodeInadequateSecurity)
	CodeHTTP11Required     = Code(http2.ErrCodeHTTP11Required)
)

func (c Code) String() string { return http2.ErrCode(c).String() }

var (
	// ErrNoSlot is returned by Open when the peer or Config.MaxStreams allows
	// no further stream now.
	ErrNoSlot = errors.New("h2: no stream slot")
	// ErrGoingAway is returned by Open after a GOAWAY of either side.
	ErrGoingAway = errors.New("h2: going away")
	// ErrClosed is returned after the Conn or the Stream was closed here.
	ErrClosed = errors.New("h2: closed")
	// ErrNotProcessed matches the error of a stream that the peer says it has
	// not acted upon, so that the request may be sent again elsewhere.
	ErrNotProcessed = errors.New("h2: not processed by peer")
	// ErrCancel as the cause of Stream.Reset sends CANCEL: the caller gave up,
	// nothing was wrong with the connection behind it.
	ErrCancel = errors.New("h2: cancelled")
	// ErrPingTimeout ends a Conn whose peer gave no sign of life.
	ErrPingTimeout = errors.New("h2: no answer to ping")
	// ErrSetupTimeout ends a Conn whose peer did not send or acknowledge
	// SETTINGS in time.
	ErrSetupTimeout = errors.New("h2: no settings from peer")
	// ErrHeaderList is returned for headers larger than the peer accepts.
	ErrHeaderList = errors.New("h2: headers too large for peer")
	// ErrConnLost matches the error of streams whose connection broke.
	ErrConnLost = errors.New("h2: connection lost")
)

// A ConnError is a connection error: what ended a Conn, by GOAWAY of either
// side.
type ConnError struct {
	Code   Code
	Remote bool   // The peer said so.
	Limit  Limit  // Which of Config.Limits the peer broke, if any.
	Detail string // For logs; what the peer sent is not in it.

	cause error
}

// Unwrap returns the sentinel that says more, if there is one.
func (e *ConnError) Unwrap() error { return e.cause }

func (e *ConnError) Error() string {
	by := "here"
	if e.Remote {
		by = "by peer"
	}
	if e.Detail == "" {
		return fmt.Sprintf("h2: connection ended %s: %v", by, e.Code)
	}
	return fmt.Sprintf("h2: connection ended %s: %v: %s", by, e.Code, e.Detail)
}

// A StreamError is a stream error: RST_STREAM of either side. It matches
// splice.ErrReset, and ErrNotProcessed if the peer refused the stream.
type StreamError struct {
	Code   Code
	Remote bool // The peer said so.
	Detail string
}

func (e *StreamError) Error() string {
	by := "here"
	if e.Remote {
		by = "by peer"
	}
	if e.Detail == "" {
		return fmt.Sprintf("h2: stream reset %s: %v", by, e.Code)
	}
	return fmt.Sprintf("h2: stream reset %s: %v: %s", by, e.Code, e.Detail)
}

// Is makes errors.Is find splice.ErrReset and ErrNotProcessed.
func (e *StreamError) Is(target error) bool {
	return target == splice.ErrReset ||
		target == ErrNotProcessed && e.Remote && e.Code == CodeRefusedStream
}

// lostError is what a stream reports when its connection ended below it.
type lostError struct {
	cause        error
	notProcessed bool
}

func (e *lostError) Error() string { return fmt.Sprintf("h2: connection lost: %v", e.cause) }
func (e *lostError) Unwrap() error { return e.cause }

func (e *lostError) Is(target error) bool {
	return target == splice.ErrReset || target == ErrConnLost || target == ErrNotProcessed && e.notProcessed
}
