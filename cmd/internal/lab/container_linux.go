package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// A containerOrder is what `ztun lab container` makes of itself before it
// becomes the container's command. It finds itself in the pod's network
// namespace and in mount, PID and UTS namespaces of its own.
type containerOrder struct {
	Hostname string   `json:"hostname"`
	Hosts    string   `json:"hosts"`  // Becomes /etc/hosts.
	Resolv   string   `json:"resolv"` // Becomes /etc/resolv.conf.
	Dir      string   `json:"dir"`
	Argv     []string `json:"argv"`
	Env      []string `json:"env"`
	UID      int      `json:"uid"`
	GID      int      `json:"gid"`
	Caps     []uint   `json:"caps"` // What is left of the capabilities.
	// OwnPIDs says that it has a PID namespace of its own. A command run in
	// a pod has not: PID 1 ignores the signals that it does not handle.
	OwnPIDs bool `json:"ownPIDs"`
}

// defaultPath is the PATH of containers, behind the directory of ztun.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// defaultCaps is what Kubernetes' runtimes leave a container by default, less
// raw sockets and device nodes.
var defaultCaps = map[string]uint{
	"CHOWN": unix.CAP_CHOWN, "DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "FSETID": unix.CAP_FSETID,
	"FOWNER": unix.CAP_FOWNER, "SETGID": unix.CAP_SETGID, "SETUID": unix.CAP_SETUID,
	"SETPCAP": unix.CAP_SETPCAP, "NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
	"SYS_CHROOT": unix.CAP_SYS_CHROOT, "KILL": unix.CAP_KILL,
}

// extraCaps may be added by a pod's securityContext.
var extraCaps = map[string]uint{
	"NET_RAW": unix.CAP_NET_RAW, "NET_ADMIN": unix.CAP_NET_ADMIN, "SYS_ADMIN": unix.CAP_SYS_ADMIN, "SYS_PTRACE": unix.CAP_SYS_PTRACE,
}

// runContainer does not return unless something is wrong.
func runContainer(text string) error {
	// Capabilities belong to a thread: the one that becomes the command.
	runtime.LockOSThread()
	var o containerOrder
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return fmt.Errorf("lab: container: %w", err)
	}
	if len(o.Argv) == 0 {
		return errors.New("lab: container: no command")
	}
	if err := o.mounts(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(o.Hostname)); err != nil {
		return fmt.Errorf("lab: container: set host name: %w", err)
	}
	if o.Dir != "" {
		if err := os.Chdir(o.Dir); err != nil {
			return fmt.Errorf("lab: container: workingDir: %w", err)
		}
	}
	path, err := lookPath(o.Argv[0], o.Env)
	if err != nil {
		return err
	}
	if err := o.dropPrivileges(); err != nil {
		return err
	}
	return fmt.Errorf("lab: container: run %s: %w", path, unix.Exec(path, o.Argv, o.Env))
}

// mounts puts the pod's files in place and the lab's out of sight.
func (o *containerOrder) mounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("lab: container: make mounts private: %w", err)
	}
	for _, m := range []struct{ source, target string }{{o.Hosts, "/etc/hosts"}, {o.Resolv, "/etc/resolv.conf"}} {
		target, err := filepath.EvalSymlinks(m.target)
		if errors.Is(err, os.ErrNotExist) {
			continue // Nothing to put it over; names cannot be resolved then.
		}
		if err != nil {
			return fmt.Errorf("lab: container: %w", err)
		}
		if err := unix.Mount(m.source, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("lab: container: mount %s: %w", target, err)
		}
	}
	if err := unix.Unmount(runtimeMount, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("lab: container: hide %s: %w", runtimeMount, err)
	}
	if err := unix.Mount("tmpfs", runtimeMount, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777,size=64m"); err != nil {
		return fmt.Errorf("lab: container: mount %s: %w", runtimeMount, err)
	}
	if !o.OwnPIDs {
		return nil
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("lab: container: mount /proc: %w", err)
	}
	return nil
}

// dropPrivileges leaves the order's user and capabilities. Root keeps what is
// in the bounding set; other users keep nothing.
func (o *containerOrder) dropPrivileges() error {
	keep := map[uint]bool{}
	for _, c := range o.Caps {
		keep[c] = true
	}
	for c := uint(0); c <= unix.CAP_LAST_CAP; c++ {
		if keep[c] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("lab: container: drop capability %d: %w", c, err)
		}
	}
	if o.UID == 0 && o.GID == 0 {
		return nil
	}
	if err := unix.Setgroups(nil); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("lab: container: drop groups: %w", err)
	}
	if err := unix.Setresgid(o.GID, o.GID, o.GID); err != nil {
		return fmt.Errorf("lab: container: runAsGroup %d: %w", o.GID, err)
	}
	if err := unix.Setresuid(o.UID, o.UID, o.UID); err != nil {
		return fmt.Errorf("lab: container: runAsUser %d: %w", o.UID, err)
	}
	return nil
}

// lookPath finds a command as execvp does with the PATH of env. The lab's own
// program is there under the name ztun.
func lookPath(command string, env []string) (string, error) {
	if strings.Contains(command, "/") {
		return command, nil
	}
	if command == "ztun" {
		return "/proc/self/exe", nil
	}
	for _, kv := range env {
		path, ok := strings.CutPrefix(kv, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(path) {
			file := filepath.Join(dir, command)
			if info, err := os.Stat(file); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
				return file, nil
			}
		}
	}
	return "", fmt.Errorf("lab: container: %w: %s", exec.ErrNotFound, command)
}
