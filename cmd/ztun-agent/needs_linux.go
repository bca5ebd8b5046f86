package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/config"
)

// needed are the capabilities without which nothing works, and what for.
// CAP_NET_RAW, for truthful ICMP errors, is not among them.
var needed = []struct {
	bit       int
	name, why string
}{
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "to enter the network namespaces of pods and of the host"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "to make TUN devices, rules and routes in pods"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "to see in which namespaces the processes of the host are"},
}

// needs says everything that this container lacks. host is the host's network
// namespace, which is the caller's.
func needs(cfg *config.Agent, tun string) (host *os.File, err error) {
	var errs []error
	errs = append(errs, checkCapabilities("/proc/self/status"))
	host, err = openHost(cfg.Host.Path("/proc"), cfg.Host.Netns)
	errs = append(errs, err, checkTUN(tun))
	if err := errors.Join(errs...); err != nil {
		if host != nil {
			_ = host.Close()
		}
		return nil, err
	}
	return host, nil
}

// checkCapabilities reads the effective set from a status file of /proc.
func checkCapabilities(status string) error {
	text, err := os.ReadFile(status)
	if err != nil {
		return fmt.Errorf("needs: capabilities: %w", err)
	}
	var effective uint64
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			if _, err := fmt.Sscanf(v, "%x", &effective); err != nil {
				return fmt.Errorf("needs: capabilities: %q: %w", line, err)
			}
		}
	}
	var missing []string
	for _, c := range needed {
		if effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name+" ("+c.why+")")
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("needs: the container lacks %s", strings.Join(missing, ", "))
	}
	return nil
}

// openHost opens the network namespace of the host, whose processes proc shows.
func openHost(proc, netns string) (*os.File, error) {
	if _, err := os.Stat(proc + "/1"); err != nil {
		return nil, fmt.Errorf("needs: the host's /proc is not mounted at %s (hostPath volume; ZTUN_HOST_DIR says where): %w", proc, err)
	}
	f, err := os.Open(netns)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("needs: the host's first process is hidden: CAP_SYS_PTRACE is missing, or AppArmor or SELinux forbids it: %w", err)
	case err != nil:
		return nil, fmt.Errorf("needs: the host's network namespace: %w", err)
	}
	// The container's own /proc shows us as process 1.
	theirs, err := os.Readlink(proc + "/1/ns/pid")
	ours, e := os.Readlink("/proc/self/ns/pid")
	if err == nil && e == nil && theirs == ours && os.Getpid() == 1 {
		_ = f.Close()
		return nil, fmt.Errorf("needs: %s shows this container's processes, not the host's", proc)
	}
	return f, nil
}

// checkTUN opens the node that TUN devices are made by, and says who refused.
func checkTUN(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		return unix.Close(fd)
	}
	return explainTUN(path, err)
}

func explainTUN(path string, err error) error {
	why := ""
	switch {
	case errors.Is(err, unix.ENOENT):
		why = "it is not in the container: mount it as a hostPath volume of type CharDevice; if the node has none, load the kernel's module tun"
	case errors.Is(err, unix.EPERM):
		why = "the runtime's device rules deny it: runc 1.2.0 to 1.2.3, and crun from 2022 until 2025-01, leave character device 10:200 out of what containers may open; " +
			"update the runtime, or set the chart's cni.privileged"
	case errors.Is(err, unix.EACCES):
		why = "its file mode, AppArmor or SELinux denies it: the chart's cni.seLinuxOptions.type is spc_t where SELinux enforces"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		why = "the kernel has no TUN devices: load the module tun on the node"
	}
	if why == "" {
		return fmt.Errorf("needs: %s: %w", path, err)
	}
	return fmt.Errorf("needs: %s: %w: %s", path, err, why)
}

// maxNodeAddresses is how many the proxies are told of.
const maxNodeAddresses = 64

// nodeAddresses are those of the host's interfaces. Probes come from whichever
// the host's routes choose for a pod: a bridge's, a tunnel's or the node's
// own. What the Node object names is often not among them. They say only which
// connections are worth a question: who owns the socket decides.
func nodeAddresses(host *os.File) ([]netip.Addr, error) {
	var all []net.Interface
	addrs := map[string][]net.Addr{}
	err := inside(host, func() (err error) {
		if all, err = net.Interfaces(); err != nil {
			return err
		}
		for _, i := range all {
			if addrs[i.Name], err = i.Addrs(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("node: the host's addresses: %w", err)
	}
	var out []netip.Addr
	for _, i := range all {
		// IPVS gives every Service's address to an interface that nothing leaves by.
		if i.Flags&net.FlagUp == 0 || i.Name == "kube-ipvs0" {
			continue
		}
		for _, a := range addrs[i.Name] {
			if n, ok := a.(*net.IPNet); ok {
				if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap().IsGlobalUnicast() {
					out = append(out, ip.Unmap())
				}
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	out = slices.Compact(out)
	return out[:min(len(out), maxNodeAddresses)], nil
}

// inside runs f on a thread in the namespace. A thread that cannot come back
// ends.
func inside(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			back, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			defer back.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the network namespace: %w", err)
			}
			err = f()
			if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			return err
		}()
	}()
	return <-done
}
