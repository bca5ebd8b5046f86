package netstack

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
)

// A reader that cannot wait any more ends, with its stacks, and says so: it would
// spin for ever, or leave its pods without a word.
func TestReaderThatCannotWaitEnds(t *testing.T) {
	failed := make(chan error, 1)
	e, err := New(Config{Readers: 1, Failed: func(err error) { failed <- err }})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	dev, _ := tuntest.Pair(t, tun.Options{MTU: 1500})
	h := &hooks{t: t}
	s, err := e.Add(dev, StackConfig{Addrs: []netip.Addr{pod}}, h.serve)
	if err != nil {
		t.Fatal(err)
	}
	r := e.readers[0]
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	do(s.Loop(), func() error { return unix.Dup3(null, r.epfd, unix.O_CLOEXEC) }) // No set of descriptors any more.
	r.signal()
	select {
	case err := <-failed:
		if !errors.Is(err, unix.EINVAL) {
			t.Errorf("failed with %v, want EINVAL", err)
		}
	case <-time.After(patience):
		t.Fatal("the reader does not end")
	}
	select {
	case <-r.done:
	case <-time.After(patience):
		t.Fatal("the reader's thread does not end")
	}
	if err := s.Update(Update{Addrs: []netip.Addr{pod}}); !errors.Is(err, ErrClosed) {
		t.Errorf("its stack goes on: %v", err)
	}
}

func TestSignalIsNoError(t *testing.T) {
	if n, err := polled(-1, unix.EINTR); n != 0 || err != nil {
		t.Errorf("EINTR: %d, %v", n, err)
	}
	if n, err := polled(3, nil); n != 3 || err != nil {
		t.Errorf("3 events: %d, %v", n, err)
	}
	if _, err := polled(-1, unix.EBADF); !errors.Is(err, unix.EBADF) {
		t.Errorf("EBADF: %v", err)
	}
}
