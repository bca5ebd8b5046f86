package meshtest

import (
	"os"

	"golang.org/x/sys/unix"
)

// dup shares a descriptor without touching its flags.
func dup(f *os.File) (*os.File, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, errno := -1, error(nil)
	if err := rc.Control(func(old uintptr) { fd, errno = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if errno != nil {
		return nil, os.NewSyscallError("dup", errno)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// muzzle puts /dev/null in the place of a descriptor.
func muzzle(fd int) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	rc, err := null.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	if err := rc.Control(func(n uintptr) { errno = unix.Dup3(int(n), fd, unix.O_CLOEXEC) }); err != nil {
		return err
	}
	return os.NewSyscallError("dup3", errno)
}
