package complaints

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestNews(t *testing.T) {
	var b Book
	begin := time.Unix(1000, 0)
	for _, step := range []struct {
		text  string
		after time.Duration
		want  bool
	}{
		{"refused at 10.0.0.1:15012", 0, true},
		{"refused at 10.0.0.2:7", time.Second, false},
		{"no such host", time.Second, true},
		{"refused at 10.0.0.1:15012", 2 * time.Second, false},
		{"refused at 10.0.0.1:15012", Every, true},
		{"refused at 10.0.0.1:15012", Every + time.Second, false},
	} {
		if got := b.News(errors.New(step.text), begin.Add(step.after)); got != step.want {
			t.Errorf("after %v: News(%q) = %v, want %v", step.after, step.text, got, step.want)
		}
	}
}

// An error that differs each time costs no memory without a bound.
func TestBookIsBounded(t *testing.T) {
	var b Book
	for n := range 1000 {
		if !b.News(fmt.Errorf("%c", 'A'+n), time.Unix(1000, 0)) || len(b.told) > maxTexts {
			t.Fatalf("complaint %d: %d are remembered", n, len(b.told))
		}
	}
}
