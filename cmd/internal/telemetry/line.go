package telemetry

import (
	"net/netip"
	"strconv"
	"time"
	"unicode/utf8"
)

// A line builds one log line, plain or JSON, in the order of its calls.
type line struct {
	buf  []byte
	json bool
}

// timeFormat is RFC 3339 with microseconds, in UTC.
const timeFormat = "2006-01-02T15:04:05.000000Z"

func (l *line) begin(now time.Time, level, target, message string) {
	l.buf = l.buf[:0]
	if l.json {
		l.buf = append(l.buf, `{"level":"`...)
		l.buf = append(l.buf, level...)
		l.buf = append(l.buf, `","time":"`...)
		l.buf = now.UTC().AppendFormat(l.buf, timeFormat)
		l.buf = append(l.buf, '"')
		l.text("scope", target)
		l.text("message", message)
		return
	}
	l.buf = now.UTC().AppendFormat(l.buf, timeFormat)
	for _, s := range [...]string{level, target, message} {
		l.buf = append(l.buf, '\t')
		l.buf = appendClean(l.buf, s)
	}
	l.buf = append(l.buf, '\t')
}

func (l *line) end() []byte {
	if l.json {
		l.buf = append(l.buf, '}')
	} else if n := len(l.buf); l.buf[n-1] == ' ' || l.buf[n-1] == '\t' {
		l.buf = l.buf[:n-1] // No fields, or after the last one.
	}
	l.buf = append(l.buf, '\n')
	return l.buf
}

func (l *line) key(name string) {
	if l.json {
		l.buf = append(l.buf, ',')
		l.buf = appendJSON(l.buf, name)
		l.buf = append(l.buf, ':')
		return
	}
	l.buf = appendClean(l.buf, name)
	l.buf = append(l.buf, '=')
}

func (l *line) sep() {
	if !l.json {
		l.buf = append(l.buf, ' ')
	}
}

// text adds a string, quoted in both forms.
func (l *line) text(name, value string) {
	l.key(name)
	if l.json {
		l.buf = appendJSON(l.buf, value)
	} else {
		l.buf = strconv.AppendQuote(l.buf, value)
	}
	l.sep()
}

// bare adds what is quoted in JSON only, such as an address.
func (l *line) bare(name, value string) {
	l.key(name)
	if l.json {
		l.buf = appendJSON(l.buf, value)
	} else {
		l.buf = appendClean(l.buf, value)
	}
	l.sep()
}

func (l *line) addr(name string, value netip.AddrPort) {
	l.key(name)
	if l.json {
		l.buf = append(l.buf, '"')
		l.buf = value.AppendTo(l.buf)
		l.buf = append(l.buf, '"')
	} else {
		l.buf = value.AppendTo(l.buf)
	}
	l.sep()
}

func (l *line) number(name string, value uint64) {
	l.key(name)
	l.buf = strconv.AppendUint(l.buf, value, 10)
	l.sep()
}

// raw adds what is written the same way in both forms: a number or a bool.
func (l *line) raw(name, value string) {
	l.key(name)
	l.buf = append(l.buf, value...)
	l.sep()
}

// appendClean appends s without anything that could end the line or look like
// the next field's separator.
func appendClean(buf []byte, s string) []byte {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == utf8.RuneError {
			r = '?'
		}
		buf = utf8.AppendRune(buf, r)
	}
	return buf
}

// appendJSON appends s as a JSON string.
func appendJSON(buf []byte, s string) []byte {
	buf = append(buf, '"')
	const hex = "0123456789abcdef"
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' && c < utf8.RuneSelf {
			buf = append(buf, c)
			i++
			continue
		}
		if c < utf8.RuneSelf {
			switch c {
			case '"', '\\':
				buf = append(buf, '\\', c)
			case '\n':
				buf = append(buf, `\n`...)
			case '\t':
				buf = append(buf, `\t`...)
			case '\r':
				buf = append(buf, `\r`...)
			default:
				buf = append(buf, `\u00`...)
				buf = append(buf, hex[c>>4], hex[c&15])
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		buf = utf8.AppendRune(buf, r)
		i += n
	}
	return append(buf, '"')
}
