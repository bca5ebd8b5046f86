package h2

import (
	"errors"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

func TestSlots(t *testing.T) {
	run(t, func(tc *testConn) {
		if n := tc.conn.Slots(); n != DefaultClientMaxStreams {
			t.Errorf("%d slots before SETTINGS", n)
		}
		tc.greet(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 2})
		a, b := tc.opened(), tc.opened()
		if n := tc.conn.Slots(); n != 0 {
			t.Errorf("%d slots, want 0", n)
		}
		tc.do(func() {
			if _, err := tc.conn.Open(Request{Authority: "a:1"}, nil); err != ErrNoSlot {
				t.Errorf("Open: %v", err)
			}
		})
		tc.fr.WriteRSTStream(b.s.id, http2.ErrCodeCancel)
		if n := tc.conn.Slots(); n != 1 {
			t.Errorf("%d slots after a reset, want 1", n)
		}
		tc.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 0})
		if n := tc.conn.Slots(); n != 0 {
			t.Errorf("%d slots, want 0", n)
		}
		tc.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1000})
		if n := tc.conn.Slots(); n != DefaultClientMaxStreams-1 {
			t.Errorf("%d slots, want our own limit less one", n)
		}
		a.wantRead("", splice.ErrAgain)
	}, asClient)
}

func TestServerRefusesBeyondMaxStreams(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.accept(1)
		tc.accept(3)
		tc.headers(5, false, ":method", "CONNECT", ":authority", "a:1")
		tc.want("refusal", "RST_STREAM 5 REFUSED_STREAM")
		tc.fr.WriteData(5, false, []byte("crossed"))
		tc.fr.WriteRSTStream(1, http2.ErrCodeCancel)
		tc.accept(7)
		st := tc.conn.Stats()
		if st.StreamsRefused != 1 || st.StreamsOpened != 3 {
			t.Errorf("stats %+v", st)
		}
	}, func(c *Config) { c.MaxStreams = 2 })
}

// Streams that were reset while the user still dials for them count, or a peer
// could make it dial without bound.
func TestResetStreamsCountUntilTheUserLetsGo(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		a, b := tc.connect(1), tc.connect(3)
		tc.fr.WriteRSTStream(1, http2.ErrCodeCancel)
		tc.fr.WriteRSTStream(3, http2.ErrCodeCancel)
		tc.headers(5, false, ":method", "CONNECT", ":authority", "a:1")
		tc.want("refusal", "RST_STREAM 5 REFUSED_STREAM")
		tc.do(func() {
			a.s.Close()
			if err := b.s.Respond(Response{Status: 200}); !errors.Is(err, splice.ErrReset) {
				t.Errorf("Respond on a stream that was reset: %v", err)
			}
		})
		tc.accept(7)
		tc.accept(9)
	}, func(c *Config) { c.MaxStreams = 2 })
}

func TestServerGoAwayTwice(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		a := tc.accept(1)
		tc.do(func() { tc.conn.GoAway(); tc.conn.GoAway() })
		tc.want("first", "GOAWAY last=2147483647 NO_ERROR", "PING 0b7ba2f08b9bfe54")
		crossed := tc.accept(3)
		tc.fr.WritePing(true, goAwayPing)
		tc.want("final", "GOAWAY last=3 NO_ERROR")
		tc.headers(5, false, ":method", "CONNECT", ":authority", "a:1")
		tc.want("too late", "RST_STREAM 5 REFUSED_STREAM")
		tc.fr.WriteData(5, false, []byte("x"))
		for _, s := range []*testStream{a, crossed} {
			s.write("bye")
			s.closeWrite()
			tc.skip(2)
			tc.fr.WriteData(s.s.id, true, nil)
			s.wantRead("", io.EOF)
		}
		tc.wantClosed(nil)
		if tc.closed[0] != nil {
			t.Errorf("OnClose(%v)", tc.closed[0])
		}
		tc.want("nothing more")
		if tc.gone != io.EOF {
			t.Errorf("transport ended with %v", tc.gone)
		}
	})
}

func TestServerGoAwayDoesNotWaitForPong(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.do(tc.conn.GoAway)
		tc.skip(2)
		pass(goAwayWait)
		tc.want("final", "GOAWAY last=0 NO_ERROR")
		tc.wantClosed(nil)
	})
}

func TestClientGoAway(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.opened()
		tc.do(tc.conn.GoAway)
		tc.want("goaway", "GOAWAY last=0 NO_ERROR")
		tc.do(func() {
			if _, err := tc.conn.Open(Request{Authority: "a:1"}, nil); err != ErrGoingAway {
				t.Errorf("Open: %v", err)
			}
		})
		if n := tc.conn.Slots(); n != 0 {
			t.Errorf("%d slots", n)
		}
		tc.fr.WriteData(1, true, []byte("rest"))
		s.wantRead("rest", io.EOF)
		if tc.closed != nil {
			t.Fatal("ended with a stream open")
		}
		s.closeWrite()
		tc.want("end", `DATA 1 "" END_STREAM`)
		tc.wantClosed(nil)
	}, asClient)
}

func TestGoAwayFromServer(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		a, b := tc.open(), tc.open()
		tc.skip(2)
		tc.fr.WriteGoAway(1<<31-1, 0, nil)
		tc.fr.WriteGoAway(1, 0, make([]byte, 5000))
		if tc.goAway != 1 {
			t.Errorf("OnGoAway ran %d times", tc.goAway)
		}
		if len(b.respErr) != 1 || !errors.Is(b.respErr[0], ErrNotProcessed) {
			t.Errorf("stream above the last: %v", b.respErr)
		}
		tc.headers(1, false, ":status", "200")
		a.write("on")
		tc.want("the other lives", `DATA 1 "on"`)
		a.closeWrite()
		tc.fr.WriteData(1, true, nil)
		tc.want("end", `DATA 1 "" END_STREAM`, "GOAWAY last=0 NO_ERROR")
		tc.wantClosed(nil)
	}, asClient)
}

func TestGoAwayWithErrorIsTheCause(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		a := tc.opened()
		tc.fr.WriteGoAway(1, http2.ErrCodeEnhanceYourCalm, []byte("too_many"))
		tc.hangUp()
		var ce *ConnError
		if len(tc.closed) != 1 || !errors.As(tc.closed[0], &ce) || !ce.Remote || ce.Code != CodeEnhanceYourCalm {
			t.Errorf("OnClose: %v", tc.closed)
		}
		a.wantRead("", splice.ErrReset)
		_, err := a.read()
		if !errors.As(err, &ce) || errors.Is(err, ErrNotProcessed) {
			t.Errorf("stream: %v", err)
		}
	}, asClient)
}

func TestPeerHangsUp(t *testing.T) {
	t.Run("idle", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			tc.hangUp()
			tc.wantClosed(nil)
			if tc.closed[0] != nil {
				t.Errorf("OnClose(%v)", tc.closed[0])
			}
		})
	})
	t.Run("with a stream", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.accept(1)
			tc.fr.WriteData(1, false, []byte("half"))
			tc.hangUp()
			tc.wantClosed(ErrConnLost)
			s.wantRead("", splice.ErrReset)
		})
	})
	t.Run("after the end of a stream", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.accept(1)
			tc.fr.WriteData(1, true, []byte("all"))
			tc.hangUp()
			s.wantRead("all", splice.ErrReset)
		})
	})
	t.Run("in a frame", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			tc.raw([]byte{0, 0})
			tc.hangUp()
			tc.wantClosed(io.ErrUnexpectedEOF)
		})
	})
	t.Run("reset", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.accept(1)
			tc.do(func() { tc.end.Reset(io.ErrClosedPipe) })
			tc.wantClosed(splice.ErrReset)
			s.wantRead("", ErrConnLost)
		})
	})
}

func TestClose(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{nil, "GOAWAY last=1 NO_ERROR"},
		{io.ErrShortWrite, "GOAWAY last=1 NO_ERROR"},
		{&ConnError{Code: CodeEnhanceYourCalm}, "GOAWAY last=1 ENHANCE_YOUR_CALM"},
	} {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.accept(1)
			tc.do(func() { tc.conn.Close(test.err); tc.conn.Close(io.EOF) })
			tc.want("told the peer", test.want)
			if len(tc.closed) != 1 || tc.closed[0] != test.err {
				t.Errorf("OnClose: %v, want %v", tc.closed, test.err)
			}
			s.wantRead("", splice.ErrReset)
			tc.do(func() {
				s.s.Close()
				if tc.conn.Err() == nil {
					t.Error("Err is nil")
				}
			})
			if tc.gone != io.EOF {
				t.Errorf("transport ended with %v", tc.gone)
			}
			tc.hangUp()
			if tc.state() != stateClosed {
				t.Error("transport was not given back")
			}
		})
	}
}

// A peer that neither reads nor closes does not hold an ended connection.
func TestLingerHasADeadline(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.do(func() { tc.conn.Close(nil) })
		pass(lingerTime - 1)
		if tc.state() != stateLinger {
			t.Error("did not wait for the peer")
		}
		pass(1)
		if tc.state() != stateClosed {
			t.Error("still waits for the peer")
		}
	})
	run(t, func(tc *testConn) {
		tc.greet()
		tc.do(func() { tc.conn.Close(nil) })
		for range 100 {
			tc.raw(make([]byte, 16<<10))
		}
		if tc.state() != stateClosed {
			t.Error("reads on and on")
		}
	})
}

func TestPingIsAnswered(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.fr.WritePing(false, [8]byte{1, 2, 3})
		tc.fr.WritePing(true, [8]byte{9})
		tc.want("pong", "PING ACK 0102030000000000")
	})
}

func TestDataIsASignOfLife(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.accept(1)
		pass(DefaultPingEvery)
		tc.want("ping", "PING 3b7cdb7a0b8716b4")
		for range 3 * 4 {
			if tc.closed != nil {
				t.Fatal("ended although the peer is alive")
			}
			tc.fr.WriteData(1, false, []byte("x"))
			pass(DefaultPingTimeout / 4)
		}
		tc.wantClosed(ErrPingTimeout)
	})
}

func TestClosedConnNeedsNothing(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		tc.do(func() {
			tc.conn.Close(nil)
			tc.conn.GoAway()
			s.s.Write([]byte("x"))
			s.s.Reserve(10)
			s.s.Commit(5)
			s.s.CloseWrite()
			s.s.Push(func(p []byte) int { return 0 })
			s.s.Notify(func() {})
			s.s.Respond(Response{Status: 200})
			s.s.Reset(nil)
			if _, err := tc.conn.Open(Request{}, nil); err == nil {
				t.Error("Open succeeded")
			}
		})
		pass(time.Minute)
		tc.want("goaway", "GOAWAY last=1 NO_ERROR")
	})
}
