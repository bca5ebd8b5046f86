package tun

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun/netnstest"
)

func TestLastMapped(t *testing.T) {
	for _, c := range []struct {
		uidMap string
		want   int
	}{
		{"         0          0 4294967295\n", 4294967294},
		{"         0      65534          1\n", 0},
		{"0 1000 1\n1 100000 65536\n", 65536},
		{"", 0},
		{"0 0\nx y z\n", 0},
	} {
		if got := lastMapped(c.uidMap); got != c.want {
			t.Errorf("lastMapped(%q) = %d, want %d", c.uidMap, got, c.want)
		}
	}
}

// A kernel that refuses the flags, here since they name no kind of device, is asked again with those of every TUN.
func TestAttachDoesWithoutRefusedFlags(t *testing.T) {
	ns := netnstest.New(t, "pod")
	ns.Do(func() {
		const refused = deviceFlags &^ unix.IFF_TUN
		if f, err := bind("ztun0", refused); !errors.Is(err, unix.EINVAL) {
			_ = f.Close()
			t.Fatalf("bind = %v, want EINVAL, or this test shows nothing", err)
		}
		f, err := attach("ztun0", refused)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if offload, err := negotiate(f); err != nil || offload {
			t.Errorf("negotiate = %v, %v; want no offload", offload, err)
		}
		dev, err := New(f, Options{Offload: true})
		if err != nil {
			t.Fatal(err)
		}
		if got := dev.Lacks(); len(got) != 1 || got[0] != VirtioHeader {
			t.Errorf("Lacks() = %v, want the header", got)
		}
	})
}
