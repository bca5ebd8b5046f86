package h2

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
)

// fill writes until there is no more room and returns how much went.
func (ts *testStream) fill() (n int) {
	ts.tc.t.Helper()
	ts.tc.do(func() {
		for {
			m, err := ts.s.Write(make([]byte, 10000))
			n += m
			if err != nil {
				if !errors.Is(err, splice.ErrAgain) {
					ts.tc.t.Errorf("Write: %v", err)
				}
				return
			}
		}
	})
	return n
}

// data sums up the DATA frames that the Conn sent, and skips all others.
func (tc *testConn) data() map[uint32]int {
	sums := map[uint32]int{}
	tc.do(func() {
		for tc.got.Len() > 0 {
			f, err := tc.fr.ReadFrame()
			if err != nil {
				tc.t.Errorf("ReadFrame: %v", err)
				return
			}
			if d, ok := f.(*http2.DataFrame); ok {
				sums[d.StreamID] += len(d.Data())
			}
		}
	})
	return sums
}

func TestStreamWindowStopsWriter(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000})
		s := tc.accept(1)
		if n := s.fill(); n != 1000 {
			t.Errorf("wrote %d bytes, want the window of 1000", n)
		}
		ready := s.ready
		tc.fr.WriteWindowUpdate(1, 10)
		if s.ready == ready {
			t.Error("not notified")
		}
		if n := s.fill(); n != 10 {
			t.Errorf("wrote %d bytes, want 10", n)
		}
		if n := tc.data()[1]; n != 1010 {
			t.Errorf("%d bytes arrived", n)
		}
	})
}

func TestConnWindowStopsWriters(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		a, b := tc.accept(1), tc.accept(3)
		if n := a.fill(); n != initialWindow {
			t.Errorf("wrote %d bytes, want the connection's %d", n, initialWindow)
		}
		if n := b.fill(); n != 0 {
			t.Errorf("the other stream wrote %d bytes past the connection's window", n)
		}
		readyA, readyB := a.ready, b.ready
		tc.fr.WriteWindowUpdate(0, 100)
		if a.ready == readyA || b.ready == readyB {
			t.Error("not notified")
		}
		if n := b.fill(); n != 100 {
			t.Errorf("wrote %d bytes, want 100", n)
		}
	})
}

func TestInitialWindowMayTurnNegative(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
		s := tc.accept(1)
		s.fill()
		tc.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 40})
		tc.fr.WriteWindowUpdate(1, 60)
		if n := s.fill(); n != 0 {
			t.Errorf("wrote %d bytes with a window of 0", n)
		}
		tc.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 45})
		if n := s.fill(); n != 5 {
			t.Errorf("wrote %d bytes with a window of 5", n)
		}
		if n := tc.accept(3).fill(); n != 45 {
			t.Errorf("new stream wrote %d bytes, want 45", n)
		}
	})
}

func TestMaxFrameSizeOfPeer(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		s.write(strings.Repeat("x", 40000))
		tc.want("default", "DATA 1 len=16384", "DATA 1 len=16384", "DATA 1 len=7232")
		tc.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
		tc.fr.WriteWindowUpdate(0, 1<<20)
		tc.fr.WriteWindowUpdate(1, 1<<20)
		s.write(strings.Repeat("x", 100000))
		tc.want("larger", "SETTINGS ACK", "DATA 1 len=65277", "DATA 1 len=34723")
	})
}

// A transport that takes nothing stops the writers at a bound, and they go on
// when it does.
func TestPendingOutputIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tc := newTestConn(t, 4<<10)
		defer tc.loop.Close()
		tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 8 << 20}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
		tc.fr.WriteWindowUpdate(0, 8<<20)
		s := tc.accept(1)
		tc.do(func() { tc.end.Notify(func() {}) }) // the peer stops reading
		n := s.fill()
		if n < maxPending || n > maxPending+2*bulkFrame+64<<10 {
			t.Errorf("%d bytes were taken by a transport that takes nothing, bound %d", n, maxPending)
		}
		ready := s.ready
		tc.do(func() { tc.end.Notify(tc.receive) })
		if s.ready == ready {
			t.Error("not notified")
		}
		if got := tc.data()[1]; got != n {
			t.Errorf("%d bytes arrived, want %d", got, n)
		}
		if m := s.fill(); m == 0 {
			t.Error("no room after the transport took everything")
		}
	})
}

// Many streams share the connection's room: none gets a second turn before
// the others had one.
func TestWritersTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tc := newTestConn(t, 4<<10)
		defer tc.loop.Close()
		tc.greet(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 8 << 20}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20})
		tc.fr.WriteWindowUpdate(0, 1<<30)
		const n = 8
		var sent [n]int
		var streams [n]*testStream
		for i := range streams {
			streams[i] = tc.accept(uint32(2*i + 1))
		}
		const total = 4 << 20
		tc.do(func() {
			for i, ts := range streams {
				ts.s.Notify(func() {
					for sent[i] < total {
						m, err := ts.s.Write(make([]byte, min(64<<10, total-sent[i])))
						sent[i] += m
						if err != nil {
							return
						}
						if lead := sent[i] - sent[(i+1)%n]; lead > 2*maxPending {
							t.Errorf("stream %d leads by %d bytes", i, lead)
						}
					}
				})
			}
		})
		for id, got := range tc.data() {
			if got != total {
				t.Errorf("stream %d: %d bytes arrived", id, got)
			}
		}
	})
}

func TestWindowUpdateOnlyForWhatWasTaken(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		chunk := make([]byte, 16<<10)
		for range 16 {
			tc.fr.WriteData(1, false, chunk)
		}
		tc.want("nothing was taken")
		if kept := tc.conn.Stats().DataKept; kept != 256<<10 {
			t.Errorf("DataKept = %d", kept)
		}
		tc.do(func() { s.s.Read(make([]byte, 60<<10)) })
		tc.want("less than a quarter was taken")
		tc.do(func() { s.s.Read(make([]byte, 10<<10)) })
		tc.want("more than a quarter was taken", "WINDOW_UPDATE 1 +71680")
		tc.fr.WriteData(1, false, chunk)
		tc.wantAlive()
	}, noPing)
}

func TestConnWindowIsGivenBack(t *testing.T) {
	for _, how := range []string{"read", "unread and reset", "unread and closed after the end", "reset by peer", "late", "padding"} {
		t.Run(how, func(t *testing.T) {
			run(t, func(tc *testConn) {
				tc.greet()
				chunk := make([]byte, 16000)
				var updates, sent int
				for id := uint32(1); updates < 2 && sent < 64<<20; id += 2 {
					s := tc.accept(id)
					if how == "late" {
						tc.do(func() { s.s.Reset(ErrCancel) })
					}
					for range 10 {
						if how == "padding" {
							tc.fr.WriteDataPadded(id, false, []byte("x"), make([]byte, 255))
							sent += 257
							s.read()
							continue
						}
						tc.fr.WriteData(id, false, chunk)
						sent += len(chunk)
					}
					switch how {
					case "read":
						s.read()
						tc.do(s.s.Close)
					case "unread and reset":
						tc.do(func() { s.s.Reset(ErrCancel) })
					case "unread and closed after the end":
						tc.fr.WriteData(id, true, nil)
						s.closeWrite()
						tc.do(s.s.Close)
					case "reset by peer":
						tc.fr.WriteRSTStream(id, http2.ErrCodeCancel)
						tc.do(s.s.Close)
					case "padding":
						tc.do(s.s.Close)
					}
					for f := tc.next(); f != ""; f = tc.next() {
						if strings.HasPrefix(f, "WINDOW_UPDATE +") {
							updates++
						}
						if strings.HasPrefix(f, "GOAWAY") {
							t.Fatalf("%s after %d bytes", f, sent)
						}
					}
					if kept := tc.conn.Stats().DataKept; kept != 0 {
						t.Fatalf("%d bytes kept", kept)
					}
				}
				if updates < 2 {
					t.Errorf("%d updates of the connection's window for %d bytes", updates, sent)
				}
			}, noPing, func(c *Config) {
				c.ConnWindow, c.MaxWindow = 512<<10, 256<<10
				if how == "padding" {
					c.ConnWindow, c.MaxWindow, c.InitialWindow = 65535, 65535, 65535
				}
			})
		})
	}
}

// feed sends n bytes in chunks that fit the Conn's windows and takes them at
// the given rate, and returns the increments of the stream's window.
func (tc *testConn) feed(id uint32, chunk, n int, every time.Duration, take func()) (sum int) {
	for range n {
		tc.fr.WriteData(id, false, make([]byte, chunk))
		take()
		time.Sleep(every)
		for f := tc.next(); f != ""; f = tc.next() {
			var inc int
			if _, err := fmt.Sscanf(f, fmt.Sprintf("WINDOW_UPDATE %d +%%d", id), &inc); err == nil {
				sum += inc
			} else if strings.HasPrefix(f, "GOAWAY") {
				tc.t.Fatal(f)
			}
		}
	}
	return sum
}

func TestWindowGrowsWhileItDrains(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		sum := tc.feed(1, 16<<10, 4000, time.Millisecond, func() { s.read() })
		if size := tc.conn.streams[1].recv.size; size < 1<<20 || size > 4<<20 {
			t.Errorf("window grew to %d at 16 MB/s", size)
		}
		if win, extra := tc.conn.streams[1].recv.win, sum-4000*16<<10; win < 1<<20*3/4 {
			t.Errorf("peer may send %d, was given %d more than it sent", win, extra)
		}
	}, noPing)
}

func TestWindowStaysWhenDrainedSlowly(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		tc.feed(1, 16<<10, 500, 20*time.Millisecond, func() { s.read() })
		if size := tc.conn.streams[1].recv.size; size != 256<<10 {
			t.Errorf("window grew to %d at 0.8 MB/s", size)
		}
	}, noPing)
}

func TestWindowNeverExceedsItsMaximum(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		tc.feed(1, 16<<10, 4000, 0, func() { s.read() })
		if size := tc.conn.streams[1].recv.size; size != 1<<20 {
			t.Errorf("window grew to %d, want 1 MiB", size)
		}
		if win := tc.conn.streams[1].recv.win; win > 1<<20 {
			t.Errorf("peer may send %d", win)
		}
	}, noPing, func(c *Config) { c.MaxWindow = 1 << 20 })
}

func TestWindowShrinksWhenLeftLying(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		tc.feed(1, 16<<10, 4000, 0, func() { s.read() })
		for range 10 {
			win := int(tc.conn.streams[1].recv.win)
			for ; win >= 16<<10; win -= 16 << 10 {
				tc.fr.WriteData(1, false, make([]byte, 16<<10))
			}
			s.read()
			tc.data()
		}
		if size := tc.conn.streams[1].recv.size; size != 256<<10 {
			t.Errorf("window is %d, want 256 KiB again", size)
		}
		if win := tc.conn.streams[1].recv.win; win < 128<<10 || win > 256<<10 {
			t.Errorf("peer may send %d", win)
		}
	}, noPing)
}

func TestDataAcrossManyPassesArrivesInOrder(t *testing.T) {
	run(t, func(tc *testConn) {
		tc.greet()
		s := tc.accept(1)
		var got bytes.Buffer
		tc.do(func() { s.s.Push(func(p []byte) int { got.Write(p); return len(p) }) })
		var want, frames bytes.Buffer
		fr := http2.NewFramer(&frames, nil)
		for i := range 40 {
			p := bytes.Repeat([]byte{byte(i)}, 1+i*131)
			want.Write(p)
			fr.WriteData(1, false, p)
		}
		tc.raw(frames.Bytes())
		if !bytes.Equal(got.Bytes(), want.Bytes()) {
			t.Errorf("%d bytes arrived, want %d, or not the same", got.Len(), want.Len())
		}
	})
}
