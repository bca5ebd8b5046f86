package podnet

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Inside runs f on a thread in the network namespace ns. The thread ends with f, and is never the first one, which
// /proc/self shows and which would be kept for ever. f must not start goroutines that make sockets.
func Inside(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	body := func() {
		if err := enter(ns); err != nil {
			done <- fmt.Errorf("enter namespace: %w", err)
			return
		}
		done <- f()
	}
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			body()
			return
		}
		next := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(next)
			body()
		}()
		<-next
		runtime.UnlockOSThread()
	}()
	return <-done
}

// enter takes the calling thread into ns.
func enter(ns *os.File) error {
	rc, err := ns.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = rc.Control(func(fd uintptr) { setErr = unix.Setns(int(fd), unix.CLONE_NEWNET) })
	return errors.Join(err, setErr)
}
