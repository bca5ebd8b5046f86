package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// podRules are what istio-cni installs in a pod, as far as TCP needs it: the
// proxy finds what the pod sends at port 15001, plain text for the pod at
// 15006, HBONE at 15008. Its own sockets are marked 0x539; what answers them
// is marked 0x111 and finds its way back to lo, whatever address they are
// bound to.
const podRules = `*mangle
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
`

// podRoutes are iproute2's words for the way of 0x111.
var podRoutes = [][]string{
	{"route", "replace", "local", "0.0.0.0/0", "dev", "lo", "table", "100"},
	{"rule", "add", "priority", "32764", "fwmark", "0x111/0xfff", "lookup", "100"},
}

// redirectPod installs them in a network namespace, named by its path. It may
// be done again. IPv4 is what the bench measures.
func redirectPod(netns string) error {
	restore, err := findTool("iptables-restore", "iptables")
	if err != nil {
		return err
	}
	ip, err := findTool("ip", "iproute2")
	if err != nil {
		return err
	}
	return inNetns(netns, func() error {
		cmd := exec.Command(restore)
		cmd.Stdin = strings.NewReader(podRules)
		// The customary place may not be ours to write.
		cmd.Env = append(cmd.Environ(), "XTABLES_LOCKFILE=/dev/shm/xtables.lock")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("bench: iptables-restore: %w: %s", err, strings.TrimSpace(string(out)))
		}
		for _, words := range podRoutes {
			out, err := exec.Command(ip, words...).CombinedOutput()
			if err != nil && !strings.Contains(string(out), "File exists") {
				return fmt.Errorf("bench: ip %s: %w: %s", strings.Join(words, " "), err, strings.TrimSpace(string(out)))
			}
		}
		return nil
	})
}

// findTool finds a program that not everybody has in the PATH.
func findTool(name, debian string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(dir + "/" + name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not there; sudo apt-get install %s (Debian's package)", name, debian)
}

// inNetns runs f on a thread in the network namespace of that path. What f
// starts is in there too.
func inNetns(path string, f func() error) error {
	netns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	defer netns.Close()
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- errors.Join(fmt.Errorf("bench: enter %s", path), err)
			return
		}
		done <- f()
	}()
	return <-done
}
