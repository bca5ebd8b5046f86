// Package complaints keeps a server that is away from filling the log: it fails
// in more than one way by turns, and each is told once in a while.
package complaints

import (
	"strings"
	"time"
)

const (
	// Every is how often one failure that goes on is news.
	Every = 5 * time.Minute
	// maxTexts bounds what a Book remembers; beyond it everything is news again.
	maxTexts = 16
)

// A Book remembers what was told. The zero value is ready. It is not safe for
// concurrent use.
type Book struct{ told map[string]time.Time }

// News reports whether err is to be told at now, and takes it for told then.
// Numbers make no difference: most are ports.
func (b *Book) News(err error, now time.Time) bool {
	text := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, err.Error())
	if told, ok := b.told[text]; ok && now.Sub(told) < Every {
		return false
	}
	if len(b.told) >= maxTexts || b.told == nil {
		b.told = make(map[string]time.Time)
	}
	b.told[text] = now
	return true
}
