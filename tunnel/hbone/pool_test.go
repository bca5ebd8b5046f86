package hbone_test

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/splice"
)

// inBubble runs test on a fresh bench under synctest.
func inBubble(t *testing.T, edit func(*hbone.PoolConfig), test func(t *testing.T, b *bench)) {
	synctest.Test(t, func(t *testing.T) { test(t, newBench(t, edit)) })
}

func (b *bench) wantConns(want int64) {
	b.t.Helper()
	if got := b.pool.Stats().Conns.Load(); got != want {
		b.t.Errorf("%d connections are open, want %d", got, want)
	}
}

func (b *bench) wantDials(want int) {
	b.t.Helper()
	b.loop.Do(func() {
		if b.net.dials != want {
			b.t.Errorf("%d dials, want %d", b.net.dials, want)
		}
	})
}

func (b *bench) wantAll(calls []*call, what error) {
	b.t.Helper()
	for i, c := range calls {
		switch done, err := b.outcome(c); {
		case !done:
			b.t.Errorf("call %d has no answer", i)
		case !errors.Is(err, what):
			b.t.Errorf("call %d: %v, want %v", i, err, what)
		}
	}
}

// outcome reads a call on the loop.
func (b *bench) outcome(c *call) (done bool, err error) {
	b.loop.Do(func() { done, err = c.done, c.err })
	return done, err
}

func TestPoolSharesOneConnectionAmongABurst(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		calls := b.connect(100, target())
		synctest.Wait()
		b.wantAll(calls, nil)
		b.wantDials(1)
		b.wantConns(1)
		if got := calls[0].tunnel.Peer; got != idB {
			t.Errorf("Peer = %v, want %v", got, idB)
		}
	})
}

func TestPoolDialsMoreWhenFullAndReusesWhenStreamsEnd(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		calls := b.connect(250, target())
		synctest.Wait()
		b.wantAll(calls, nil)
		b.wantDials(3)
		b.end(calls)
		synctest.Wait()
		calls = b.connect(300, target())
		synctest.Wait()
		b.wantAll(calls, nil)
		b.wantDials(3)
		b.wantConns(3)
	})
}

func TestPoolWithOneStreamAConnection(t *testing.T) {
	inBubble(t, func(c *hbone.PoolConfig) { c.H2.MaxStreams = 1 }, func(t *testing.T, b *bench) {
		calls := b.connect(3, target())
		synctest.Wait()
		b.wantAll(calls, nil)
		b.wantDials(3)
	})
}

// What the peer announces counts, even if it becomes known late.
func TestPoolKeepsToThePeersLimit(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		other := netip.MustParseAddrPort("10.0.0.9:15008")
		s := b.serve(other, idB, accept, h2.Config{MaxStreams: 3})
		defer b.loop.Do(s.Close)
		to := target()
		to.Dst = other
		first := b.connect(1, to)
		synctest.Wait()
		calls := append(first, b.connect(8, to)...)
		synctest.Wait()
		b.wantAll(calls, nil)
		b.wantConns(3)
		b.loop.Do(b.pool.Close)
	})
}

func TestPoolNeverSharesAcrossTargets(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		all := b.connect(1, target())
		synctest.Wait()
		for _, edit := range []func(*hbone.Target){
			func(t *hbone.Target) { t.Peer = "another pod that took over the address" },
			func(t *hbone.Target) { t.Src = netip.MustParseAddr("10.0.0.7") },
			func(t *hbone.Target) { t.Want = append(t.Want, idA) },
		} {
			to := target()
			edit(&to)
			all = append(all, b.connect(1, to)...)
			synctest.Wait()
		}
		b.wantAll(all, nil)
		b.wantDials(4)
		same := target()
		same.Want = []identity.ID{idA, idB} // the order says nothing
		b.wantAll(waited(b.connect(1, same)), nil)
		b.wantDials(4)
	})
}

func waited(calls []*call) []*call { synctest.Wait(); return calls }

// The pod's address now belongs to a pod of another identity.
func TestPoolRefusesAPeerOfTheWrongIdentity(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		to := target()
		to.Want = []identity.ID{identity.MustParse("spiffe://cluster.local/ns/default/sa/other")}
		calls := waited(b.connect(2, to))
		b.wantAll(calls, certs.ErrPeer)
		b.wantDials(1)
		b.wantConns(0)
		var at *hbone.ConnectError
		if !errors.As(calls[0].err, &at) || at.Stage != hbone.StageHandshake {
			t.Errorf("err = %v, want one of the handshake", calls[0].err)
		}
	})
}

func TestPoolDialFailureAnswersAllOnce(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		to := target()
		to.Dst = netip.MustParseAddrPort("10.0.0.3:15008")
		calls := waited(b.connect(50, to))
		b.wantAll(calls, syscall.ECONNREFUSED)
		b.wantDials(1)
		b.wantAll(waited(b.connect(1, to)), syscall.ECONNREFUSED)
		b.wantDials(2)
	})
}

func TestPoolDialTimesOut(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		to := target()
		to.Dst = netip.MustParseAddrPort("10.0.0.3:15008")
		b.loop.Do(func() { b.net.listeners[to.Dst] = nil })
		calls := b.connect(3, to)
		time.Sleep(10*time.Second - time.Nanosecond)
		if done, _ := b.outcome(calls[0]); done {
			t.Error("answered too early")
		}
		time.Sleep(time.Nanosecond)
		b.wantAll(waited(calls), syscall.ETIMEDOUT)
	})
}

func TestPoolHandshakeTimesOut(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		to := target()
		to.Dst = netip.MustParseAddrPort("10.0.0.3:15008")
		b.loop.Do(func() { b.net.listeners[to.Dst] = func(splice.End, netip.AddrPort) {} })
		calls := b.connect(3, to)
		time.Sleep(10 * time.Second)
		b.wantAll(waited(calls), hbone.ErrHandshakeTimeout)
	})
}

func TestPoolAnswerTimesOutAndTheTunnelStays(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		var held []*hbone.Incoming
		b.handle = func(in *hbone.Incoming) { held = append(held, in) }
		calls := b.connect(2, target())
		time.Sleep(16 * time.Second)
		b.wantAll(waited(calls), hbone.ErrTimeout)
		b.loop.Do(func() {
			for _, in := range held {
				in.Refuse(503, "")
			}
			b.handle = accept
		})
		b.wantAll(waited(b.connect(1, target())), nil)
		b.wantDials(1)
	})
}

func TestPoolTellsWhyThePeerRefused(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		b.handle = func(in *hbone.Incoming) { in.Refuse(503, hbone.ConnectionRefused) }
		c := waited(b.connect(1, target()))[0]
		var status *hbone.StatusError
		if !errors.As(c.err, &status) || *status != (hbone.StatusError{Status: 503, Proxy: hbone.ConnectionRefused}) {
			t.Errorf("err = %v", c.err)
		}
		b.loop.Do(func() { b.handle = func(in *hbone.Incoming) { in.Refuse(401, "") } })
		c = waited(b.connect(1, target()))[0]
		if got, want := c.err.Error(), "http status: 401 Unauthorized"; got != want {
			t.Errorf("err = %q, want %q", got, want)
		}
		b.wantDials(1)
	})
}

func TestPoolCancelOfOneLeavesTheOthers(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		calls := b.connectAnd(3, target(), func(calls []*call) { calls[1].cancel() })
		synctest.Wait()
		if calls[1].done {
			t.Error("the cancelled call was answered")
		}
		b.wantAll([]*call{calls[0], calls[2]}, nil)

		var held *hbone.Incoming
		var gone error
		b.handle = func(in *hbone.Incoming) { held = in; in.Watch(func(err error) { gone = err }) }
		sent := waited(b.connect(1, target()))[0]
		b.loop.Do(sent.cancel)
		synctest.Wait()
		if sent.done || !errors.Is(gone, splice.ErrReset) {
			t.Errorf("done = %v; the server saw %v, want a reset", sent.done, gone)
		}
		b.loop.Do(func() { held.Refuse(503, "") })
		if got := b.pool.Stats().Waiting.Load(); got != 0 {
			t.Errorf("%d wait", got)
		}
	})
}

func TestPoolReleasesIdleConnections(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		calls := waited(b.connect(1, target()))
		time.Sleep(time.Hour) // a stream keeps its connection
		synctest.Wait()
		b.wantConns(1)
		b.end(calls)
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		b.wantConns(1)
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		b.wantConns(0)
		b.wantAll(waited(b.connect(1, target())), nil)
		b.wantDials(2)
	})
}

func TestPoolLeavesAConnectionThatGoesAway(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		old := waited(b.connect(1, target()))
		next := b.serve(addrB, idB, accept, h2.Config{})
		b.loop.Do(b.server.Drain)
		synctest.Wait()
		fresh := waited(b.connect(1, target()))
		b.wantAll(fresh, nil)
		b.wantDials(2)
		if old[0].tunnel.Stream.Conn() == fresh[0].tunnel.Stream.Conn() {
			t.Error("a stream was opened on a connection that goes away")
		}
		b.loop.Do(func() {
			if n, err := old[0].tunnel.Stream.Write([]byte("x")); n != 1 || err != nil {
				t.Errorf("the old stream ended: %v", err)
			}
		})
		b.end(old)
		synctest.Wait()
		b.wantConns(1)
		b.loop.Do(func() { b.pool.Close(); next.Close() })
	})
}

// The GOAWAY and the CONNECT cross: the peer says that it has not acted on it.
func TestPoolRetriesWhatThePeerDidNotProcess(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		other := netip.MustParseAddrPort("10.0.0.9:15008")
		s := b.serve(other, idB, accept, h2.Config{MaxStreams: 1})
		to := target()
		to.Dst = other
		// All three are sent before the peer's limit of one is known.
		calls := waited(b.connect(3, to))
		ok, failed := count(calls)
		t.Logf("%d answered, %d failed, %d retries", ok, failed, b.pool.Stats().Retries.Load())
		if ok == 0 || b.pool.Stats().Retries.Load() == 0 {
			t.Errorf("%d answered after %d retries", ok, b.pool.Stats().Retries.Load())
		}
		b.loop.Do(func() { b.pool.Close(); s.Close() })
	})
}

// A peer that was restarted is found out by the first CONNECT.
func TestPoolRetriesOnceWhenAnOldConnectionTurnsOutDead(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		b.end(waited(b.connect(1, target())))
		synctest.Wait()
		b.loop.Do(func() {
			end := b.net.ends[0]
			b.handle = func(in *hbone.Incoming) {
				b.handle = accept
				end.Reset(errors.New("test"))
			}
		})
		calls := waited(b.connect(1, target()))
		b.wantAll(calls, nil)
		b.wantDials(2)
	})
}

func TestPoolNeverRetriesOnAFreshConnection(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		b.handle = func(in *hbone.Incoming) { b.net.ends[len(b.net.ends)-1].Reset(errors.New("test")) }
		b.wantAll(waited(b.connect(1, target())), h2.ErrConnLost)
		b.wantDials(1)
	})
}

func TestPoolRetiresConnectionsAfterRotation(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		old := waited(b.connect(1, target()))
		b.source.set(b.ca.Issue(idA))
		fresh := waited(b.connect(1, target()))
		b.wantAll(fresh, nil)
		b.wantDials(2)
		b.wantConns(2)
		b.end(old)
		synctest.Wait()
		b.wantConns(1)
	})
}

func TestPoolWaitsForTheCertificate(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		cert, _ := b.source.Current(idA)
		b.source.wait = make(chan struct{})
		delete(b.source.certs, idA)
		calls := waited(b.connect(3, target()))
		if done, err := b.outcome(calls[0]); done {
			t.Fatalf("answered: %v", err)
		}
		b.source.set(cert)
		close(b.source.wait)
		b.wantAll(waited(calls), nil)
		if b.source.gets != 1 {
			t.Errorf("%d Gets, want 1", b.source.gets)
		}
	})
}

func TestPoolWithoutACertificate(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		delete(b.source.certs, idA)
		calls := waited(b.connect(3, target()))
		b.wantAll(calls, certs.ErrUnavailable)
		var at *hbone.ConnectError
		if !errors.As(calls[0].err, &at) || at.Stage != hbone.StageCertificate {
			t.Errorf("err = %v, want one of the certificate", calls[0].err)
		}
		b.wantDials(0)
	})
}

func TestPoolBoundsItsConnections(t *testing.T) {
	inBubble(t, func(c *hbone.PoolConfig) { c.MaxConns = 2 }, func(t *testing.T, b *bench) {
		to := make([]hbone.Target, 3)
		for i := range to {
			to[i] = target()
			to[i].Peer = string(rune('a' + i))
		}
		first := waited(b.connect(1, to[0]))
		second := waited(b.connect(1, to[1]))
		b.wantAll(append(first, second...), nil)
		b.wantAll(waited(b.connect(1, to[2])), hbone.ErrLimit)
		b.end(first)
		synctest.Wait()
		b.wantAll(waited(b.connect(1, to[2])), nil) // the idle one made room
		b.wantConns(2)
	})
}

func TestPoolBoundsItsDials(t *testing.T) {
	inBubble(t, func(c *hbone.PoolConfig) { c.MaxDials = 2 }, func(t *testing.T, b *bench) {
		silent := netip.MustParseAddrPort("10.0.0.3:15008")
		b.loop.Do(func() { b.net.listeners[silent] = nil })
		var calls []*call
		for i := range 3 {
			to := target()
			to.Peer, to.Dst = string(rune('a'+i)), silent
			calls = append(calls, b.connect(1, to)...)
		}
		good := b.connect(1, target())
		synctest.Wait()
		b.wantDials(2)
		time.Sleep(10 * time.Second)
		b.wantAll(waited(good), nil)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if _, failed := count(calls); failed != 3 {
			t.Errorf("%d failed, want 3", failed)
		}
	})
}

func TestPoolBoundsItsWaiters(t *testing.T) {
	inBubble(t, func(c *hbone.PoolConfig) { c.MaxWaiters = 10 }, func(t *testing.T, b *bench) {
		calls := waited(b.connect(12, target()))
		if ok, failed := count(calls); ok != 10 || failed != 2 {
			t.Errorf("%d answered and %d failed, want 10 and 2", ok, failed)
		}
		b.wantAll(calls[10:], hbone.ErrLimit)
	})
}

func TestPoolCloseAnswersEveryone(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		var ended error
		calls := waited(b.connect(1, target()))
		b.loop.Do(func() {
			s := calls[0].tunnel.Stream
			s.Notify(func() {
				if _, err := s.Read(make([]byte, 1)); !errors.Is(err, splice.ErrAgain) {
					ended = err
				}
			})
		})
		other := target()
		other.Peer = "other"
		pending := b.connect(2, other)
		b.loop.Do(b.pool.Close)
		b.wantAll(waited(pending), hbone.ErrClosed)
		b.wantAll(waited(b.connect(1, target())), hbone.ErrClosed)
		if !errors.Is(ended, splice.ErrReset) {
			t.Errorf("the stream ended with %v, want a reset", ended)
		}
	})
}

func TestPoolDrainFinishesWhatIsOpen(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		calls := waited(b.connect(1, target()))
		b.loop.Do(b.pool.Drain)
		b.wantAll(waited(b.connect(1, target())), hbone.ErrDraining)
		b.wantConns(1)
		b.end(calls)
		synctest.Wait()
		b.wantConns(0)
	})
}

func TestPoolRetireByTarget(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		b.end(waited(b.connect(1, target())))
		synctest.Wait()
		b.loop.Do(func() { b.pool.Retire(func(t hbone.Target) bool { return t.Peer == "other" }) })
		synctest.Wait()
		b.wantConns(1)
		b.loop.Do(func() { b.pool.Retire(func(t hbone.Target) bool { return t.Peer == "uid-b" }) })
		synctest.Wait()
		b.wantConns(0)
	})
}

func TestPoolManyTargets(t *testing.T) {
	inBubble(t, nil, func(t *testing.T, b *bench) {
		var all []*call
		for i := range 100 {
			to := target()
			to.Src = netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
			all = append(all, b.connect(3, to)...)
		}
		b.wantAll(waited(all), nil)
		b.wantDials(100)
	})
}
