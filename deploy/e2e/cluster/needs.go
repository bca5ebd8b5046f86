package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// programs the machine must have, and where each is from.
var programs = map[string]string{
	"apt-get":   "Debian or Ubuntu: containerd, runc and the CNI plugins are their packages, unpacked, not installed",
	"dpkg":      "the same",
	"go":        "golang, or https://go.dev/dl",
	"nft":       "nftables",
	"iptables":  "iptables",
	"ip6tables": "iptables",
	"nice":      "coreutils",
}

// Needs says everything that the machine lacks, in one error.
func Needs() error {
	var errs []error
	if os.Getuid() != 0 {
		errs = append(errs, errors.New("root: namespaces, mounts and cgroups of nodes; run `sudo make e2e`"))
	}
	path := os.Getenv("PATH")
	for name, from := range programs {
		if _, err := exec.LookPath(name); err != nil {
			errs = append(errs, fmt.Errorf("%s (%s), not in PATH=%s", name, from, path))
		}
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		errs = append(errs, fmt.Errorf("the kernel's TUN driver: %w", err))
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		errs = append(errs, fmt.Errorf("IPv6 in the kernel: %w", err))
	}
	systems, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		errs = append(errs, err)
	}
	if !strings.Contains(string(systems), "\toverlay\n") {
		errs = append(errs, errors.New("overlayfs in the kernel: modprobe overlay"))
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("this machine lacks:\n%w", errors.Join(errs...))
}
