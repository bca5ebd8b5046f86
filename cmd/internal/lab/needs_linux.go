package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Need is something that the machine lacks and the command that mends it.
type Need struct {
	What    string
	Command string
}

// Error says both.
func (n Need) Error() string {
	return fmt.Sprintf("%s; mend it with: %s", n.What, n.Command)
}

// privileged says whether this process may make namespaces without a user
// namespace around them.
func privileged() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	need := uint32(1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN)
	return os.Geteuid() == 0 && data[0].Effective&need == need
}

// manyUsers says whether ordinary users exist in this user namespace.
func manyUsers() bool {
	text, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		var inside, outside, count int64
		if _, err := fmt.Sscan(line, &inside, &outside, &count); err == nil && inside <= proxyUser && proxyUser < inside+count {
			return true
		}
	}
	return false
}

// CheckMachine returns every Need that keeps a lab from running, joined.
func CheckMachine() error {
	var needs []error
	if err := checkTUN("/dev/net/tun"); err != nil {
		needs = append(needs, err)
	}
	if !privileged() {
		if err := checkUserNamespaces(); err != nil {
			needs = append(needs, err)
		}
	}
	if info, err := os.Stat(runtimeMount); err != nil || !info.IsDir() {
		needs = append(needs, Need{runtimeMount + " is not there; the lab mounts its files on it", "sudo mkdir -m 1777 " + runtimeMount})
	}
	return errors.Join(needs...)
}

func checkTUN(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrPermission):
		return Need{path + " is not open to ordinary users", "sudo chmod 0666 " + path}
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return Need{path + " has no driver", "sudo modprobe tun"}
	case errors.Is(err, fs.ErrNotExist):
		return Need{path + " is not there", "sudo sh -c 'modprobe tun; mkdir -p /dev/net && [ -e /dev/net/tun ] || mknod -m 0666 /dev/net/tun c 10 200'"}
	}
	return fmt.Errorf("lab: open %s: %w", path, err)
}

// checkUserNamespaces makes one, and names the switch that is off if it cannot.
func checkUserNamespaces() error {
	cmd := exec.Command("/proc/self/exe", "lab", "nothing")
	cmd.SysProcAttr = namespaces(false)
	err := cmd.Run()
	if err == nil {
		return nil
	}
	for _, s := range []struct{ file, off, set string }{
		{"/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=15000"},
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "kernel.apparmor_restrict_unprivileged_userns=0"},
	} {
		value, readErr := os.ReadFile(s.file)
		if readErr == nil && strings.TrimSpace(string(value)) == s.off {
			return Need{"user namespaces are closed to ordinary users", "sudo sysctl -w " + s.set}
		}
	}
	return Need{fmt.Sprintf("a user namespace cannot be made here (%v)", err), "run it as root, or outside of the container that forbids it"}
}

// namespaces are those of a lab: everything but user, and user too when the
// caller has no privileges, with the caller as its root.
func namespaces(privileged bool) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Setsid:     true,
	}
	if !privileged {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return attr
}
