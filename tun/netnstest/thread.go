package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// errGoexit is what a function on a thread of its own ended with when it called runtime.Goexit (t.FailNow).
var errGoexit = errors.New("netnstest: function left by runtime.Goexit")

// onThread runs f on a thread that no other goroutine will ever use: a goroutine that ends while locked takes its
// thread along. The first thread is never taken, because it would be kept, parked, in the namespace that f entered, and
// is what /proc/self shows. A panic of f is raised again in the caller.
func onThread(f func() error) error {
	type result struct {
		err      error
		panicked any
	}
	done := make(chan result, 1)
	body := func() {
		r := result{err: errGoexit}
		defer func() {
			if p := recover(); p != nil {
				r.panicked = p
			}
			done <- r
		}()
		r.err = f()
	}
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			body()
			return
		}
		// While this goroutine keeps the first thread, the next one gets another.
		next := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(next)
			body()
		}()
		<-next
		runtime.UnlockOSThread()
	}()
	r := <-done
	if r.panicked != nil {
		panic(r.panicked)
	}
	return r.err
}

// execName as argument 0 turns the test binary into: enter the namespace named by argument 1, execute the rest.
const execName = "ztun-netnstest-exec"

// The first thread runs init functions, and a process that executes keeps the namespaces of the calling thread.
func init() {
	if len(os.Args) < 3 || os.Args[0] != execName {
		return
	}
	fmt.Fprintln(os.Stderr, "netnstest:", enterAndExec(os.Args[1], os.Args[2:]))
	os.Exit(127)
}

func enterAndExec(ns string, args []string) error {
	if ns != "" {
		fd, err := unix.Open(ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open namespace: %w", err)
		}
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	return syscall.Exec(path, args, os.Environ())
}
