package zds

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MaxICMP is how many ICMP sockets go with a device: one for each family.
const MaxICMP = 2

// Files are what is open of one pod. Whoever is given Files owns all of them.
type Files struct {
	// Device is the TUN device; nil: there are no files.
	Device *os.File
	// ICMP are raw ICMP sockets of the pod's namespace, to read errors about
	// the pod's connections from. Fewer, or none, where they cannot be had.
	ICMP []*os.File
	// Predecessor is a packet socket to the proxy that read the device before and
	// still has flows; nil: there is none.
	Predecessor *os.File
}

// Close closes all of them. Zero Files may be closed.
func (f Files) Close() { closeAll(f.list()) }

// list has the files in the order in which they are sent.
func (f Files) list() []*os.File {
	if f.Device == nil {
		return nil
	}
	list := append([]*os.File{f.Device}, f.ICMP...)
	if f.Predecessor != nil {
		list = append(list, f.Predecessor)
	}
	return list
}

// filesOf is list undone; predecessor says that the last is one.
func filesOf(list []*os.File, predecessor bool) (f Files) {
	if n := len(list); predecessor && n > 1 {
		list, f.Predecessor = list[:n-1], list[n-1]
	}
	if len(list) > 0 {
		f.Device, f.ICMP = list[0], list[1:]
	}
	return f
}

// check says what makes f impossible to send.
func (f Files) check() error {
	if len(f.ICMP) > MaxICMP || f.Device == nil && len(f.ICMP) > 0 {
		return fmt.Errorf("zds: %d ICMP sockets with device: %v, at most %d go with one", len(f.ICMP), f.Device != nil, MaxICMP)
	}
	return nil
}

// dup returns other descriptors of the same open files.
func (f Files) dup() (Files, error) {
	var out []*os.File
	for _, file := range f.list() {
		d, err := dup(file)
		if err != nil {
			closeAll(out)
			return Files{}, err
		}
		out = append(out, d)
	}
	return filesOf(out, f.Predecessor != nil), nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// dup returns another descriptor of the same open file.
func dup(f *os.File) (*os.File, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	err = rc.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("zds: duplicate descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
