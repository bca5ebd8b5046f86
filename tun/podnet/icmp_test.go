package podnet

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

// icmpPacket is an ICMP message of either family from the pod's peer, with room for a quoted packet.
func icmpPacket(family int, typ byte) []byte {
	proto := map[int]byte{4: unix.IPPROTO_ICMP, 6: unix.IPPROTO_ICMPV6}[family]
	quoted := tcpPacket(netip.AddrPortFrom(podAddr[family], 1000), netip.AddrPortFrom(farAddr[family], 80), flagSYN, 1, 0, "")
	b := ipPacket(peerAddr[family], podAddr[family], proto, append([]byte{typ, 0, 0, 0, 0, 0, 0, 0}, quoted...), 2)
	if family == 4 { // Its checksum knows no pseudo header.
		m := b[20:]
		m[2], m[3] = 0, 0
		binary.BigEndian.PutUint16(m[2:], ^onesSum(m))
	}
	return b
}

// TestICMPSocketsHearErrorsOnly sends every type of message to the pod.
func TestICMPSocketsHearErrorsOnly(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	files, err := e.a.OpenICMP()
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 2 {
		t.Fatalf("%d sockets, want one for each family", len(files))
	}
	want := map[int][]byte{4: {icmpDestUnreachable, icmpTimeExceeded}, 6: {icmp6DestUnreachable, icmp6PacketTooBig, icmp6TimeExceeded}}
	for i, family := range bothFamilies {
		defer files[i].Close()
		for typ := range 256 {
			e.fromPeer(icmpPacket(family, byte(typ)))
		}
		last := want[family][0] // Whatever else is heard comes before it.
		e.fromPeer(icmpPacket(family, last))
		var got []byte
		netnstest.Eventually(t, "the last error", func() bool {
			got = append(got, icmpTypes(t, files[i], family)...)
			return len(got) > 1 && got[len(got)-1] == last
		})
		if !slices.Equal(got, append(slices.Clone(want[family]), last)) {
			t.Errorf("IPv%d: types %v were heard, want %v and %d again", family, got, want[family], last)
		}
	}
}

// icmpTypes reads what waits in a socket.
func icmpTypes(t *testing.T, f *os.File, family int) (types []byte) {
	t.Helper()
	rc, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	err = rc.Control(func(fd uintptr) {
		for {
			n, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			m := buf[:n]
			if family == 4 {
				m = m[int(m[0]&15)*4:]
			}
			types = append(types, m[0])
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return types
}

func TestICMPFamilyThatIsOffIsLeftOut(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	e.a.kernel.hasIPv6 = false // As booted with ipv6.disable=1.
	files, err := e.a.OpenICMP()
	if err != nil || len(files) != 1 {
		t.Fatalf("%d sockets, %v, want one", len(files), err)
	}
	defer files[0].Close()
	rc, err := files[0].SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = rc.Control(func(fd uintptr) {
		if domain, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_INET {
			t.Errorf("domain %d, %v, want AF_INET", domain, err)
		}
	})
	if err != nil {
		t.Error(err)
	}
}

// TestICMPWithoutCapability: the error says so, and nothing stays open.
func TestICMPWithoutCapability(t *testing.T) {
	e := newEnv(t)
	e.attach(Config{})
	err := e.a.kernel.inside(func() error {
		// Of this thread only, which ends with the function.
		if err := dropCapability(unix.CAP_NET_RAW); err != nil {
			t.Error(err)
		}
		before := openFiles(t)
		files, err := openICMP(e.a.kernel.families())
		if len(files) > 0 {
			t.Errorf("%d sockets without CAP_NET_RAW", len(files))
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d descriptors are open, %d were before", after, before)
		}
		return err
	})
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("%v, want EPERM", err)
	}
	if err := e.a.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.a.OpenICMP(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("of a closed attachment: %v, want os.ErrClosed", err)
	}
}

func dropCapability(c uint) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	data[c/32].Effective &^= 1 << (c % 32)
	return unix.Capset(&header, &data[0])
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Error(err)
	}
	return len(entries)
}
