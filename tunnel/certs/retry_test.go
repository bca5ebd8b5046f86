package certs_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/identity"
)

var (
	errUnknownPod = status.Error(codes.Unauthenticated, "request impersonation authentication failure")
	errGone       = status.Error(codes.Unavailable, "connection refused")
)

// loud returns the lines of log above INFO.
func loud(log string) (lines []string) {
	for l := range strings.Lines(log) {
		if strings.Contains(l, "level=WARN") || strings.Contains(l, "level=ERROR") {
			lines = append(lines, l)
		}
	}
	return lines
}

// istiod learns of a pod a little later than we do.
func TestNewPodIsRetriedQuietly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBook
		g := newGate(true)
		g.fail(errUnknownPod)
		m := run(t, certs.Config{CA: g, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		start := time.Now()
		time.AfterFunc(2500*time.Millisecond, func() { g.fail(nil) })
		m.Prefetch(web)
		time.Sleep(100 * time.Millisecond)
		if s := state(m, web); s != "Initializing" {
			t.Errorf("state %q after a refusal", s)
		}
		cert, err := m.Get(t.Context(), web, certs.RealTime)
		if err != nil || cert == nil {
			t.Fatalf("Get: %v, want it to wait for istiod", err)
		}
		if d := time.Since(start); d > 4*time.Second {
			t.Errorf("it took %v", d)
		}
		if n := len(g.asked()); n < 2 || n > 4 {
			t.Errorf("asked %d times", n)
		}
		if lines := loud(log.String()); len(lines) > 0 {
			t.Errorf("logged %q", lines)
		}
		if !strings.Contains(log.String(), "level=DEBUG") {
			t.Errorf("not even a debug line: %s", log.String())
		}
	})
}

func TestPodThatStaysUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBook
		g := newGate(true)
		g.fail(errUnknownPod)
		m := run(t, certs.Config{CA: g, Log: log.logger()})
		start := time.Now()
		_, err := m.Get(t.Context(), web, certs.RealTime)
		if d := time.Since(start); !errors.Is(err, certs.ErrUnavailable) || status.Code(err) != codes.Unauthenticated || d != 10*time.Second {
			t.Errorf("Get after %v: %v, want the refusal after 10s", d, err)
		}
		synctest.Wait()
		if lines := loud(log.String()); len(lines) != 1 || !strings.Contains(lines[0], web.String()) || !strings.Contains(lines[0], "impersonation") {
			t.Errorf("logged %q, want one line that names the identity and the refusal", lines)
		}
		if s := state(m, web); !strings.HasPrefix(s, "Unavailable: ") {
			t.Errorf("state %q", s)
		}
		time.Sleep(4 * time.Minute)
		if lines := loud(log.String()); len(lines) != 1 {
			t.Errorf("logged %q, want no more lines", lines)
		}
		time.Sleep(6 * time.Minute)
		if lines := loud(log.String()); len(lines) != 2 {
			t.Errorf("logged %q, want one reminder", lines)
		}
		if n := len(g.asked()); n < 8 || n > 14 {
			t.Errorf("asked %d times in ten minutes", n)
		}
	})
}

// Only what a new pod must expect is quiet, and only as long as it is new.
func TestWhatIsNotQuiet(t *testing.T) {
	for name, tt := range map[string]struct {
		err     error
		renewal bool
	}{
		"istiod is gone":             {errGone, false},
		"another refusal":            {status.Error(codes.PermissionDenied, "no"), false},
		"a renewal that is refused":  {errUnknownPod, true},
		"a renewal, istiod is gone":  {errGone, true},
		"an answer that is no chain": {errors.New("garbage"), false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log logBook
				g := newGate(true)
				m := run(t, certs.Config{CA: g, Log: log.logger(), TTL: time.Second * 4})
				if tt.renewal {
					if _, err := m.Get(t.Context(), web, certs.RealTime); err != nil {
						t.Fatal(err)
					}
				}
				g.fail(tt.err)
				if !tt.renewal {
					if _, err := m.Get(t.Context(), web, certs.RealTime); !errors.Is(err, tt.err) {
						t.Errorf("Get: %v", err)
					}
				}
				time.Sleep(2500 * time.Millisecond)
				synctest.Wait()
				if lines := loud(log.String()); len(lines) != 1 {
					t.Errorf("logged %q, want one line", lines)
				}
				if _, ok := m.Current(web); ok != tt.renewal {
					t.Errorf("Current has a certificate: %v", ok)
				}
				g.fail(errors.New("another text"))
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if lines := loud(log.String()); len(lines) != 2 {
					t.Errorf("logged %q, want one line for each failure", lines)
				}
			})
		})
	}
}

// That istiod is away is one piece of news, however many pods there are.
func TestAwayIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBook
		g := newGate(true)
		m := run(t, certs.Config{CA: g, Log: log.logger()})
		for range 2 { // It comes back in between.
			g.fail(errGone)
			log.take()
			for n := range 50 {
				m.Forget(id(n))
				m.Prefetch(id(n))
			}
			time.Sleep(4 * time.Minute)
			synctest.Wait()
			if lines := loud(log.String()); len(lines) != 1 || !strings.Contains(lines[0], "connection refused") {
				t.Errorf("logged %d lines: %.400q, want one", len(lines), lines)
			}
			g.fail(nil)
			m.Retry()
			time.Sleep(2 * time.Second)
			synctest.Wait()
		}
		g.fail(status.Error(codes.PermissionDenied, "no"))
		log.take()
		for n := range 3 {
			m.Forget(id(n))
			m.Prefetch(id(n))
		}
		time.Sleep(time.Second)
		if lines := loud(log.String()); len(lines) != 3 {
			t.Errorf("logged %q, want a line for each identity that is refused", lines)
		}
	})
}

// What waits out its back-off does not have to once istiod is known to be back.
func TestRetryWhenIstiodIsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(true)
		m := run(t, certs.Config{CA: g, TTL: time.Hour})
		if _, err := m.Get(t.Context(), id(0), certs.RealTime); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Minute)
		g.fail(errGone)
		for n := 1; n < 5; n++ {
			m.Prefetch(id(n))
		}
		time.Sleep(25 * time.Minute)
		before := len(g.asked())
		for range 1000 {
			m.Retry() // Nobody can make it ask faster than once a second.
			time.Sleep(10 * time.Millisecond)
		}
		if n := len(g.asked()) - before; n < 5 || n > 5*11 {
			t.Errorf("asked %d times in ten seconds for five identities", n)
		}
		if _, ok := m.Current(id(0)); !ok {
			t.Error("the old certificate does not serve on")
		}
		time.Sleep(5 * time.Minute)
		g.fail(nil)
		m.Retry()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for _, s := range m.Dump() {
			if s.State != "Available" || s.Err != nil || time.Until(s.Cert.NotAfter) < 59*time.Minute {
				t.Errorf("%v: %s, %v, %v", s.ID, s.State, s.Err, s.Cert)
			}
		}
	})
}

// So it is when another request was answered.
func TestOneAnswerIsNewsToTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(true)
		m := run(t, certs.Config{CA: g})
		g.fail(status.Error(codes.PermissionDenied, "never"))
		m.Prefetch(id(9))
		time.Sleep(time.Second)
		g.fail(errGone)
		for n := range 4 {
			m.Prefetch(id(n))
		}
		time.Sleep(10*time.Minute + 7*time.Second)
		g.fail(nil)
		if _, err := m.Get(t.Context(), db, certs.RealTime); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for n := range 4 {
			if s := state(m, id(n)); s != "Available" {
				t.Errorf("%v: %s", id(n), s)
			}
		}
	})
}

func TestClosedManagerIsNotRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, stop := start(t, certs.Config{CA: newGate(true)})
		m.Prefetch(web)
		stop()
		m.Retry()
	})
}

// garbler is an istiod that answers something else than it was asked for.
type garbler struct {
	*gate
	answer func(elements [][]byte) [][]byte
}

func (g garbler) Sign(ctx context.Context, _ identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	elements, err := g.gate.Sign(ctx, web, csr, ttl)
	if err == nil && g.answer != nil {
		elements = g.answer(elements)
	}
	return elements, err
}

func (g garbler) String() string { return "istio CA istiod.test:15012" }

// Whatever istiod answers, nothing of it is used unless all of it is right, and
// the one line of the log says who answered what.
func TestWrongAnswers(t *testing.T) {
	for name, tt := range map[string]struct {
		asked  identity.ID
		answer func([][]byte) [][]byte
		says   string
	}{
		"for another identity":     {db, nil, "certificate is for another identity: [\"" + web.String()},
		"for another trust domain": {abroad, nil, "certificate is for another identity: [\"" + web.String()},
		"nothing":                  {web, func([][]byte) [][]byte { return nil }, "malformed chain: empty"},
		"garbage":                  {web, func(e [][]byte) [][]byte { e[0] = []byte("\x00garbage"); return e }, "element 0 is not a certificate"},
		"no root":                  {web, func(e [][]byte) [][]byte { return e[:1] }, "no root"},
		"a garbled root":           {web, func(e [][]byte) [][]byte { e[len(e)-1] = e[len(e)-1][:99]; return e }, "no usable root"},
		"too much":                 {web, func(e [][]byte) [][]byte { return append(e, make([]byte, 2<<20)) }, "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log logBook
				m := run(t, certs.Config{CA: garbler{newGate(true), tt.answer}, Log: log.logger()})
				_, err := m.Get(t.Context(), tt.asked, certs.RealTime)
				time.Sleep(time.Minute)
				synctest.Wait()
				lines := loud(log.String())
				if !errors.Is(err, certs.ErrUnavailable) || len(lines) != 1 {
					t.Fatalf("Get: %v, logged %q", err, lines)
				}
				for _, text := range []string{err.Error(), lines[0]} {
					// The log quotes what is quoted already.
					text = strings.ReplaceAll(text, `\"`, `"`)
					for _, want := range []string{tt.asked.String(), "answer of istio CA istiod.test:15012", tt.says} {
						if !strings.Contains(text, want) {
							t.Errorf("%q does not say %q", text, want)
						}
					}
				}
				if _, ok := m.Current(tt.asked); ok {
					t.Error("it was used")
				}
			})
		})
	}
}

// A certificate that is right serves on while wrong ones come.
func TestWrongAnswerToARenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &garbler{gate: newGate(true)}
		var wrong atomic.Bool
		g.answer = func(e [][]byte) [][]byte {
			if wrong.Load() {
				return [][]byte{fmt.Appendf(nil, "garbage")}
			}
			return e
		}
		m := run(t, certs.Config{CA: g, TTL: time.Hour})
		first, err := m.Get(t.Context(), web, certs.RealTime)
		if err != nil {
			t.Fatal(err)
		}
		wrong.Store(true)
		time.Sleep(45 * time.Minute)
		if cert, ok := m.Current(web); !ok || cert != first {
			t.Errorf("Current = %v, %v", cert, ok)
		}
		wrong.Store(false)
		m.Retry()
		time.Sleep(2 * time.Second)
		if cert, ok := m.Current(web); !ok || cert == first {
			t.Errorf("after the right answer: Current = %v, %v", cert, ok)
		}
	})
}
