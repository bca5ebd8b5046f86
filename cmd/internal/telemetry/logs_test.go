package telemetry

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestFilter(t *testing.T) {
	for _, tt := range []struct {
		filter, target string
		want           slog.Level
	}{
		{"info", "xds", slog.LevelInfo},
		{"warn,xds=debug", "xds", slog.LevelDebug},
		{"xds=debug,warn", "xds", slog.LevelDebug},
		{"warn,xds=debug", "xds::client", slog.LevelDebug},
		{"warn,xds=debug", "xdsfoo", slog.LevelWarn},
		{"warn,ztunnel::xds=trace", "xds", LevelTrace},
		{"info,access:off", "access", levelOff},
		{"info,a::b:debug", "a::b", slog.LevelDebug},
		{"info,debug", "x", slog.LevelDebug},
		{"", "x", slog.LevelError},
	} {
		f, err := ParseFilter(tt.filter)
		if err != nil {
			t.Errorf("ParseFilter(%q) = %v", tt.filter, err)
			continue
		}
		if got := f.Level(tt.target); got != tt.want {
			t.Errorf("%q: level of %s = %v, want %v", tt.filter, tt.target, got, tt.want)
		}
		again, err := ParseFilter(f.String())
		if err != nil || again.String() != f.String() {
			t.Errorf("%q was printed as %q, which is read as %q, %v", tt.filter, f, again, err)
		}
	}
	for _, s := range []string{"loud", "x=loud", "=info", "x y=info", "x=", "info;debug", ":info"} {
		if f, err := ParseFilter(s); err == nil {
			t.Errorf("ParseFilter(%q) = %q, want an error", s, f)
		}
	}
	f := Filter{}
	var err error
	for i := range maxFilterItems + 1 {
		if f, err = f.With(strings.Repeat("x", i+1) + "=info"); err != nil {
			return
		}
	}
	t.Error("a filter grows without bound")
}

func FuzzFilter(f *testing.F) {
	for _, s := range []string{"info", "warn,xds=debug", "a::b:trace", "off,,x=error"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		filter, err := ParseFilter(s)
		if err != nil {
			return
		}
		again, err := ParseFilter(filter.String())
		if err != nil || again.String() != filter.String() {
			t.Errorf("%q was printed as %q, which is read as %q, %v", s, filter, again, err)
		}
	})
}

func testLogs(t *testing.T, out *bytes.Buffer, asJSON bool) *Logs {
	t.Helper()
	logs, err := NewLogs(out, LogOptions{JSON: asJSON})
	if err != nil {
		t.Fatal(err)
	}
	return logs
}

func TestLoggerForms(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678900, time.UTC)
	record := slog.NewRecord(at, slog.LevelWarn, "tab\there\nline", 0)
	record.AddAttrs(slog.Int("n", -3), slog.Bool("b", true), slog.Duration("d", 1500*time.Millisecond),
		slog.Any("addr", netip.MustParseAddrPort("[::1]:80")), slog.Any("err", errors.New(`"bad"`)),
		slog.Any("ip", netip.MustParseAddr("10.0.0.1")), slog.Any("none", nil),
		slog.Group("g", slog.String("k", "v")))
	var out bytes.Buffer
	h := testLogs(t, &out, false).Logger("zds").Handler().WithAttrs([]slog.Attr{slog.String("pod", "ns/p")}).WithGroup("in")
	if err := h.Handle(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	want := "2026-01-02T03:04:05.000678Z\twarn\tzds\ttab?here?line\t" +
		`pod="ns/p" in.n=-3 in.b=true in.d="1.5s" in.addr=[::1]:80 in.err="\"bad\"" in.ip=10.0.0.1 in.none=null in.g.k="v"` + "\n"
	if out.String() != want {
		t.Errorf(" got %q\nwant %q", out.String(), want)
	}
	out.Reset()
	h = testLogs(t, &out, true).Logger("zds").Handler()
	if err := h.Handle(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	want = `{"level":"warn","time":"2026-01-02T03:04:05.000678Z","scope":"zds","message":"tab\there\nline",` +
		`"n":-3,"b":true,"d":"1.5s","addr":"[::1]:80","err":"\"bad\"","ip":"10.0.0.1","none":null,"g.k":"v"}` + "\n"
	if out.String() != want {
		t.Errorf(" got %s\nwant %s", out.String(), want)
	}
}

func TestNoFields(t *testing.T) {
	var out bytes.Buffer
	testLogs(t, &out, false).Logger("main").Info("hello")
	if got := out.String(); !strings.HasSuffix(got, "\tinfo\tmain\thello\n") {
		t.Errorf("line = %q", got)
	}
}

func TestChangeFilter(t *testing.T) {
	var out bytes.Buffer
	logs := testLogs(t, &out, false)
	log := logs.Logger("xds")
	log.Debug("not shown")
	if err := logs.Change("xds=debug", false); err != nil {
		t.Fatal(err)
	}
	log.Debug("shown")
	if got := logs.Filter().String(); got != "info,xds=debug" {
		t.Errorf("filter = %q", got)
	}
	if err := logs.Change("", true); err != nil || logs.Filter().String() != "info" {
		t.Errorf("after reset %q, %v", logs.Filter(), err)
	}
	if err := logs.Change("loud", true); err == nil {
		t.Error("a bad level was accepted")
	}
	if s := out.String(); strings.Contains(s, "not shown") || !strings.Contains(s, "shown") {
		t.Errorf("log = %q", s)
	}
}

// FuzzLine: whatever is logged is one line, and valid JSON where it should be.
func FuzzLine(f *testing.F) {
	f.Add("message", "key", "value")
	f.Add("a\nb", "k\x00", "\xff\"\\\u2028")
	f.Fuzz(func(t *testing.T, message, key, value string) {
		for _, asJSON := range []bool{false, true} {
			l := &line{json: asJSON}
			l.begin(time.Unix(0, 0), "info", "t", message)
			l.text(key, value)
			l.bare(key, value)
			got := l.end()
			if bytes.IndexByte(got, '\n') != len(got)-1 {
				t.Errorf("not one line: %q", got)
			}
			if asJSON && !json.Valid(got) {
				t.Errorf("not JSON: %q", got)
			}
		}
	})
}

// stuck is an output that blocks until it is let go.
type stuck struct {
	let chan struct{}
	mu  sync.Mutex
	got bytes.Buffer
}

func (s *stuck) Write(p []byte) (int, error) {
	<-s.let
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got.Write(p)
}

func TestWriterDropsInsteadOfBlocking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &stuck{let: make(chan struct{})}
		w := NewWriter(out)
		if _, err := NewLogs(w, LogOptions{JSON: true}); err != nil {
			t.Fatal(err)
		}
		const lines = queueLines + 5000
		for range lines {
			_, _ = w.Write([]byte("line\n"))
		}
		if err := w.Close(); err == nil {
			t.Error("Close of a stuck writer says that all was written")
		}
		_, _ = w.Write([]byte("after close\n"))
		close(out.let)
		<-w.done
		dropped := w.Dropped()
		if dropped == 0 || dropped > 5001 {
			t.Errorf("%d lines were dropped", dropped)
		}
		text := out.got.String()
		if n := strings.Count(text, "line\n"); uint64(n) != lines-(dropped-1) {
			t.Errorf("%d lines were written and %d dropped of %d", n, dropped, lines)
		}
		if !strings.Contains(text, `"scope":"telemetry"`) || !strings.Contains(text, `"lines":`) {
			t.Error("nothing tells of the dropped lines")
		}
	})
}

func TestWriterBoundsBytesAndLines(t *testing.T) {
	out := &stuck{let: make(chan struct{})}
	w := NewWriter(out)
	big := append(bytes.Repeat([]byte("x"), 1<<20), '\n')
	for range 5000 {
		if n, err := w.Write(big); n != len(big) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	if got := w.bytes.Load(); got > queueBytes+maxLine {
		t.Errorf("%d bytes are queued", got)
	}
	close(out.let)
	_ = w.Close() // Which waits a second; with the race detector that may be too short.
	<-w.done
	for _, l := range strings.Split(out.got.String(), "\n") {
		if len(l) > maxLine {
			t.Fatalf("a line of %d bytes", len(l))
		}
	}
}

func BenchmarkWriter(b *testing.B) {
	w := NewWriter(discard{})
	defer w.Close()
	line := bytes.Repeat([]byte("x"), 500)
	b.ReportAllocs()
	for b.Loop() {
		_, _ = w.Write(line)
	}
}
