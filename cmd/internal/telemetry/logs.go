package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztun/ztun/tunnel"
)

// targetAccess is the access log's target.
const targetAccess = "access"

// LogOptions say what is logged and how.
type LogOptions struct {
	JSON   bool
	Filter string           // As ParseFilter reads it. "": info.
	Now    func() time.Time // Nil: time.Now.
}

// Logs makes loggers that share one output, one form and one filter, which can
// change at any time.
type Logs struct {
	out     io.Writer
	json    bool
	now     func() time.Time
	initial Filter
	filter  atomic.Pointer[Filter]
	access  atomic.Int64 // The access log's level, for the hot path.
	lines   sync.Pool

	mu sync.Mutex // Serializes changes of the filter.
}

// NewLogs logs to out, which must not block; each Write is one line.
func NewLogs(out io.Writer, o LogOptions) (*Logs, error) {
	if o.Filter == "" {
		o.Filter = "info"
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	f, err := ParseFilter(o.Filter)
	if err != nil {
		return nil, err
	}
	l := &Logs{out: out, json: o.JSON, now: o.Now, initial: f}
	l.lines.New = func() any { return &line{json: l.json} }
	l.setFilter(f)
	if w, ok := out.(*Writer); ok {
		notice := l.dropNotice
		w.notice.Store(&notice)
	}
	return l, nil
}

// dropNotice is the line that a Writer puts where it had to leave lines out.
func (l *Logs) dropNotice(n uint64) []byte {
	ln := &line{json: l.json}
	ln.begin(l.now(), levelName(slog.LevelWarn), "telemetry", "log lines were dropped: the output is too slow")
	ln.number("lines", n)
	return ln.end()
}

func (l *Logs) setFilter(f Filter) {
	l.access.Store(int64(f.Level(targetAccess)))
	l.filter.Store(&f)
}

// Filter is what is logged now.
func (l *Logs) Filter() Filter { return *l.filter.Load() }

// Change adds items to the filter, after going back to the first one if reset
// is set.
func (l *Logs) Change(items string, reset bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.Filter()
	if reset {
		f = l.initial
	}
	f, err := f.With(items)
	if err != nil {
		return err
	}
	l.setFilter(f)
	return nil
}

// Logger logs under a target, which the filter and each line name.
func (l *Logs) Logger(target string) *slog.Logger {
	return slog.New(&handler{logs: l, target: target})
}

// handler writes ztunnel's lines.
type handler struct {
	logs   *Logs
	target string
	prefix string      // Of groups: "a.b.".
	attrs  []slog.Attr // Bound, with their prefix.
}

func (h *handler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.logs.filter.Load().Level(h.target)
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.attrs = append([]slog.Attr(nil), h.attrs...)
	for _, a := range attrs {
		c.attrs = append(c.attrs, slog.Attr{Key: h.prefix + a.Key, Value: a.Value})
	}
	return &c
}

func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.prefix += name + "."
	return &c
}

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	l := h.logs.lines.Get().(*line)
	defer h.logs.lines.Put(l)
	now := r.Time
	if now.IsZero() {
		now = h.logs.now()
	}
	l.begin(now, levelName(r.Level), h.target, r.Message)
	for _, a := range h.attrs {
		addAttr(l, "", a)
	}
	r.Attrs(func(a slog.Attr) bool { addAttr(l, h.prefix, a); return true })
	_, err := h.logs.out.Write(l.end())
	return err
}

func addAttr(l *line, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	name := prefix + a.Key
	switch v.Kind() {
	case slog.KindGroup:
		if a.Key != "" {
			prefix = name + "."
		}
		for _, inner := range v.Group() {
			addAttr(l, prefix, inner)
		}
		return
	case slog.KindInt64, slog.KindUint64, slog.KindBool:
		l.raw(name, v.String())
	case slog.KindAny:
		switch x := v.Any().(type) {
		case nil:
			if a.Key != "" {
				l.raw(name, "null")
			}
		case netip.AddrPort:
			l.addr(name, x)
		case error:
			l.text(name, x.Error())
		case fmt.Stringer:
			l.bare(name, x.String())
		default:
			l.text(name, fmt.Sprint(x))
		}
	default:
		if a.Key != "" {
			l.text(name, v.String())
		}
	}
}

// logAccess writes one line of the access log, if level is logged. It is
// called on readers.
func (l *Logs) logAccess(level slog.Level, message string, r *tunnel.Record, complete bool) {
	if int64(level) < l.access.Load() {
		return
	}
	ln := l.lines.Get().(*line)
	defer l.lines.Put(ln)
	ln.begin(l.now(), levelName(level), targetAccess, message)
	addRecord(ln, r, complete)
	_, _ = l.out.Write(ln.end())
}

// logEarly writes the line of a connection that failed before it was counted.
func (l *Logs) logEarly(r *tunnel.Record) {
	if int64(slog.LevelWarn) < l.access.Load() {
		return
	}
	ln := l.lines.Get().(*line)
	defer l.lines.Put(ln)
	ln.begin(l.now(), levelName(slog.LevelWarn), targetAccess, "connection failed")
	ln.addr("src.addr", r.Src)
	ln.addr("dst.addr", r.Dst)
	ln.text("direction", r.Direction.String())
	ln.text("error", r.Error())
	_, _ = l.out.Write(ln.end())
}
