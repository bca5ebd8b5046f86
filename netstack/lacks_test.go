package netstack

import (
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
)

func TestEachLackIsLoggedOnce(t *testing.T) {
	var log logged
	e, err := New(Config{Readers: 2, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	for _, c := range []struct {
		offload bool
		want    int // lines so far
	}{{true, 0}, {false, 1}, {false, 1}, {true, 1}} {
		a, b := tuntest.Pair(t, tun.Options{Offload: c.offload})
		for _, dev := range []*tun.Device{a, b} {
			if _, err := e.Add(dev, StackConfig{Name: "ns/pod", Addrs: []netip.Addr{pod}}, (&hooks{t: t}).serve); err != nil {
				t.Fatal(err)
			}
		}
		if got := strings.Count(log.String(), "works without"); got != c.want {
			t.Errorf("offload %v: %d lines so far, want %d:\n%s", c.offload, got, c.want, log.String())
		}
	}
	if line := log.String(); !strings.Contains(line, tun.Offload.String()) || !strings.Contains(line, tun.Offload.Cost()) || !strings.Contains(line, "pod=ns/pod") {
		t.Errorf("%q names feature, cost and pod?", line)
	}
}

// logged is what was logged, by whichever goroutine.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
