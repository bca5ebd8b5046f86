package h2

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

func TestHalfCloseByPeerLeavesOurSideOpen(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		tc.fr.WriteData(1, true, []byte("all"))
		s.wantRead("all", io.EOF)
		s.wantRead("", io.EOF)
		s.write("still here")
		s.closeWrite()
		tc.want("our side", `DATA 1 "still here"`, `DATA 1 "" END_STREAM`)
		if n := tc.conn.Streams(); n != 0 {
			t.Errorf("%d streams open", n)
		}
		tc.do(s.s.Close)
		tc.want("a clean end needs no reset")
	})
}

func TestHalfCloseByUsLeavesPeersSideOpen(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.opened()
		s.closeWrite()
		s.closeWrite()
		tc.want("our end, once", `DATA 1 "" END_STREAM`)
		tc.do(func() {
			if _, err := s.s.Write([]byte("x")); !errors.Is(err, ErrClosed) {
				t.Errorf("Write after CloseWrite: %v", err)
			}
		})
		tc.fr.WriteData(1, false, []byte("later"))
		s.wantRead("later", splice.ErrAgain)
		tc.fr.WriteData(1, true, nil)
		s.wantRead("", io.EOF)
	}, asClient)
}

func TestEndStreamWithHeaders(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.headers(1, true, ":method", "CONNECT", ":authority", "a:1")
		s := tc.streams[0]
		s.wantRead("", io.EOF)
		s.respond(200, false)
		s.closeWrite()
		tc.want("answer", "HEADERS 1 :status=200", `DATA 1 "" END_STREAM`)
	})
}

func TestResetByPeer(t *testing.T) {
	for _, code := range []Code{CodeNo, CodeCancel, CodeConnect, CodeInternal, CodeRefusedStream} {
		t.Run(code.String(), func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				s := tc.accept(1)
				tc.fr.WriteData(1, false, []byte("lost"))
				tc.fr.WriteRSTStream(1, http2.ErrCode(code))
				ready := s.ready
				if ready == 0 {
					t.Error("not notified")
				}
				s.wantRead("", splice.ErrReset)
				tc.do(func() {
					n, err := s.s.Write([]byte("x"))
					var se *StreamError
					if n != 0 || !errors.As(err, &se) || se.Code != code || !se.Remote {
						t.Errorf("Write = %d, %v", n, err)
					}
					if got, want := errors.Is(err, ErrNotProcessed), code == CodeRefusedStream; got != want {
						t.Errorf("not processed: %v, want %v", got, want)
					}
					s.s.Reset(err)
				})
				tc.want("a reset is not answered by one")
			})
		})
	}
}

// A peer that has said all it had and then breaks off must not pass for one
// that ended cleanly, but what it said counts.
func TestResetAfterEndStream(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		tc.fr.WriteData(1, true, []byte("all"))
		tc.fr.WriteRSTStream(1, http2.ErrCodeCancel)
		s.wantRead("all", splice.ErrReset)
	})
}

func TestResetByUs(t *testing.T) {
	for _, test := range []struct {
		name  string
		cause error
		want  string
	}{
		{"any cause", io.ErrUnexpectedEOF, "CONNECT_ERROR"},
		{"a reset from elsewhere", splice.ErrReset, "CONNECT_ERROR"},
		{"another peer's reset", &StreamError{Code: CodeInternal, Remote: true}, "CONNECT_ERROR"},
		{"given up", ErrCancel, "CANCEL"},
		{"chosen code", &StreamError{Code: CodeInternal}, "INTERNAL_ERROR"},
	} {
		t.Run(test.name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				s := tc.accept(1)
				tc.do(func() {
					s.s.Reset(test.cause)
					s.s.Reset(test.cause)
					s.s.Close()
				})
				tc.want("one reset", "RST_STREAM 1 "+test.want)
				tc.fr.WriteData(1, false, []byte("crossed"))
				tc.fr.WriteData(1, true, nil)
				tc.fr.WriteWindowUpdate(1, 5)
				tc.fr.WriteRSTStream(1, http2.ErrCodeNo)
				tc.wantAlive()
				s.wantRead("", ErrClosed)
			})
		})
	}
}

func TestCloseWithOpenDirectionResets(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		s.closeWrite()
		tc.do(s.s.Close)
		tc.want("reset", `DATA 1 "" END_STREAM`, "RST_STREAM 1 CANCEL")
		unanswered := tc.connect(3)
		tc.do(unanswered.s.Close)
		tc.want("reset", "RST_STREAM 3 CANCEL")
	})
}

func TestOnResponseRunsOnce(t *testing.T) {
	ends := map[string]struct {
		end  func(tc *testConn, s *testStream)
		want error
	}{
		"reset by peer":   {func(tc *testConn, s *testStream) { tc.fr.WriteRSTStream(1, http2.ErrCodeCancel) }, splice.ErrReset},
		"refused by peer": {func(tc *testConn, s *testStream) { tc.fr.WriteRSTStream(1, http2.ErrCodeRefusedStream) }, ErrNotProcessed},
		"connection lost": {func(tc *testConn, s *testStream) { tc.hangUp() }, ErrConnLost},
		"goaway":          {func(tc *testConn, s *testStream) { tc.fr.WriteGoAway(0, 0, nil) }, ErrNotProcessed},
		"given up":        {func(tc *testConn, s *testStream) { tc.do(func() { s.s.Reset(ErrCancel) }) }, splice.ErrReset},
		"conn closed":     {func(tc *testConn, s *testStream) { tc.do(func() { tc.conn.Close(nil) }) }, splice.ErrReset},
		"malformed":       {func(tc *testConn, s *testStream) { tc.headers(1, false, ":status", "2000") }, splice.ErrReset},
	}
	for name, test := range ends {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				s := tc.open()
				tc.skip(1)
				test.end(tc, s)
				if len(s.response) != 0 || len(s.respErr) != 1 || !errors.Is(s.respErr[0], test.want) {
					t.Errorf("responses %v, errors %v; want one %v", s.response, s.respErr, test.want)
				}
				tc.do(func() { s.s.Close(); tc.conn.Close(nil) })
				if len(s.respErr) != 1 {
					t.Errorf("onResponse ran %d times", len(s.respErr))
				}
			}, asClient)
		})
	}
}

func TestInterimResponsesAreSkipped(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.open()
		tc.skip(1)
		tc.headers(1, false, ":status", "103", "link", "x")
		if len(s.response) != 0 {
			t.Fatal("103 taken for an answer")
		}
		tc.headers(1, false, ":status", "200")
		if len(s.response) != 1 || s.response[0].Status != 200 {
			t.Errorf("responses %v", s.response)
		}
	}, asClient)
}

func TestRefusalWithBodyAndTrailers(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.open()
		tc.skip(1)
		tc.headers(1, false, ":status", "503", "content-length", "4")
		tc.fr.WriteData(1, false, []byte("busy"))
		tc.headers(1, true, "x-trailer", "1")
		s.wantRead("busy", io.EOF)
		tc.do(s.s.Close)
		tc.want("given up", "RST_STREAM 1 CANCEL")
	}, asClient)
}

func TestPushTakesInPlaceAndKeepsTheRest(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		var pushed strings.Builder
		calls, room := 0, 7
		tc.do(func() {
			s.s.Push(func(p []byte) int {
				calls++
				n := min(room, len(p))
				room -= n
				pushed.Write(p[:n])
				return n
			})
		})
		var frames bytes.Buffer
		fr := http2.NewFramer(&frames, nil)
		fr.WriteData(1, false, []byte("one "))
		fr.WriteDataPadded(1, false, []byte("two "), make([]byte, 9))
		fr.WriteData(1, false, []byte("three"))
		tc.raw(frames.Bytes())
		if calls != 1 || pushed.String() != "one two" {
			t.Errorf("%d calls got %q, want one with %q", calls, pushed.String(), "one two")
		}
		room = 100
		tc.fr.WriteData(1, false, []byte(" four"))
		if calls != 1 {
			t.Error("sink called past what was kept")
		}
		s.wantRead(" three four", splice.ErrAgain)
		tc.fr.WriteData(1, false, []byte(" five"))
		if calls != 2 || pushed.String() != "one two five" {
			t.Errorf("%d calls got %q", calls, pushed.String())
		}
		tc.do(func() { s.s.Push(nil) })
		tc.fr.WriteData(1, true, []byte("six"))
		s.wantRead("six", io.EOF)
	})
}

// What a sink does to the connection it is fed by must not disturb the rest
// of what was read.
func TestSinkMayDoAnything(t *testing.T) {
	acts := map[string]func(tc *testConn, a, b *testStream){
		"write on the same stream":     func(tc *testConn, a, b *testStream) { a.s.Write([]byte("echo")) },
		"write much on another stream": func(tc *testConn, a, b *testStream) { b.s.Write(make([]byte, 60000)) },
		"reset the same stream":        func(tc *testConn, a, b *testStream) { a.s.Reset(io.ErrUnexpectedEOF) },
		"reset the other stream":       func(tc *testConn, a, b *testStream) { b.s.Reset(io.ErrUnexpectedEOF) },
		"close both":                   func(tc *testConn, a, b *testStream) { a.s.Close(); b.s.Close() },
		"go away":                      func(tc *testConn, a, b *testStream) { tc.conn.GoAway() },
		"close the connection":         func(tc *testConn, a, b *testStream) { tc.conn.Close(nil) },
		"stop pushing":                 func(tc *testConn, a, b *testStream) { a.s.Push(nil) },
		"half-close":                   func(tc *testConn, a, b *testStream) { a.s.CloseWrite() },
	}
	for name, act := range acts {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				a, b := tc.accept(1), tc.accept(3)
				calls := 0
				tc.do(func() {
					a.s.Push(func(p []byte) int {
						calls++
						if string(p) != "first" {
							t.Errorf("sink got %q", p)
						}
						act(tc, a, b)
						return len(p)
					})
				})
				var frames bytes.Buffer
				fr := http2.NewFramer(&frames, nil)
				fr.WriteData(1, false, []byte("first"))
				fr.WriteData(3, false, []byte("second"))
				fr.WritePing(false, [8]byte{7})
				tc.raw(frames.Bytes())
				if calls != 1 {
					t.Errorf("%d calls", calls)
				}
				if name == "close the connection" {
					tc.wantClosed(nil)
					return
				}
				if !strings.Contains(name, "other") && !strings.Contains(name, "both") {
					b.wantRead("second", splice.ErrAgain)
				}
				for {
					switch tc.next() {
					case "PING ACK 0700000000000000":
						return
					case "":
						t.Fatal("the frames behind were not read")
					}
				}
			})
		})
	}
}

func TestReserveCommit(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		tc.do(func() {
			room := s.s.Reserve(100)
			if len(room) != 100 || cap(room) != 100 {
				t.Fatalf("Reserve(100): len %d cap %d", len(room), cap(room))
			}
			s.s.Commit(0)
			room = s.s.Reserve(1 << 20)
			if len(room) != minMaxFrameSize {
				t.Errorf("Reserve(1 MiB) = %d bytes, want the peer's frame size", len(room))
			}
			s.s.Commit(copy(room, "abc"))
			s.s.Commit(5)
			if r := s.s.Reserve(0); r != nil {
				t.Errorf("Reserve(0) = %d bytes", len(r))
			}
		})
		tc.want("the committed bytes", `DATA 1 "abc"`)
		tc.do(func() {
			if s.s.Reserve(10) == nil {
				t.Fatal("no room")
			}
			s.s.Reset(ErrCancel)
			s.s.Commit(10)
		})
		tc.want("nothing of a stream that was reset", "RST_STREAM 1 CANCEL")
		a, b := tc.accept(3), tc.accept(5)
		tc.do(func() {
			if a.s.Reserve(10) == nil {
				t.Fatal("no room")
			}
			b.s.Write([]byte("between"))
			a.s.Commit(10)
		})
		tc.want("a broken rule costs the stream only", `DATA 5 "between"`, "RST_STREAM 3 INTERNAL_ERROR")
		tc.wantAlive()
	})
}

func TestServerMustAnswerFirst(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.connect(1)
		tc.do(func() {
			if _, err := s.s.Write([]byte("x")); err == nil {
				t.Error("Write before Respond succeeded")
			}
			if err := s.s.CloseWrite(); err == nil {
				t.Error("CloseWrite before Respond succeeded")
			}
			if s.s.Reserve(1) != nil {
				t.Error("Reserve before Respond gave room")
			}
			for _, status := range []int{0, 100, 101, 600} {
				if err := s.s.Respond(Response{Status: status}); err == nil {
					t.Errorf("status %d accepted", status)
				}
			}
			bad := []Header{{Name: "Upper", Value: "x"}, {Name: "a b", Value: "x"}, {Name: "ok", Value: "line\nbreak"}, {Name: ":status", Value: "200"}}
			for _, h := range bad {
				if err := s.s.Respond(Response{Status: 200, Headers: []Header{h}}); err == nil {
					t.Errorf("header %v accepted", h)
				}
			}
			if err := s.s.Respond(Response{Status: 200}); err != nil {
				t.Error(err)
			}
			if err := s.s.Respond(Response{Status: 200}); err == nil {
				t.Error("second Respond succeeded")
			}
		})
		tc.want("one answer", "HEADERS 1 :status=200")
	})
}

func TestOutputOfAPassIsWrittenAtOnce(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		a, b := tc.accept(1), tc.accept(3)
		w := &countingEnd{End: tc.conn.t}
		tc.do(func() {
			tc.conn.t = w
			for range 10 {
				a.s.Write([]byte("aa"))
				b.s.Write([]byte("bb"))
			}
			if w.writes != 0 {
				t.Error("written before the end of the pass")
			}
		})
		if w.writes != 1 {
			t.Errorf("%d writes, want 1", w.writes)
		}
	})
}

type countingEnd struct {
	splice.End
	writes int
	fail   error
}

func (e *countingEnd) Write(p []byte) (int, error) {
	e.writes++
	if e.fail != nil {
		return 0, e.fail
	}
	return e.End.Write(p)
}

func TestTransportWriteError(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		broken := errors.New("broken")
		tc.do(func() {
			tc.conn.t = &countingEnd{End: tc.conn.t, fail: broken}
			s.s.Write([]byte("x"))
		})
		tc.wantClosed(broken)
		tc.wantClosed(ErrConnLost)
		s.wantRead("", splice.ErrReset)
	})
}

// A connection with much to read lets others have their turn.
func TestReadingIsBoundedPerTurn(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		var frames bytes.Buffer
		fr := http2.NewFramer(&frames, nil)
		for range 60 {
			fr.WriteData(1, false, make([]byte, 16<<10))
		}
		received, most := 0, 0
		var other splice.Task
		tc.do(func() {
			other.Run = func() { most, received = max(most, received), 0 }
			s.s.Push(func(p []byte) int {
				tc.loop.Soon(&other)
				received += len(p)
				return len(p)
			})
			tc.end.Write(frames.Bytes())
		})
		if most == 0 || most > readBudget+gatherMax {
			t.Errorf("read %d bytes in one turn, want at most %d", most, readBudget)
		}
	}, asZtunnel)
}
