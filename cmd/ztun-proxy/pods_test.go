package main

import (
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/config"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/netstack"
)

// TestStartClosesWhatItCannotUse: a pod that is refused leaves nothing open.
func TestStartClosesWhatItCannotUse(t *testing.T) {
	engine, err := netstack.New(netstack.Config{Readers: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	p := &pods{engine: engine, log: slog.New(slog.DiscardHandler), running: map[*pod]struct{}{}}
	file := func() *os.File {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "file")
	}
	before := openFiles(t)
	for name, d := range map[string]*zds.Device{
		"no description":       nil,
		"no such MTU":          {MTU: 100, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		"no address":           {MTU: 1500},
		"not sockets for ICMP": {MTU: 1500, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
	} {
		files := zds.Files{Device: file(), ICMP: []*os.File{file(), file()}}
		if _, err := p.Start(zds.Workload{UID: "u", Name: "n", Namespace: "s", Device: d}, files); err == nil {
			t.Errorf("%s: the pod was started", name)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%s: %d descriptors are open, %d were before", name, after, before)
		}
	}
}

// TestKeepaliveIsThatOfTheEnvironment: facts/ztunnel.md 1.3 and 14.
func TestKeepaliveIsThatOfTheEnvironment(t *testing.T) {
	c := config.Keepalive{Time: 60 * time.Second, Interval: 10 * time.Second, Retries: 3}
	want := netstack.Keepalive{Idle: 60 * time.Second, Interval: 10 * time.Second, Count: 3}
	if got := keepalive(c); got != want {
		t.Errorf("%+v became %+v, want %+v", c, got, want)
	}
	c.Off, c.UserTimeout = true, true
	want.Off, want.UserTimeout = true, 90*time.Second
	if got := keepalive(c); got != want {
		t.Errorf("%+v became %+v, want %+v", c, got, want)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
