package main

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/config"
	"github.com/ztun/ztun/cmd/internal/telemetry"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
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

type noCertificates struct{}

func (noCertificates) Current(identity.ID) (*certs.Certificate, bool) { return nil, false }

func (noCertificates) Get(context.Context, identity.ID, certs.Priority) (*certs.Certificate, error) {
	return nil, certs.ErrUnavailable
}

// TestDumpWithoutThePodThatHangs: it is shown, and the others with their
// connections.
func TestDumpWithoutThePodThatHangs(t *testing.T) {
	engine, err := netstack.New(netstack.Config{Readers: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	shakes := hbone.NewHandshakes(hbone.HandshakesConfig{})
	defer shakes.Close()
	log := slog.New(slog.DiscardHandler)
	p := &pods{
		engine: engine, traffic: telemetry.NewTraffic(nil), log: log, policyLog: log,
		running: map[*pod]struct{}{}, ended: map[string]uint64{},
		config: tunnel.Config{Mesh: mesh.NewStore(mesh.Config{}), Certs: noCertificates{}, Handshakes: shakes},
	}
	var list []zds.PodStatus
	for i, uid := range []string{"hangs", "works"} { // A reader each.
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[1])
		w := zds.Workload{UID: uid, Name: uid, Namespace: "default", ServiceAccount: uid}
		w.Device = &zds.Device{MTU: 1500, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})}}
		s, err := p.Start(w, zds.Files{Device: os.NewFile(uintptr(fds[0]), uid)})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Stop()
		list = append(list, zds.PodStatus{Workload: w, Proxy: s})
	}
	release := make(chan struct{})
	defer close(release)
	list[0].Proxy.(*pod).stack.Loop().Post(func() { <-release })
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	got := workloadState(ctx, list, log)
	if h, w := got["hangs"], got["works"]; len(got) != 2 || h.State != "Up" || h.Connections != nil || w.State != "Up" || w.Connections == nil {
		t.Errorf("the dump shows %+v", got)
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
