package tun

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxParts is how many parts a packet may be written from.
const maxParts = 40

// A Vector is a reader's list of buffers for the next packet, kept from read
// to read so that nothing is allocated.
type Vector struct {
	head [HeaderSize]byte
	iov  [MaxViews + 1]unix.Iovec
	n    int
}

// Set makes buf the i-th buffer. Buffers are filled in order.
func (v *Vector) Set(i int, buf []byte) {
	v.iov[i+1].Base = unsafe.SliceData(buf)
	v.iov[i+1].SetLen(len(buf))
	v.n = max(v.n, i+1)
}

// A Writer collects the parts of one packet to be written. Its zero value is
// ready after Reset; it is kept from packet to packet.
type Writer struct {
	head [HeaderSize]byte
	iov  [maxParts + 1]unix.Iovec
	n    int
}

// Reset starts a packet.
func (w *Writer) Reset(h Header) {
	h.encode(&w.head)
	w.n = 0
}

// Append adds a part, valid until the packet is written. It reports false
// when there is no room for it.
func (w *Writer) Append(p []byte) bool {
	if len(p) == 0 {
		return true
	}
	if w.n == maxParts {
		return false
	}
	w.n++
	w.iov[w.n].Base = unsafe.SliceData(p)
	w.iov[w.n].SetLen(len(p))
	return true
}

const rwfNowait = 0x8 // RWF_NOWAIT of linux/fs.h

func (d *Device) readv(v *Vector) (int, unix.Errno) {
	v.iov[0].Base = &v.head[0]
	v.iov[0].SetLen(HeaderSize)
	if d.pollFirst {
		return d.pollReadv(v)
	}
	// Raw: with RWF_NOWAIT it cannot block, so the scheduler need not know.
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(d.fd), uintptr(unsafe.Pointer(&v.iov[d.skip])), uintptr(v.n+1-d.skip), ^uintptr(0), ^uintptr(0), rwfNowait)
	switch errno {
	case unix.EOPNOTSUPP, unix.EINVAL, unix.ENOSYS, unix.EPERM:
		// The flag, or the call, is not known or not allowed. Were it something
		// else, the plain read would say so too.
		d.pollFirst = true
		return d.pollReadv(v)
	}
	return int(n), errno
}

// pollReadv is for kernels without RWF_NOWAIT on this kind of descriptor. With
// one reader, what poll has seen is still there to be read. Were it not, the
// read would block: it is an ordinary call, so that the scheduler knows.
func (d *Device) pollReadv(v *Vector) (int, unix.Errno) {
	pfd := unix.PollFd{Fd: int32(d.fd), Events: unix.POLLIN}
	var zero unix.Timespec
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&pfd)), 1, uintptr(unsafe.Pointer(&zero)), 0, 0, 0)
	if errno != 0 || n == 0 {
		return 0, unix.EAGAIN
	}
	r, _, errno := unix.Syscall(unix.SYS_READV, uintptr(d.fd), uintptr(unsafe.Pointer(&v.iov[d.skip])), uintptr(v.n+1-d.skip))
	return int(r), errno
}

// WriteVector sends the packet collected in w.
func (d *Device) WriteVector(w *Writer) error {
	w.iov[0].Base = &w.head[0]
	w.iov[0].SetLen(HeaderSize)
	if d.skip != 0 && w.head != ([HeaderSize]byte{}) {
		return &WriteError{unix.EOPNOTSUPP} // Nothing would tell the kernel what is left undone.
	}
	// Raw: a TUN takes the packet or drops it, it never waits.
	_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(d.fd), uintptr(unsafe.Pointer(&w.iov[d.skip])), uintptr(w.n+1-d.skip))
	if errno != 0 {
		return &WriteError{errno}
	}
	return nil
}

// WriteError is the kernel's answer to a packet it did not take.
type WriteError struct{ Errno unix.Errno }

func (e *WriteError) Error() string { return "tun: write: " + e.Errno.Error() }
func (e *WriteError) Unwrap() error { return e.Errno }

// Send sends the packet collected in w, its header first, over a packet socket
// without waiting: EAGAIN or ENOBUFS where there is no room, EPIPE when the other
// end is closed.
func (w *Writer) Send(fd int) error {
	w.iov[0].Base = &w.head[0]
	w.iov[0].SetLen(HeaderSize)
	msg := unix.Msghdr{Iov: &w.iov[0]}
	msg.SetIovlen(w.n + 1)
	_, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if errno != 0 {
		return &WriteError{errno}
	}
	return nil
}
