package netnstest

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Refusal is a system call that the kernel answers with an error, as one does that lacks it.
type Refusal struct {
	Call uintptr // unix.SYS_*
	// Arg is the argument, counted from 0, that decides: refused are calls in which its low 32 bits, under Mask, are Value.
	Arg         int
	Mask, Value uint32
	Errno       unix.Errno
}

// Refuse makes the kernel refuse system calls of the calling thread for as long as it lives. The caller is locked to a
// thread that ends soon: inside Do, or on a loop that ends with the test. It is a seccomp filter (CONFIG_SECCOMP_FILTER),
// so whatever is not refused is the real thing.
func Refuse(list ...Refusal) error {
	const offsetCall, offsetArgs = 0, 16 // in struct seccomp_data of linux/seccomp.h
	low := uint32(0)                     // of the low half of an argument
	if x := uint16(1); *(*byte)(unsafe.Pointer(&x)) == 0 {
		low = 4
	}
	var code []unix.SockFilter
	add := func(op uint16, k uint32, jt, jf uint8) {
		code = append(code, unix.SockFilter{Code: op, K: k, Jt: jt, Jf: jf})
	}
	for _, r := range list {
		add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offsetCall, 0, 0)
		add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, uint32(r.Call), 0, 4)
		add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offsetArgs+8*uint32(r.Arg)+low, 0, 0)
		add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, r.Mask, 0, 0)
		add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, r.Value, 0, 1)
		add(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ERRNO|uint32(r.Errno), 0, 0)
	}
	add(unix.BPF_RET|unix.BPF_K, unix.SECCOMP_RET_ALLOW, 0, 0)
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	// An ordinary user needs this. It holds for the thread only, as the filter does.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("netnstest: no_new_privs: %w", err)
	}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(code)
	if errno != 0 {
		return fmt.Errorf("netnstest: seccomp: %w", errno)
	}
	return nil
}

// WithoutNoWait is a kernel before Linux 6.4, in which a read from a TUN cannot be told not to wait.
func WithoutNoWait(errno unix.Errno) Refusal {
	const rwfNowait = 0x8 // linux/fs.h
	return Refusal{Call: unix.SYS_PREADV2, Arg: 5, Mask: rwfNowait, Value: rwfNowait, Errno: errno}
}

// WithoutIoctl is a kernel that does not know an ioctl.
func WithoutIoctl(request uint32, errno unix.Errno) Refusal {
	return Refusal{Call: unix.SYS_IOCTL, Arg: 1, Mask: ^uint32(0), Value: request, Errno: errno}
}
