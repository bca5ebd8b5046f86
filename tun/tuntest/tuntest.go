// Package tuntest has Devices without a kernel TUN behind them: two ends of a
// seqpacket socket pair, which keeps packet boundaries and can be waited on
// like the real thing, and a Wire that delays, loses and reorders what goes
// between two of them, or between real TUN devices.
package tuntest

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun"
)

// Pair returns two Devices; what is written to one is read from the other.
// They are closed with the test. Needs no privilege.
func Pair(t testing.TB, o tun.Options) (a, b *tun.Device) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatalf("tuntest: socketpair: %v", err)
	}
	var d [2]*tun.Device
	for i, fd := range fds {
		// Room for a burst of super-segments; without a privilege it is less.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20); err != nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
			if err != nil {
				t.Fatalf("tuntest: SO_SNDBUF: %v", err)
			}
		}
		f := os.NewFile(uintptr(fd), fmt.Sprintf("tuntest%d", i))
		if d[i], err = tun.New(f, o); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d[i].Close() })
	}
	return d[0], d[1]
}
