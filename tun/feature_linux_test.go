package tun_test

import (
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
)

const patience = 30 * time.Second

// foreign makes a device as another program may, in the namespace of the calling thread.
func foreign(t *testing.T, name string, flags uint16) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { _ = f.Close() })
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	return f
}

// quietUp gives ztun0 an address and brings it up without the kernel's own IPv6 packets.
func quietUp(ns *netnstest.NS) {
	ns.SetSysctl("net/ipv6/conf/ztun0/disable_ipv6", "1")
	ns.Addr("ztun0", "10.9.0.1/24")
	ns.Up("ztun0")
}

// packets reads from a Device into one buffer.
type packets struct {
	dev *tun.Device
	vec tun.Vector
	buf [tun.MaxPacket]byte
}

func (p *packets) next() ([]byte, tun.Header, error) {
	p.vec.Set(0, p.buf[:])
	n, h, err := p.dev.Read(&p.vec)
	return p.buf[:n], h, err
}

// answer sends a datagram through the device and back with the ends swapped, which leaves its checksum right.
func answer(t *testing.T, p *packets, wantVouched bool) {
	t.Helper()
	if _, _, err := p.next(); !errors.Is(err, tun.ErrEmpty) {
		t.Fatalf("Read of nothing = %v, want ErrEmpty", err)
	}
	c, err := net.Dial("udp", "10.9.0.2:9")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b, h, err := p.next()
	if err != nil {
		t.Fatalf("Read = %v", err)
	}
	if len(b) != 33 || string(b[28:]) != "hello" {
		t.Fatalf("Read = %x, want a datagram with hello", b)
	}
	if h.ChecksumVouched() != wantVouched {
		t.Errorf("header %+v: vouched = %v, want %v", h, h.ChecksumVouched(), wantVouched)
	}
	if !wantVouched && !udpChecksumOK(b) {
		t.Errorf("%x: checksum is not whole", b)
	}
	if _, _, err := p.next(); !errors.Is(err, tun.ErrEmpty) {
		t.Fatalf("Read after the packet = %v, want ErrEmpty", err)
	}
	reply := slices.Concat(b[:12], b[16:20], b[12:16], b[22:24], b[20:22], b[24:])
	if err := p.dev.Write(h, reply[:20], reply[20:]); err != nil {
		t.Fatalf("Write = %v", err)
	}
	back := make([]byte, 64)
	if n, err := c.Read(back); err != nil || string(back[:n]) != "hello" {
		t.Errorf("answer = %q, %v", back[:n], err)
	}
}

// udpChecksumOK adds up pseudo header and datagram of an IPv4 packet without options.
func udpChecksumOK(b []byte) bool {
	sum := uint32(unix.IPPROTO_UDP) + uint32(len(b)-20)
	for i, x := range b[12:] {
		sum += uint32(x) << (8 * (1 - i%2))
	}
	return sum%0xffff == 0
}

func TestDeviceWithEverythingLacksNothing(t *testing.T) {
	ns := netnstest.New(t, "pod")
	f, offload := create(t, ns, "ztun0", 1500)
	quietUp(ns)
	dev, err := tun.New(f, tun.Options{Offload: offload})
	if err != nil {
		t.Fatal(err)
	}
	ns.Do(func() { answer(t, &packets{dev: dev}, true) })
	if got := dev.Lacks(); len(got) != 0 {
		t.Errorf("Lacks() = %v on a kernel that has everything", got)
	}
}

// What kernels without RWF_NOWAIT on TUN devices say, and a seccomp profile that is older than preadv2.
func TestReadWithoutNOWAIT(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EOPNOTSUPP, unix.EINVAL, unix.ENOSYS, unix.EPERM} {
		t.Run(errno.Error(), func(t *testing.T) {
			ns := netnstest.New(t, "pod")
			f, offload := create(t, ns, "ztun0", 1500)
			quietUp(ns)
			dev, err := tun.New(f, tun.Options{Offload: offload})
			if err != nil {
				t.Fatal(err)
			}
			ns.Do(func() {
				if err := netnstest.Refuse(netnstest.WithoutNoWait(errno)); err != nil {
					t.Fatal(err)
				}
				answer(t, &packets{dev: dev}, true)
			})
			if got := dev.Lacks(); !slices.Equal(got, []tun.Feature{tun.NoWait}) {
				t.Errorf("Lacks() = %v, want RWF_NOWAIT", got)
			}
		})
	}
}

// A device that vanishes must not look like a kernel that lacks something for ever, nor block the reader.
func TestReadWithoutNOWAITOfALostDevice(t *testing.T) {
	ns := netnstest.New(t, "pod")
	f, _ := create(t, ns, "ztun0", 1500)
	dev, err := tun.New(f, tun.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ns.Do(func() {
		if err := netnstest.Refuse(netnstest.WithoutNoWait(unix.EOPNOTSUPP)); err != nil {
			t.Fatal(err)
		}
		if err := ns.Netlink().LinkDel(ns.Link("ztun0")); err != nil {
			t.Fatal(err)
		}
		if _, _, err := (&packets{dev: dev}).next(); !errors.Is(err, unix.EBADFD) {
			t.Errorf("Read of a lost device = %v, want EBADFD", err)
		}
	})
}

func TestDeviceWithoutHeader(t *testing.T) {
	ns := netnstest.New(t, "pod")
	// As by an agent before: persistent, with offloads on.
	f, _ := create(t, ns, "ztun0", 1500)
	_ = f.Close()
	ns.Do(func() { f = foreign(t, "ztun0", unix.IFF_TUN|unix.IFF_NO_PI) })
	quietUp(ns)
	if !tso(t, ns, "ztun0") {
		t.Fatal("segmentation offload is off already: this test shows nothing")
	}
	dev, err := tun.New(f, tun.Options{Offload: true})
	if err != nil {
		t.Fatal(err)
	}
	if dev.Offload() {
		t.Error("Offload() = true without a header to tell of it")
	}
	if tso(t, ns, "ztun0") {
		t.Error("super-segments would come without a header")
	}
	if got := dev.Lacks(); !slices.Equal(got, []tun.Feature{tun.VirtioHeader}) {
		t.Errorf("Lacks() = %v, want the header only", got)
	}
	ns.Do(func() { answer(t, &packets{dev: dev}, false) })
	if err := dev.Write(tun.Header{Flags: tun.NeedsChecksum}, make([]byte, 40)); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("Write of a partial checksum = %v, want EOPNOTSUPP", err)
	}
}

// A reader's Vector goes from device to device: the header of one must not be taken for the next one's.
func TestVectorIsSharedWithADeviceWithoutHeader(t *testing.T) {
	with, bare := netnstest.New(t, "with"), netnstest.New(t, "without")
	f, offload := create(t, with, "ztun0", 1500)
	quietUp(with)
	p := &packets{}
	var err error
	if p.dev, err = tun.New(f, tun.Options{Offload: offload}); err != nil {
		t.Fatal(err)
	}
	with.Do(func() { answer(t, p, true) })
	bare.Do(func() { f = foreign(t, "ztun0", unix.IFF_TUN|unix.IFF_NO_PI) })
	quietUp(bare)
	if p.dev, err = tun.New(f, tun.Options{}); err != nil {
		t.Fatal(err)
	}
	bare.Do(func() { answer(t, p, false) })
}

// tso asks the kernel whether an interface takes super-segments of IPv4 TCP.
func tso(t *testing.T, ns *netnstest.NS, name string) (on bool) {
	t.Helper()
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		value := struct{ cmd, data uint32 }{cmd: unix.ETHTOOL_GTSO}
		var req struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}
		copy(req.name[:], name)
		req.data = unsafe.Pointer(&value)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			t.Fatal(errno)
		}
		on = value.data != 0
	})
	return on
}

func TestDeviceWithoutOffloads(t *testing.T) {
	ns := netnstest.New(t, "pod")
	var f *os.File
	ns.Do(func() {
		err := netnstest.Refuse(
			netnstest.WithoutIoctl(unix.TUNSETOFFLOAD, unix.EINVAL),
			netnstest.WithoutIoctl(unix.TUNSETVNETHDRSZ, unix.ENOTTY),
		)
		if err != nil {
			t.Fatal(err)
		}
		var offload bool
		if f, offload, err = tun.Create("ztun0", 1400); err != nil || offload {
			t.Fatalf("Create = %v, %v; want no offload and no error", offload, err)
		}
		_ = f.Close()
		if f, offload, err = tun.Open("ztun0"); err != nil || offload {
			t.Fatalf("Open = %v, %v; want no offload and no error", offload, err)
		}
	})
	t.Cleanup(func() { _ = f.Close() })
	quietUp(ns)
	dev, err := tun.New(f, tun.Options{MTU: 1400})
	if err != nil {
		t.Fatal(err)
	}
	if got := dev.Lacks(); !slices.Equal(got, []tun.Feature{tun.Offload}) {
		t.Errorf("Lacks() = %v, want the offloads only", got)
	}
	ns.Do(func() { answer(t, &packets{dev: dev}, false) })
	if got := ns.Link("ztun0").Attrs().MTU; got != 1400 {
		t.Errorf("MTU = %d, want 1400", got)
	}
}

func TestNewSetsTheHeadersSizeOrRefuses(t *testing.T) {
	ns := netnstest.New(t, "pod")
	f, _ := create(t, ns, "ztun0", 1500)
	twelve := func() {
		if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.TUNSETVNETHDRSZ, 12); err != nil {
			t.Fatal(err)
		}
	}
	twelve()
	if _, err := tun.New(f, tun.Options{}); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.IoctlGetInt(int(f.Fd()), unix.TUNGETVNETHDRSZ); err != nil || n != tun.HeaderSize {
		t.Errorf("header size = %d, %v; want %d", n, err, tun.HeaderSize)
	}
	twelve()
	ns.Do(func() {
		if err := netnstest.Refuse(netnstest.WithoutIoctl(unix.TUNSETVNETHDRSZ, unix.EINVAL)); err != nil {
			t.Fatal(err)
		}
		if _, err := tun.New(f, tun.Options{}); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "12 bytes") {
			t.Errorf("New with a header of 12 bytes = %v, want a refusal that says so", err)
		}
	})
}

func TestNewRefusesATAP(t *testing.T) {
	netnstest.New(t, "pod").Do(func() {
		f := foreign(t, "tap0", unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
		if _, err := tun.New(f, tun.Options{}); err == nil || !strings.Contains(err.Error(), "not a TUN") {
			t.Errorf("New = %v, want a refusal", err)
		}
	})
}
