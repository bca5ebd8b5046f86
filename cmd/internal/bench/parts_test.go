package main

import (
	"io"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

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
	legs := allLegs()
	start := world(legs)
	if len(start) > maxFiles {
		t.Errorf("the world has %d bytes", len(start))
	}
	many := &stage{clients: 5, servers: 3}
	more := many.pods(legs, []trial{{stage: many}})
	known := 700 // More than an octet has room for.
	files := map[string]string{
		worldFile: start, moreFile: podsYAML(append(more, idlePods(legs[2], 200)...)), knownFile: knownServices(known),
	}
	world, report := control.Check(control.Config{Static: control.NewStatic(files)})
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
	pods, enrolled := map[string]int{}, map[string]int{}
	for _, p := range world.Pods() {
		pods[p.Namespace]++
		if p.Enrolled {
			enrolled[p.Namespace]++
		}
	}
	// Clients of direct, and servers; clients of three legs, the servers of
	// two; clients of two legs and servers of either.
	want := map[string]int{plainNamespace: 3 + 5 + 3, meshNamespace: 3 + 5 + 3 + 3 + 200, otherNamespace: 3 + 5 + 3 + 3, knownNamespace: known}
	if diff := cmp.Diff(want, pods); diff != "" {
		t.Errorf("pods (-want +got):\n%s", diff)
	}
	delete(want, plainNamespace)
	if diff := cmp.Diff(want, enrolled); diff != "" {
		t.Errorf("pods in the mesh (-want +got):\n%s", diff)
	}
	if got := len(world.Services()); got != known {
		t.Errorf("%d services, want %d", got, known)
	}
}

func TestRowsSelectTrials(t *testing.T) {
	const short = "stream-1-up stream-1-down stream-8-up stream-8-down rps-8 rps-64 rps-512 new-conns new-conns-p99 cpu-per-request stall-bytes " +
		"rss-after-load rss-at-rest bytes-per-idle-pod fair-p99 bytes-per-idle-conn"
	for _, tt := range []struct {
		rows string
		want string
	}{
		{"", short},
		{".", short + " idle-7 pods-1 services-10-rps idle-pods-9-bytes"},
		{"stream-1", "stream-1-up stream-1-down"},
		{"^p99$", "cpu-per-request"},
		{"^open-5$", "bytes-per-idle-conn"},
		{"^services-8-new", "services-10-rps"},
		{"^pods-20$", "pods-1"},
		{"nothing", ""},
	} {
		var rows *regexp.Regexp
		if tt.rows != "" {
			rows = regexp.MustCompile(tt.rows)
		}
		var names []string
		for _, trial := range selected(allTrials(options{Conns: 5, Pods: 3, Idle: 7, IdlePods: 9, Spread: 100, Services: 8}), rows) {
			names = append(names, trial.name())
		}
		if got := strings.Join(names, " "); got != tt.want {
			t.Errorf("rows %q select %q, want %q", tt.rows, got, tt.want)
		}
	}
}

// A goal that names no row or leg would never be judged, and nobody would see.
func TestGoalsNameRowsAndLegs(t *testing.T) {
	defaults, err := parse(nil, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	rows, legs := map[string]bool{}, map[string]bool{"": true}
	for _, trial := range allTrials(defaults.options) {
		for _, r := range trial.rows {
			if rows[r.name] {
				t.Errorf("two rows are called %s", r.name)
			}
			rows[r.name] = true
		}
	}
	for _, l := range allLegs() {
		legs[l.name] = true
	}
	seen := map[goal]bool{}
	for _, g := range goals {
		if !rows[g.row] || !legs[g.leg] || g.leg == "" || !legs[g.to] {
			t.Errorf("goal %+v: no such row or leg", g)
		}
		if (g.least > 0) == (g.most > 0) {
			t.Errorf("goal %+v: want either the least or the most", g)
		}
		same := goal{leg: g.leg, row: g.row, to: g.to}
		if seen[same] {
			t.Errorf("goal %+v: there are two", same)
		}
		seen[same] = true
	}
}

func TestCommandLineIsBounded(t *testing.T) {
	for _, args := range []string{"-rounds 0", "-seconds 0", "-seconds NaN", "-seconds 1000", "-conns 0", "-conns 1000000", "-pods 1000", "-idle 0", "-idle-for 2h", "-idle-for -1s", "-idle-pods 1001", "-spread 0", "-services 100000", "-rows (", "-legs (", "more", "-unknown"} {
		if _, err := parse(strings.Fields(args), io.Discard); err == nil {
			t.Errorf("parse(%s) = nil, want an error", args)
		}
	}
	if c, err := parse(nil, io.Discard); err != nil || c.Rounds != 3 || c.Conns != 12_000 || c.Rows != nil {
		t.Errorf("parse() = %+v, %v, want the defaults", c, err)
	}
}
