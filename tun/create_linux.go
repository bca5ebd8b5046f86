package tun

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrBusy says that somebody reads the device.
var ErrBusy = errors.New("tun: device has a reader")

const (
	cloneDevice = "/dev/net/tun"
	plainFlags  = unix.IFF_TUN | unix.IFF_NO_PI
	deviceFlags = plainFlags | unix.IFF_VNET_HDR
	tcpOffloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
)

// Create makes a persistent TUN device in the network namespace of the calling thread, down, and returns its packet
// descriptor. The descriptor blocks, and must stay so: its flags are shared by all who hold it. offload says whether
// the kernel agreed to checksum and segmentation offload; where it has no virtio headers, it did not. The conventions
// are wireguard-go's, which can read the device too. The error matches os.ErrExist if the name is taken.
//
// Without CAP_NET_ADMIN over the namespace nobody can attach to the device later: it belongs to a user that does not exist
// (in a user namespace, where the kernel refuses such an owner, to the highest user there is).
func Create(name string, mtu uint32) (f *os.File, offload bool, err error) {
	if exists(name) {
		return nil, false, fmt.Errorf("tun: create %s: %w", name, os.ErrExist)
	}
	if f, err = attach(name, deviceFlags); err != nil {
		return nil, false, fmt.Errorf("tun: create %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close() // not persistent yet: this removes the device
		}
	}()
	if err = setOwner(f); err != nil {
		return nil, false, fmt.Errorf("tun: create %s: %w", name, err)
	}
	if err = setMTU(name, mtu); err != nil {
		return nil, false, fmt.Errorf("tun: create %s: set MTU %d: %w", name, mtu, err)
	}
	if offload, err = negotiate(f); err != nil {
		return nil, false, fmt.Errorf("tun: create %s: %w", name, err)
	}
	if err = ioctl(f, unix.TUNSETPERSIST, 1); err != nil {
		return nil, false, fmt.Errorf("tun: create %s: make it persistent: %w", name, err)
	}
	return f, offload, nil
}

// Open opens a device that Create made, in the network namespace of the calling thread. The error matches ErrBusy
// if somebody reads it and os.ErrNotExist if there is none.
func Open(name string) (f *os.File, offload bool, err error) {
	if !exists(name) {
		return nil, false, fmt.Errorf("tun: open %s: %w", name, os.ErrNotExist)
	}
	if f, err = attach(name, deviceFlags); err != nil {
		return nil, false, fmt.Errorf("tun: open %s: %w", name, err)
	}
	offload, err = negotiate(f)
	if err != nil {
		_ = f.Close()
		return nil, false, fmt.Errorf("tun: open %s: %w", name, err)
	}
	return f, offload, nil
}

// attach binds a new descriptor to the device, which is made if there is none. A kernel that refuses the flags gets
// those that every TUN has.
func attach(name string, flags uint16) (*os.File, error) {
	f, err := bind(name, flags)
	if errors.Is(err, unix.EINVAL) && flags != plainFlags {
		return bind(name, plainFlags)
	}
	return f, err
}

// bind is attach with these flags. os.NewFile keeps a descriptor that blocks out of the runtime's poller.
func bind(name string, flags uint16) (*os.File, error) {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", cloneDevice, err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return nil, ErrBusy
		}
		return nil, fmt.Errorf("attach: %w", err)
	}
	return os.NewFile(uintptr(fd), cloneDevice), nil
}

// setOwner keeps others off: an ownerless device can be attached by any process of the pod that gets at a TUN node.
func setOwner(f *os.File) error {
	err := ioctl(f, unix.TUNSETOWNER, -2)
	if errors.Is(err, unix.EINVAL) {
		err = ioctl(f, unix.TUNSETOWNER, highestUser())
	}
	if err != nil {
		return fmt.Errorf("set its owner: %w", err)
	}
	return nil
}

// highestUser is the last user id that exists in this user namespace.
func highestUser() int {
	b, err := os.ReadFile("/proc/thread-self/uid_map")
	if err != nil {
		return 0
	}
	return lastMapped(string(b))
}

// lastMapped reads lines of "inside outside count", see user_namespaces(7).
func lastMapped(uidMap string) int {
	last := 0
	for line := range strings.Lines(uidMap) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		first, err1 := strconv.ParseUint(f[0], 10, 32)
		count, err2 := strconv.ParseUint(f[2], 10, 32)
		if err1 == nil && err2 == nil && count > 0 {
			last = max(last, int(first+count-1))
		}
	}
	return last
}

// negotiate asks for TCP offloads, and does without where the kernel has none, or no virtio header to tell of them.
// It takes back what an earlier descriptor of the device agreed to. UDP segmentation offload is not asked for, since
// captured UDP is only DNS.
func negotiate(f *os.File) (offload bool, err error) {
	var header bool
	err = control(f, func(fd int) error {
		flags, err := flagsOf(fd)
		header = flags&unix.IFF_VNET_HDR != 0
		// A kernel without the call has this size; New checks it.
		_ = unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderSize)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("read its flags: %w", err)
	}
	if header && ioctl(f, unix.TUNSETOFFLOAD, tcpOffloads) == nil {
		return true, nil
	}
	// A kernel without the call has none on.
	_ = ioctl(f, unix.TUNSETOFFLOAD, 0)
	return false, nil
}

func ioctl(f *os.File, req uint, value int) error {
	return control(f, func(fd int) error { return unix.IoctlSetInt(fd, req, value) })
}

// control runs an operation on the descriptor without (*os.File).Fd, which may change its flags.
func control(f *os.File, op func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	if err := rc.Control(func(fd uintptr) { opErr = op(int(fd)) }); err != nil {
		return err
	}
	return opErr
}

func exists(name string) bool { return onLink(name, unix.SIOCGIFINDEX, func(*unix.Ifreq) {}) == nil }

func setMTU(name string, mtu uint32) error {
	return onLink(name, unix.SIOCSIFMTU, func(r *unix.Ifreq) { r.SetUint32(mtu) })
}

// onLink makes a request about an interface of this thread's namespace.
func onLink(name string, req uint, set func(*unix.Ifreq)) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	set(ifr)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.IoctlIfreq(fd, req, ifr)
}
