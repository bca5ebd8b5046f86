package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/config"
)

// dropPrivileges gives every capability up for good, in every thread, and
// makes sure of it by what the kernel says. An ordinary user has none to give
// up. It runs before there is anything to protect: no configuration is read
// and no packet is seen with a privilege.
func dropPrivileges() error {
	if err := raiseFileLimit(); err != nil {
		return err
	}
	// A core dump would hold every key.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("privileges: no core dumps: %w", err)
	}
	err := dropEverywhere()
	if errors.Is(err, syscall.ENOTSUP) {
		// With cgo the runtime does not know every thread. A new program
		// starts with one.
		err = dropAndExec()
	}
	if err != nil {
		return err
	}
	return verifyPrivileges("/proc/self/task")
}

// capHeader and capData are struct __user_cap_header_struct and two of
// __user_cap_data_struct (linux/capability.h), all capabilities zero.
var (
	capHeader = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	capData   [2]unix.CapUserData
)

// A drop is one system call that takes something away.
type drop struct {
	what     string
	call     uintptr
	args     [3]uintptr
	optional bool // Needs a privilege that we may not have.
}

func drops() []drop {
	list := []drop{{what: "no_new_privs", call: unix.SYS_PRCTL, args: [3]uintptr{unix.PR_SET_NO_NEW_PRIVS, 1}}}
	for c := range uintptr(64) {
		list = append(list, drop{what: "bounding set", call: unix.SYS_PRCTL, args: [3]uintptr{unix.PR_CAPBSET_DROP, c}, optional: true})
	}
	return append(list,
		drop{what: "ambient set", call: unix.SYS_PRCTL, args: [3]uintptr{unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL}},
		drop{what: "capabilities", call: unix.SYS_CAPSET,
			args: [3]uintptr{uintptr(unsafe.Pointer(&capHeader)), uintptr(unsafe.Pointer(&capData))}})
}

// dropEverywhere works on all threads. It is ENOTSUP in a program with cgo.
func dropEverywhere() error {
	for _, d := range drops() {
		_, _, errno := syscall.AllThreadsSyscall6(d.call, d.args[0], d.args[1], d.args[2], 0, 0, 0)
		if errno != 0 && (!d.optional || errno == syscall.ENOTSUP) {
			return fmt.Errorf("privileges: %s: %w", d.what, errno)
		}
	}
	return nil
}

// dropAndExec works on this thread and starts the program again in it, which
// ends the others. It returns only with an error, or when there was nothing to
// drop, as in the program that was started again.
func dropAndExec() error {
	if verifyPrivileges("/proc/self/task") == nil {
		return nil
	}
	runtime.LockOSThread()
	for _, d := range drops() {
		_, _, errno := syscall.RawSyscall6(d.call, d.args[0], d.args[1], d.args[2], 0, 0, 0)
		if errno != 0 && !d.optional {
			return fmt.Errorf("privileges: %s: %w", d.what, errno)
		}
	}
	// With no_new_privs a new program gets nothing that this thread lacks, so
	// it does not come here again.
	text, err := os.ReadFile("/proc/thread-self/status")
	if err == nil {
		err = verifyStatus(string(text))
	}
	if err == nil {
		err = syscall.Exec("/proc/self/exe", os.Args, config.Process().Environ)
	}
	return fmt.Errorf("privileges: start again without: %w", err)
}

// verifyPrivileges refuses to go on if any thread has, or can get, a privilege.
func verifyPrivileges(tasks string) error {
	files, err := filepath.Glob(filepath.Join(tasks, "*", "status"))
	if err != nil || len(files) == 0 {
		return errors.New("privileges: /proc cannot be read to make sure that there are none")
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // The thread has ended.
		}
		if err != nil {
			return fmt.Errorf("privileges: %w", err)
		}
		if err := verifyStatus(string(text)); err != nil {
			return fmt.Errorf("privileges: thread %s: %w", filepath.Base(filepath.Dir(f)), err)
		}
	}
	return nil
}

// verifyStatus reads one /proc/PID/status (proc_pid_status(5)).
func verifyStatus(text string) error {
	want := map[string]string{"CapInh": "", "CapPrm": "", "CapEff": "", "CapAmb": "", "NoNewPrivs": "1"}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		expected, ok := want[name]
		if !ok {
			continue
		}
		delete(want, name)
		if strings.TrimLeft(strings.TrimSpace(value), "0") != expected {
			return fmt.Errorf("%s is %s", name, strings.TrimSpace(value))
		}
	}
	if len(want) > 0 {
		return errors.New("the kernel does not say which capabilities it has")
	}
	return nil
}

// raiseFileLimit lets us have as many descriptors as we may.
func raiseFileLimit() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	return nil
}
