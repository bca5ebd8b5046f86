package tun

import (
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

// A kernel that refuses a flag, here one that only a TAP may have, is asked again without what a TUN need not have.
func TestAttachDoesWithoutRefusedFlags(t *testing.T) {
	ns := netnstest.New(t, "pod")
	ns.Do(func() {
		if f, err := bind("ztun1", deviceFlags|unix.IFF_NAPI|unix.IFF_NAPI_FRAGS); err == nil {
			_ = f.Close()
			t.Fatal("the kernel takes the flags: this test shows nothing")
		}
		f, err := attach("ztun0", deviceFlags|unix.IFF_NAPI|unix.IFF_NAPI_FRAGS)
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
