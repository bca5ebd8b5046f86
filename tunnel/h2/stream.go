package h2

import "github.com/ztun/ztun/tunnel/splice"

// A Stream is one CONNECT.
type Stream struct{}

var (
	_ splice.End      = (*Stream)(nil)
	_ splice.Reserver = (*Stream)(nil)
	_ splice.Pusher   = (*Stream)(nil)
)

// ID is the stream's number on its connection.
func (s *Stream) ID() uint32 { panic("todo") }

// Conn is the connection that carries the stream.
func (s *Stream) Conn() *Conn { panic("todo") }

// Respond answers the request, once. With EndStream, the usual refusal, the
// stream has ended and only Close is left to be called.
func (s *Stream) Respond(r Response) error { panic("todo") }

// Read implements splice.End. A reset by the peer or the loss of the
// connection is an error that matches splice.ErrReset.
func (s *Stream) Read(p []byte) (int, error) { panic("todo") }

// Write implements splice.End.
func (s *Stream) Write(p []byte) (int, error) { panic("todo") }

// CloseWrite implements splice.End: DATA without data, with END_STREAM.
func (s *Stream) CloseWrite() error { panic("todo") }

// Reset implements splice.End. It sends RST_STREAM with CONNECT_ERROR, or with
// CANCEL if cause is ErrCancel, or with the code of a *StreamError in cause.
func (s *Stream) Reset(cause error) { panic("todo") }

// Close implements splice.End.
func (s *Stream) Close() { panic("todo") }

// Notify implements splice.End.
func (s *Stream) Notify(ready func()) { panic("todo") }

// Reserve implements splice.Reserver.
func (s *Stream) Reserve(max int) []byte { panic("todo") }

// Commit implements splice.Reserver.
func (s *Stream) Commit(n int) { panic("todo") }

// Push implements splice.Pusher.
func (s *Stream) Push(sink func(p []byte) (n int)) { panic("todo") }
