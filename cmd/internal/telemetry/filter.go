package telemetry

import (
	"fmt"
	"log/slog"
	"strings"
)

// The levels that slog does not have.
const (
	LevelTrace = slog.LevelDebug - 4
	levelOff   = slog.LevelError + 100
)

// A Filter says from which level on each target is logged. The zero value logs
// nothing but errors; use ParseFilter. It is immutable.
type Filter struct {
	items []filterItem // The last one that matches wins.
}

type filterItem struct {
	target string // "": every target.
	level  slog.Level
}

// maxFilterItems bounds what an admin can add.
const maxFilterItems = 64

// ParseFilter reads a comma list of levels (off, error, warn, info, debug,
// trace) and target=level items, as RUST_LOG has them.
func ParseFilter(s string) (Filter, error) { return Filter{}.With(s) }

// With adds items, which win over those that were there.
func (f Filter) With(s string) (Filter, error) {
	items := append([]filterItem(nil), f.items...)
	for _, word := range strings.Split(s, ",") {
		word = strings.TrimSpace(word)
		if word == "" {
			continue
		}
		target, name := "", word
		if i := strings.LastIndexByte(word, '='); i >= 0 {
			target, name = word[:i], word[i+1:]
		} else if i := strings.LastIndexByte(word, ':'); i > 0 && word[i-1] != ':' {
			target, name = word[:i], word[i+1:] // As istioctl writes it.
		}
		level, ok := parseLevel(name)
		if !ok || !validTarget(target) && target != "" || target == "" && strings.ContainsAny(word, "=:") {
			return Filter{}, fmt.Errorf("telemetry: %q is neither a level nor target=level", word)
		}
		target = strings.TrimPrefix(target, "ztunnel::")
		kept := items[:0]
		for _, old := range items {
			if old.target != target {
				kept = append(kept, old)
			}
		}
		items = append(kept, filterItem{target, level})
	}
	if len(items) > maxFilterItems {
		return Filter{}, fmt.Errorf("telemetry: more than %d items in a log filter", maxFilterItems)
	}
	return Filter{items: items}, nil
}

func validTarget(s string) bool {
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_', c == ':', c == '-', c == '.', c == '/':
		default:
			return false
		}
	}
	return s != ""
}

// String is the form in which ParseFilter reads it.
func (f Filter) String() string {
	var words []string
	for _, i := range f.items {
		if i.target == "" {
			words = append(words, levelName(i.level))
		} else {
			words = append(words, i.target+"="+levelName(i.level))
		}
	}
	return strings.Join(words, ",")
}

// Level is from where on target is logged. A filter for "xds" covers
// "xds::client" too. Specific items win over the level for all.
func (f Filter) Level(target string) slog.Level {
	level, best := slog.LevelError, -1
	for _, i := range f.items {
		if len(i.target) >= best && covers(i.target, target) {
			level, best = i.level, len(i.target)
		}
	}
	return level
}

func covers(prefix, target string) bool {
	rest, ok := strings.CutPrefix(target, prefix)
	return ok && (prefix == "" || rest == "" || strings.HasPrefix(rest, "::"))
}

var levels = []struct {
	name  string
	level slog.Level
}{
	{"off", levelOff}, {"error", slog.LevelError}, {"warn", slog.LevelWarn},
	{"info", slog.LevelInfo}, {"debug", slog.LevelDebug}, {"trace", LevelTrace},
}

func parseLevel(s string) (slog.Level, bool) {
	for _, l := range levels {
		if strings.EqualFold(l.name, s) {
			return l.level, true
		}
	}
	return 0, false
}

// levelName is the name of the level that l is at least.
func levelName(l slog.Level) string {
	for _, known := range levels {
		if l >= known.level {
			return known.name
		}
	}
	return "trace"
}
