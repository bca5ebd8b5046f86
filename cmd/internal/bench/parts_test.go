package main

import (
	"io"
	"regexp"
	"strings"
	"testing"

	"github.com/ztun/ztun/xds/control"
)

func TestAnswerLength(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\nDate: now\r\ncontent-length: 5\r\n\r\n"
	for _, tt := range []struct {
		name, answer string
		want         int
		wrong        bool
	}{
		{"whole", head + "hello", len(head) + 5, false},
		{"body to come", head, len(head) + 5, false},
		{"head to come", head[:len(head)-1], 0, false},
		{"nothing yet", "", 0, false},
		{"refused", "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", 0, true},
		{"no length", "HTTP/1.1 200 OK\r\n\r\n", 0, true},
		{"no number", "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", 0, true},
		{"too long", "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := answerLength([]byte(tt.answer))
			if got != tt.want || (err != nil) != tt.wrong {
				t.Errorf("answerLength = %d, %v, want %d", got, err, tt.want)
			}
		})
	}
}

func FuzzAnswerLength(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"))
	f.Add([]byte("HTTP/1.1 200 OK\r\n:\r\nContent-Length\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := answerLength(b)
		if n < 0 || n > len(b)+1<<20 || err != nil && n != 0 {
			t.Errorf("answerLength = %d, %v of %d bytes", n, err, len(b))
		}
	})
}

func TestShareDealsOutAll(t *testing.T) {
	for whole := range 40 {
		for n := 1; n < 9; n++ {
			sum := 0
			for i := range n {
				s := share(whole, n, i)
				if s < whole/n || s > whole/n+1 {
					t.Errorf("share(%d, %d, %d) = %d", whole, n, i, s)
				}
				sum += s
			}
			if sum != whole {
				t.Errorf("%d shares of %d sum to %d", n, whole, sum)
			}
		}
	}
}

// What a lab takes when it is started, in bytes.
const maxFiles = 64 << 10

func TestControlPlaneTakesTheWorld(t *testing.T) {
	files := map[string]string{worldFile: world(allLegs()), idleFile: idlePods(200)}
	for name, text := range files {
		if len(text) > maxFiles {
			t.Errorf("%s has %d bytes", name, len(text))
		}
	}
	world, report := control.Check(control.Config{Static: control.NewStatic(files)})
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
	enrolled := 0
	for _, p := range world.Pods() {
		if p.Enrolled {
			enrolled++
		}
	}
	if got := len(world.Pods()); got != 209 || enrolled != 206 {
		t.Errorf("%d pods, %d in the mesh, want 209 and 206", got, enrolled)
	}
}

func TestRowsSelectTrials(t *testing.T) {
	for _, tt := range []struct {
		rows string
		want string
	}{
		{".", "stream-1-up stream-1-down stream-8-up stream-8-down rps-8 rps-64 new-conns cpu-per-request rss rss-at-rest bytes-per-idle-pod"},
		{"stream-1", "stream-1-up stream-1-down"},
		{"^p99$", "cpu-per-request"},
		{"nothing", ""},
	} {
		var names []string
		for _, trial := range selected(allTrials(), regexp.MustCompile(tt.rows)) {
			names = append(names, trial.name())
		}
		if got := strings.Join(names, " "); got != tt.want {
			t.Errorf("rows %q select %q, want %q", tt.rows, got, tt.want)
		}
	}
}

func TestCommandLineIsBounded(t *testing.T) {
	for _, args := range []string{"-rounds 0", "-seconds 0", "-seconds NaN", "-seconds 1000", "-conns 0", "-conns 1000000", "-pods 1000", "-rows (", "-legs (", "more", "-unknown"} {
		if _, err := parse(strings.Fields(args), io.Discard); err == nil {
			t.Errorf("parse(%s) = nil, want an error", args)
		}
	}
	if c, err := parse(nil, io.Discard); err != nil || c.Rounds != 3 || c.Conns != 3000 {
		t.Errorf("parse() = %+v, %v, want the defaults", c, err)
	}
}
