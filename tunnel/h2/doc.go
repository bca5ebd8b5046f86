// Package h2 speaks HTTP/2 for one purpose: CONNECT (RFC 9113 section 8.5).
// One type, Conn, plays both roles on top of a splice.End, which may be TLS or
// not; its streams are splice.Ends themselves. Any other method is answered
// 400 without asking the user. There is no push, no extended CONNECT, no
// trailers and no priorities.
//
//	server := h2.New(loop, end, &h2.Config{OnStream: func(s *h2.Stream, r h2.Request) {
//		s.Respond(h2.Response{Status: 200})
//		...
//	}})
//	client := h2.New(loop, end, &h2.Config{Client: true})
//	s, err := client.Open(h2.Request{Authority: "10.0.0.2:80"}, func(r h2.Response, err error) { ... })
//
// # Concurrency
//
// A Conn and its streams belong to one splice.Loop. Every method is called on
// that loop, every callback runs on it, nothing blocks and no goroutine is
// started. Callbacks may call any method of the Conn and of any of its streams.
//
// # Data flow
//
// What streams and the protocol send is appended to one buffer, which goes to
// the End below in one Write at the end of the loop's pass (Loop.Last), or at
// once when it exceeds 64 KiB. A stream's Reserve hands out room inside that
// buffer. DATA is read from the End below straight into Loop.Scratch, gathered
// over the frames of one stream, and given to the stream's Push sink in place.
//
// What the sink does not take is kept in the stream. Windows are replenished
// only for bytes that were taken, so what is kept is bounded by the windows.
package h2
