package podnet

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ownProc is a proc file system that is mounted nowhere. Runtimes mount
// /proc/sys read-only in containers that are not privileged; a file system of
// one's own is not. What it shows below sys/net is the network namespace of the
// thread that looks, like any other. It needs CAP_SYS_ADMIN and Linux 5.2.
type ownProc struct{ root *os.File }

// open opens a file for writing. The path is relative to /proc.
func (o *ownProc) open(path string) (*os.File, error) {
	if o.root == nil {
		root, err := mountProc()
		if err != nil {
			return nil, fmt.Errorf("/proc/sys is read-only, and no other could be mounted: %w", err)
		}
		o.root = root
	}
	fd, err := unix.Openat(int(o.root.Fd()), path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/proc/" + path, Err: err}
	}
	return os.NewFile(uintptr(fd), "/proc/"+path), nil
}

func (o *ownProc) close() {
	if o.root != nil {
		_ = o.root.Close()
		o.root = nil
	}
}

// mountProc returns the root of a new proc, which goes when it is closed.
func mountProc() (*os.File, error) {
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer func() { _ = unix.Close(fs) }()
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, os.NewSyscallError("fsconfig", err)
	}
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	return os.NewFile(uintptr(root), "proc"), nil
}
