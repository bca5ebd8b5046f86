package tun_test

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/netnstest"
	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

// create makes a device in a namespace; its descriptor is closed at the end of the test.
func create(t *testing.T, ns *netnstest.NS, name string, mtu uint32) (f *os.File, offload bool) {
	t.Helper()
	ns.Do(func() {
		var err error
		if f, offload, err = tun.Create(name, mtu); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() { _ = f.Close() })
	return f, offload
}

func TestCreateMakesAPersistentBlockingDevice(t *testing.T) {
	ns := netnstest.New(t, "pod")
	f, offload := create(t, ns, "ztun0", 1450)
	if !offload {
		t.Error("offload = false on a kernel that has it")
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("descriptor flags = %#x, %v; want blocking", flags, err)
	}
	if n, err := unix.IoctlGetInt(int(f.Fd()), unix.TUNGETVNETHDRSZ); err != nil || n != tun.HeaderSize {
		t.Errorf("header size = %d, %v; want %d", n, err, tun.HeaderSize)
	}
	link := ns.Link("ztun0")
	tuntap, ok := link.(*netlink.Tuntap)
	if !ok || tuntap.NonPersist || tuntap.Mode != netlink.TUNTAP_MODE_TUN {
		t.Errorf("link = %#v, want a persistent TUN", link)
	}
	if tuntap.Owner == 0 && os.Getenv("ZTUN_NETNSTEST_CHILD") == "" {
		t.Error("device belongs to root or nobody")
	}
	if got := link.Attrs(); got.MTU != 1450 || got.Flags&net.FlagUp != 0 {
		t.Errorf("MTU = %d, flags = %v; want 1450 and down", got.MTU, got.Flags)
	}
	ns.Do(func() {
		if _, _, err := tun.Create("ztun0", 1450); !errors.Is(err, os.ErrExist) {
			t.Errorf("second Create = %v, want os.ErrExist", err)
		}
		if _, _, err := tun.Open("ztun0"); !errors.Is(err, tun.ErrBusy) {
			t.Errorf("Open under a reader = %v, want ErrBusy", err)
		}
		if _, _, err := tun.Open("ztun1"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Open of nothing = %v, want os.ErrNotExist", err)
		}
	})
	_ = f.Close()
	ns.Do(func() {
		again, offload, err := tun.Open("ztun0")
		if err != nil || !offload {
			t.Fatalf("Open after close = %v, %v; want offload", offload, err)
		}
		_ = again.Close()
	})
}

// What the pod's kernel sends is read by wireguard-go, which knows nothing of our Device.
func TestCreateSpeaksToAForeignReader(t *testing.T) {
	ns := netnstest.New(t, "pod")
	f, _ := create(t, ns, "ztun0", 1500)
	ns.Addr("ztun0", "10.9.0.1/24")
	ns.Up("ztun0")
	var dev wgtun.Device
	ns.Do(func() {
		dup, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if dev, err = wgtun.CreateTUNFromFile(os.NewFile(uintptr(dup), "dup"), 1500); err != nil {
			t.Fatal(err)
		}
	})
	defer func() { _ = dev.Close() }()
	c, err := ns.Dial("udp", "10.9.0.2:9", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	bufs := make([][]byte, dev.BatchSize())
	for i := range bufs {
		bufs[i] = make([]byte, 2048)
	}
	for {
		sizes := make([]int, len(bufs))
		n, err := dev.Read(bufs, sizes, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if p := bufs[i][:sizes[i]]; p[0]>>4 == 4 && p[9] == unix.IPPROTO_UDP && string(p[28:]) == "hello" {
				return
			}
		}
	}
}

func TestStrangerCannotAttach(t *testing.T) {
	ns := netnstest.New(t, "pod")
	if os.Getenv("ZTUN_NETNSTEST_CHILD") != "" {
		t.Skip("a user namespace with one user has no stranger")
	}
	f, _ := create(t, ns, "ztun0", 1500)
	_ = f.Close()
	try := func(uid int) (err error) {
		ns.Do(func() {
			fd, e := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if e != nil {
				t.Fatal(e)
			}
			defer func() { _ = unix.Close(fd) }()
			// Credentials of this thread only, which ends with Do.
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				t.Fatal(errno)
			}
			ifr, _ := unix.NewIfreq("ztun0")
			ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
		})
		return err
	}
	if err := try(65534); !errors.Is(err, unix.EPERM) {
		t.Errorf("a user of the pod attaches: %v, want EPERM", err)
	}
	// Without an owner it would work.
	ns.Do(func() {
		g, _, err := tun.Open("ztun0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = g.Close() }()
		if err := unix.IoctlSetInt(int(g.Fd()), unix.TUNSETOWNER, 65534); err != nil {
			t.Fatal(err)
		}
	})
	if err := try(65534); err != nil {
		t.Errorf("its owner attaches: %v", err)
	}
}
