package standin

import (
	"bytes"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
)

func TestProbePassesAndNothingElse(t *testing.T) {
	a := &asker{yes: true}
	s := newStandin(t, a.isProbe)
	w, file := newWire(t)
	s.Start("u", workload(), file)
	w.dropped(s, "an unknown segment", tun.Header{}, segment(probe, app, flagACK, "x"))
	w.passes(segment(probe, app, flagSYN, ""))
	w.passes(segment(app, probe, flagSYN|flagACK, ""))
	w.passes(segment(probe, app, flagACK, "GET /healthz"))
	w.dropped(s, "garbage", tun.Header{}, []byte{1, 2, 3})
	w.dropped(s, "a packet with a header that lies", tun.Header{GSOType: 200, GSOSize: 1}, segment(probe, app, flagACK, "x"))
	w.dropped(s, "a stranger's SYN", tun.Header{}, segment(netip.AddrPortFrom(far4, 1), app, flagSYN, ""))
	a.say(false)
	w.dropped(s, "a SYN that is no probe", tun.Header{}, segment(netip.AddrPortFrom(node4, 1), app, flagSYN, ""))
	w.dropped(s, "its answer", tun.Header{}, segment(app, netip.AddrPortFrom(node4, 1), flagSYN|flagACK, ""))
	w.dropped(s, "a SYN too long", tun.Header{}, segment(probe6, app6, flagSYN, strings.Repeat("x", maxSYN)))
	want := []key{{probe, app}, {netip.AddrPortFrom(node4, 1), app}}
	if !slices.Equal(a.asked, want) {
		t.Errorf("asked about %v, want %v", a.asked, want)
	}
	if st := s.Stats(); st.Devices != 1 || st.Asked != 2 || st.Probes != 1 || st.Forwarded != 3 {
		t.Errorf("%+v", st)
	}
}

func TestSuperSegmentIsGivenBackWhole(t *testing.T) {
	s := newStandin(t, (&asker{yes: true}).isProbe)
	w, file := newWire(t)
	s.Start("u", workload(), file)
	// The SYN of the node's own kernel has no whole checksum either.
	partial := tun.Header{Flags: tun.NeedsChecksum, CsumStart: 20, CsumOffset: 16}
	for _, c := range []struct {
		h tun.Header
		b []byte
	}{
		{partial, segment(probe, app, flagSYN, "")},
		{tun.Header{Flags: tun.NeedsChecksum, GSOType: tun.GSOTCPv4, GSOSize: 1448, HdrLen: 40, CsumStart: 20, CsumOffset: 16},
			segment(app, probe, flagACK, strings.Repeat("0123456789abcdef", 4000))},
	} {
		w.send(c.h, c.b)
		if got, h := w.next(); !bytes.Equal(got, c.b) || h != c.h {
			t.Errorf("%d bytes with %+v, want %d with %+v", len(got), h, len(c.b), c.h)
		}
	}
}

// A question that takes long keeps nobody waiting, and what is asked is bounded.
func TestNobodyWaitsForAQuestion(t *testing.T) {
	release, asking := make(chan bool), make(chan struct{}, 1)
	s := newStandin(t, func(netip.AddrPort, netip.AddrPort) bool {
		select {
		case asking <- struct{}{}:
		default:
		}
		return <-release
	})
	t.Cleanup(func() { close(release) }) // Before Close.
	w, file := newWire(t)
	s.Start("u", workload(), file)
	w.send(tun.Header{}, segment(probe, app, flagSYN, ""))
	<-asking
	w.dropped(s, "a stranger's segment", tun.Header{}, segment(netip.AddrPortFrom(far4, 1), app, flagSYN, ""))
	w.dropped(s, "the SYN again", tun.Header{}, segment(probe, app, flagSYN, ""))
	for i := range maxAsked - 1 {
		w.send(tun.Header{}, segment(netip.AddrPortFrom(node4, uint16(i+1)), app, flagSYN, ""))
	}
	w.dropped(s, "one SYN too many", tun.Header{}, segment(netip.AddrPortFrom(node4, 60000), app, flagSYN, ""))
	// Another pod has room still; and Stop does not wait for the answers.
	w2, file2 := newWire(t)
	s.Start("v", workload(), file2)
	w2.send(tun.Header{}, segment(probe, app, flagSYN, ""))
	s.Stop("u")
	for range 1 + maxAsked {
		release <- true
	}
	if b, _ := w2.next(); !bytes.Equal(b, segment(probe, app, flagSYN, "")) {
		t.Errorf("% x came back", b)
	}
	if st := s.Stats(); st.Probes != 1 || st.Forwarded != 1 {
		t.Errorf("answers counted after Stop: %+v", st)
	}
}

func TestWhatLiesInTheDeviceAtStopIsTheNextReaders(t *testing.T) {
	s := newStandin(t, (&asker{yes: true}).isProbe)
	const n = 60
	for range 50 {
		w, file := newWire(t)
		next := duplicate(t, file)
		before := s.Stats().Dropped
		s.Start("u", workload(), file)
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			runtime.Gosched()
			s.Stop("u")
		}()
		for i := range n {
			w.send(tun.Header{}, segment(netip.AddrPortFrom(far4, uint16(i+1)), app, flagSYN, ""))
		}
		<-stopped
		read := int(s.Stats().Dropped - before)
		left := drain(t, next)
		if read+len(left) != n {
			t.Fatalf("%d read and %d left of %d", read, len(left), n)
		}
		for i, b := range left {
			if p, ok := parsePacket(b); !ok || int(p.src.Port()) != read+i+1 {
				t.Fatalf("packet %d of those left is from %v", i, p.src)
			}
		}
		if again := int(s.Stats().Dropped - before); again != read {
			t.Fatalf("read %d packets after Stop", again-read)
		}
	}
}

func duplicate(t *testing.T, f *os.File) *tun.Device {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := tun.New(os.NewFile(uintptr(fd), "next reader"), tun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	return dev
}

// drain returns what lies in a device.
func drain(t *testing.T, dev *tun.Device) (out [][]byte) {
	t.Helper()
	var v tun.Vector
	buf := make([]byte, tun.MaxPacket)
	v.Set(0, buf)
	for {
		n, _, err := dev.Read(&v)
		if err == tun.ErrEmpty {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, bytes.Clone(buf[:n]))
	}
}

func TestManyDevicesTakeTwoGoroutines(t *testing.T) {
	s := newStandin(t, (&asker{yes: true}).isProbe)
	before := runtime.NumGoroutine()
	var wires []*wire
	for i := range 250 {
		w, file := newWire(t)
		s.Start(uidOf(i), workload(), file)
		wires = append(wires, w)
	}
	if n := runtime.NumGoroutine() - before; n > 2 {
		t.Errorf("%d goroutines for %d devices", n, len(wires))
	}
	for _, w := range wires {
		w.passes(segment(probe, app, flagSYN, ""))
		w.passes(segment(app, probe, flagSYN|flagACK, ""))
	}
	if st := s.Stats(); st.Devices != 250 || st.Probes != 250 {
		t.Errorf("%+v", st)
	}
	for i := range wires {
		s.Stop(uidOf(i))
	}
	if st := s.Stats(); st.Devices != 0 {
		t.Errorf("%d devices after Stop", st.Devices)
	}
}

func uidOf(i int) string { return "uid-" + string(rune('a'+i/26)) + string(rune('a'+i%26)) }

func TestStartOwnsTheFile(t *testing.T) {
	before := openFiles(t)
	s := New((&asker{yes: true}).isProbe, nil)
	s.Stop("nobody")
	open := func() *os.File {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(fds[0]) // Its other end is gone: a device that cannot be read.
		return os.NewFile(uintptr(fds[1]), "device")
	}
	s.Start("none", zds.Workload{}, open())
	bad := workload()
	bad.Device.MTU = 1
	s.Start("bad", bad, open())
	if st := s.Stats(); st.Devices != 0 {
		t.Errorf("%d devices", st.Devices)
	}
	s.Start("u", workload(), open())
	s.Start("u", workload(), open()) // Anew.
	if st := s.Stats(); st.Devices != 1 {
		t.Errorf("%d devices", st.Devices)
	}
	s.Start("v", workload(), open())
	s.Close()
	s.Close()
	s.Stop("v")
	s.Start("late", workload(), open())
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors are open, %d were", after, before)
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

// A device that is gone does not keep the thread busy, nor others from theirs.
func TestDeviceThatIsGone(t *testing.T) {
	s := newStandin(t, (&asker{yes: true}).isProbe)
	w, file := newWire(t)
	s.Start("u", workload(), file)
	_ = w.dev.Close()
	netnstest.Eventually(t, "the device is given up", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.byUID["u"].lost
	})
	w2, file2 := newWire(t)
	s.Start("v", workload(), file2)
	w2.passes(segment(probe, app, flagSYN, ""))
	s.Stop("u")
}
