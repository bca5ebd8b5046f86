package lab

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// runInit is PID 1 of a lab. It starts supervise, buries the dead, and ends
// when supervise ends or the starter dies before it has let go; the kernel
// then kills whatever is left in the PID namespace.
func runInit(order string) int {
	lifeline := os.NewFile(lifelineFD, "lifeline")
	go func() {
		b := make([]byte, 1)
		if n, _ := lifeline.Read(b); n == 0 {
			os.Exit(1)
		}
	}()
	// Before anything is started, so that no child sees the caller's /proc.
	if err := ownMounts(); err != nil {
		fmt.Fprintf(os.NewFile(progressFD, "progress"), "{\"error\":%q}\n", err.Error())
		return 1
	}
	child, err := os.StartProcess("/proc/self/exe", []string{"ztun", "lab", "supervise", order}, &os.ProcAttr{
		Dir: "/",
		Env: []string{},
		// The lifeline stays here: 3 is closed in the child.
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr, nil, os.NewFile(progressFD, "progress"), os.NewFile(listenerFD, "socket")},
	})
	if err != nil {
		return 1
	}
	unix.Close(progressFD)
	unix.Close(listenerFD)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for s := range signals {
			child.Signal(s)
		}
	}()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid == child.Pid {
			return status.ExitStatus()
		}
	}
}

// runtimeMount is where the lab's files are: a tmpfs of its own, mounted over
// a directory that every machine has and that holds no programs.
const runtimeMount = "/dev/shm"

// ownMounts cuts the mount namespace off from the caller's, and mounts what
// belongs to the new namespaces.
func ownMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("lab: make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("lab: mount /proc (in a container it must not be masked): %w", err)
	}
	if err := unix.Mount("tmpfs", runtimeMount, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=256m"); err != nil {
		return fmt.Errorf("lab: mount %s: %w", runtimeMount, err)
	}
	return nil
}
