package h2

import (
	"bytes"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// flood writes what gives until the Conn has ended or n calls were made, and
// returns the number of calls.
func (tc *testConn) flood(n int, write func(fr *http2.Framer, i int)) int {
	tc.t.Helper()
	for i := 0; i < n; {
		var b bytes.Buffer
		fr := http2.NewFramer(&b, nil)
		fr.AllowIllegalWrites = true
		for range 50 {
			write(fr, i)
			i++
		}
		if tc.raw(b.Bytes()); len(tc.closed) > 0 {
			return i
		}
	}
	return n
}

func TestFloods(t *testing.T) {
	priority := http2.PriorityParam{Weight: 3}
	tests := []struct {
		name  string
		limit Limit
		most  int // calls of write that must have been enough
		write func(tc *testConn) func(fr *http2.Framer, i int)
	}{
		{"settings", LimitSettings, 150, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WriteSettings() }
		}},
		{"ping", LimitPings, 1100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WritePing(false, [8]byte{}) }
		}},
		{"pong", LimitIgnored, 2100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WritePing(true, [8]byte{}) }
		}},
		{"settings ack", LimitIgnored, 2100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WriteSettingsAck() }
		}},
		{"priority", LimitIgnored, 2100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WritePriority(uint32(2*i+1), priority) }
		}},
		{"unknown frame", LimitIgnored, 2100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WriteRawFrame(0x55, 0, 0, nil) }
		}},
		{"empty data", LimitEmptyData, 1100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WriteData(1, false, nil) }
		}},
		{"padding only", LimitEmptyData, 1100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WriteDataPadded(1, false, nil, make([]byte, 3)) }
		}},
		{"window update", LimitWindowUpdates, 2100, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WriteWindowUpdate(uint32(i%2), 1) }
		}},
		{"goaway", LimitIgnored, 2200, func(*testConn) func(*http2.Framer, int) {
			return func(fr *http2.Framer, i int) { fr.WriteGoAway(1, 0, nil) }
		}},
		{"reset of closed streams", LimitIgnored, 2200, func(tc *testConn) func(*http2.Framer, int) {
			tc.fr.WriteRSTStream(1, 0)
			return func(fr *http2.Framer, i int) { fr.WriteRSTStream(1, 0) }
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				tc.accept(1)
				if n := tc.flood(10000, test.write(tc)); n > test.most {
					t.Errorf("%d were allowed", n)
				}
				tc.wantConnError(CodeEnhanceYourCalm, test.limit)
			})
		})
		t.Run("slow "+test.name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				tc.accept(1)
				write := test.write(tc)
				for range 100 {
					tc.flood(50, write)
					tc.data()
					pass(limitPeriod)
				}
				if len(tc.closed) != 0 {
					t.Errorf("five a second ended the connection: %v", tc.closed)
				}
			}, noPing)
		})
	}
}

func TestRapidReset(t *testing.T) {
	connect := []string{":method", "CONNECT", ":authority", "a:1"}
	variants := map[string]func(tc *testConn, fr *http2.Framer, id uint32){
		"by the client": func(tc *testConn, fr *http2.Framer, id uint32) { fr.WriteRSTStream(id, http2.ErrCodeCancel) },
		// The client makes the server reset instead.
		"by a window update of 0": func(tc *testConn, fr *http2.Framer, id uint32) { fr.WriteWindowUpdate(id, 0) },
		"by a window overflow":    func(tc *testConn, fr *http2.Framer, id uint32) { fr.WriteWindowUpdate(id, 1<<31-1) },
		"by trailers": func(tc *testConn, fr *http2.Framer, id uint32) {
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: true})
		},
		"by data after the end": func(tc *testConn, fr *http2.Framer, id uint32) {
			fr.WriteData(id, true, nil)
			fr.WriteData(id, true, nil)
		},
	}
	for name, reset := range variants {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.conn.cfg.OnStream = func(s *Stream, r Request) { s.Notify(s.Close) }
				tc.greet()
				n := tc.flood(10000, func(fr *http2.Framer, i int) {
					id := uint32(2*i + 1)
					fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: tc.block(connect...)})
					reset(tc, fr, id)
				})
				if n > 1100 {
					t.Errorf("%d were allowed", n)
				}
				tc.wantConnError(CodeEnhanceYourCalm, LimitResets)
			})
		})
	}
}

// Resetting connections that were answered is what applications do.
func TestResetsAfterTheAnswerAreNormal(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.conn.cfg.OnStream = func(s *Stream, r Request) {
			s.Respond(Response{Status: 200})
			s.Notify(func() {
				if s.err != nil {
					s.Close()
				}
			})
		}
		tc.greet()
		tc.flood(5000, func(fr *http2.Framer, i int) {
			id := uint32(2*i + 1)
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: tc.block(":method", "CONNECT", ":authority", "a:1")})
			fr.WriteRSTStream(id, http2.ErrCodeConnect)
		})
		tc.data()
		tc.wantAlive()
	})
}

func TestRefusedFlood(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		n := tc.flood(10000, func(fr *http2.Framer, i int) {
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), EndHeaders: true, BlockFragment: tc.block(":method", "CONNECT", ":authority", "a:1")})
		})
		if n > 1300 {
			t.Errorf("%d were allowed", n)
		}
		tc.wantConnError(CodeEnhanceYourCalm, LimitRefused)
	})
}

func TestBadRequestFlood(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		n := tc.flood(10000, func(fr *http2.Framer, i int) {
			fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), EndHeaders: true, BlockFragment: tc.block(":method", "GET", ":path", "/", ":scheme", "http")})
		})
		if n > 1100 {
			t.Errorf("%d were allowed", n)
		}
		tc.wantConnError(CodeEnhanceYourCalm, LimitBadRequests)
	})
}

func TestContinuationFlood(t *testing.T) {
	t.Run("many", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			tc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			if n := tc.flood(1000, func(fr *http2.Framer, i int) { fr.WriteContinuation(1, false, nil) }); n > 50 {
				t.Errorf("%d were allowed", n)
			}
			tc.wantConnError(CodeEnhanceYourCalm, LimitContinuations)
		})
	})
	t.Run("much", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			tc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			for range 10 {
				tc.fr.WriteContinuation(1, false, make([]byte, 16<<10))
			}
			tc.wantConnError(CodeEnhanceYourCalm, LimitHeaderBlock)
		})
	})
	t.Run("announced", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			tc.raw(head(1<<20, http2.FrameHeaders, 4, 1))
			tc.wantConnError(CodeEnhanceYourCalm, LimitHeaderBlock)
		})
	})
	t.Run("compressed", func(t *testing.T) {
		// One indexed field of 4 KB after the other: a byte each on the wire.
		run(t, func(tc *testConn) {
			tc.greet()
			b := tc.block(":method", "CONNECT", ":authority", "a:1", "x", string(make([]byte, 0)), "y", string(bytes.Repeat([]byte("v"), 3900)))
			b = append(b, bytes.Repeat([]byte{0x80 | 62}, 60<<10)...)
			tc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b, EndHeaders: true})
			tc.want("answer", "HEADERS 1 END_STREAM :status=431", "RST_STREAM 1 NO_ERROR")
			tc.wantAlive()
		})
	})
}

// A peer that sends what must be answered and reads nothing.
func TestRepliesToAPeerThatDoesNotReadAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tc := newTestConn(t, 64<<10, func(c *Config) { c.Limits.Pings = 1 << 30 })
		defer tc.loop.Close()
		tc.greet()
		tc.do(func() { tc.end.Notify(func() {}) })
		most := 0
		tc.flood(1<<20, func(fr *http2.Framer, i int) {
			fr.WritePing(false, [8]byte{})
			most = max(most, cap(tc.conn.out.buf))
		})
		if most > 1<<20 {
			t.Errorf("%d bytes were queued", most)
		}
		tc.do(func() { tc.end.Notify(tc.receive) })
		tc.wantConnError(CodeEnhanceYourCalm, LimitReplies)
	})
}

func TestTinyWindows(t *testing.T) {
	for name, id := range map[string]uint32{"stream": 1, "connection": 0} {
		t.Run(name, func(t *testing.T) {
			run(t, func(tc *testConn) {
				if name == "stream" {
					tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
				} else {
					tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
				}
				s := tc.accept(1)
				p := make([]byte, 1<<10)
				tc.do(func() {
					s.s.Notify(func() {
						for {
							if _, err := s.s.Write(p); err != nil {
								return
							}
						}
					})
				})
				n := 0
				for ; n < 5000 && len(tc.closed) == 0; n++ {
					tc.fr.WriteWindowUpdate(id, 1)
				}
				if n > 1100 {
					t.Errorf("%d were allowed", n)
				}
				tc.wantConnError(CodeEnhanceYourCalm, LimitTinyWindows)
			})
		})
	}
}

// Streams whose peer opens no window cost no more than themselves, however
// much there is to send.
func TestZeroWindowsHoldNoData(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		p := make([]byte, 1<<20)
		for i := range DefaultServerMaxStreams {
			s := tc.accept(uint32(2*i + 1))
			tc.do(func() {
				if n, _ := s.s.Write(p); n != 0 {
					t.Errorf("took %d bytes", n)
				}
				if s.s.Reserve(1000) != nil {
					t.Error("gave room")
				}
			})
		}
		if n := tc.conn.queued(); n != 0 {
			t.Errorf("%d bytes queued", n)
		}
	})
}

// The same with the connection's window, and streams that come and go: those
// that wait for it must not be remembered after their end.
func TestWaitersAreForgotten(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		tc.accept(1).fill()
		for id := uint32(3); id < 500; id += 2 {
			tc.accept(id).fill()
			tc.fr.WriteRSTStream(id, http2.ErrCodeCancel)
		}
		tc.do(func() {
			if n := len(tc.conn.out.waiters); n > 1 {
				t.Errorf("%d streams wait", n)
			}
		})
	})
}

// What a stalled user leaves lying is bounded by the connection's window.
func TestKeptDataIsBounded(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		chunk := make([]byte, 64<<10)
		for i := range 100 {
			tc.accept(uint32(2*i + 1))
			for range 4 {
				tc.fr.WriteData(uint32(2*i+1), false, chunk)
			}
			if len(tc.closed) > 0 {
				break
			}
		}
		tc.wantConnError(CodeFlowControl, "")
	}, func(c *Config) { c.ConnWindow = 4 << 20 })
}

// One byte kept in each of many streams must not cost a large buffer each.
func TestKeptCrumbsAreCheap(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for i := range 200 {
			tc.accept(uint32(2*i + 1))
			tc.fr.WriteData(uint32(2*i+1), false, []byte("x"))
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 200*8<<10 {
			t.Errorf("%d bytes for each stream", n/200)
		}
	})
}

func TestFramesOnClosedStreams(t *testing.T) {
	t.Run("that ended cleanly", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.accept(1)
			tc.fr.WriteData(1, true, nil)
			s.closeWrite()
			tc.fr.WriteWindowUpdate(1, 10)
			tc.fr.WriteRSTStream(1, 0)
			tc.skip(1)
			tc.wantAlive()
			tc.fr.WriteData(1, false, []byte("x"))
			tc.wantConnError(CodeStreamClosed, "")
		})
	})
	t.Run("that were reset", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.accept(1)
			tc.do(func() { s.s.Reset(ErrCancel) })
			n := tc.flood(1<<20, func(fr *http2.Framer, i int) { fr.WriteData(1, false, []byte("0123456789")) })
			if n > 2*DefaultInitialWindow/10 {
				t.Errorf("%d frames were ignored", n)
			}
			tc.wantConnError(CodeStreamClosed, "")
		})
	})
	// "An endpoint MUST minimally process and then discard any frames it
	// receives in this state." https://www.rfc-editor.org/rfc/rfc9113#section-5.1
	t.Run("that were reset, with a window of small frames under way", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s, neighbour := tc.accept(1), tc.accept(3)
			tc.do(func() { s.s.Reset(ErrCancel) })
			tc.flood(DefaultInitialWindow, func(fr *http2.Framer, i int) { fr.WriteData(1, false, []byte("x")) })
			if err := neighbour.s.Failure(); err != nil {
				t.Errorf("a neighbour failed: %v", err)
			}
			tc.data()
			tc.wantAlive()
		})
	})
	t.Run("opened again", func(t *testing.T) {
		run(t, func(tc *testConn) {
			tc.greet()
			s := tc.accept(5)
			tc.fr.WriteData(5, true, nil)
			s.closeWrite()
			tc.headers(3, false, ":method", "CONNECT", ":authority", "a:1")
			tc.wantConnError(CodeStreamClosed, "")
		})
	})
}

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r rate
		for i := range 10 {
			if r.over(10) {
				t.Fatalf("over after %d", i+1)
			}
		}
		if !r.over(10) {
			t.Error("11 of 10 are not over")
		}
		r = rate{}
		for range 1000 {
			if r.over(10) {
				t.Fatal("9 in 10 s are over")
			}
			time.Sleep(limitPeriod/10 + time.Second/4)
		}
	})
}
