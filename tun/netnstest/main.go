// Package netnstest runs tests against the real kernel, in network namespaces that the test makes.
//
// A package of kernel tests has
//
//	func TestMain(m *testing.M) { netnstest.Main(m) }
//
// and its tests ask for namespaces with [New]. As root they run as they are; an ordinary user's are started again
// in a user, network and mount namespace of their own, in which they hold CAP_NET_ADMIN. Where neither works, tests that
// ask for a namespace are skipped with an [Unavailable] that names the command which mends it; with CI=true in the
// environment they fail instead. Tests that ask for none run anyway.
//
// Nothing is done to the namespaces of the host, and nothing is left in /run/netns: a namespace lives as long as
// a file descriptor of the test. A thread that entered one never runs another goroutine.
package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// Unavailable says why kernel tests cannot run here.
type Unavailable struct {
	Reason string
	// Mend is the one command that makes them run.
	Mend string
}

func (u *Unavailable) Error() string {
	return fmt.Sprintf("netnstest: %s; to mend it: %s", u.Reason, u.Mend)
}

// unavailable is set by Main before tests run, read-only after.
var unavailable *Unavailable

const (
	envChild = "ZTUN_NETNSTEST_CHILD"
	envCI    = "CI"
)

// MainLeaks is Main, and fails a run that passes and leaves goroutines behind.
func MainLeaks(m interface{ Run() int }) { Main(leakChecked{m}) }

type leakChecked struct{ m interface{ Run() int } }

func (l leakChecked) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// Main runs the tests of a package and exits, like os.Exit(m.Run()). m is a *testing.M, or a wrapper that checks
// something around its Run.
func Main(m interface{ Run() int }) {
	if os.Getuid() != 0 && os.Getenv(envChild) == "" {
		if unavailable = rootless(); unavailable == nil {
			os.Exit(again())
		}
	} else {
		unavailable = probe()
	}
	os.Exit(m.Run())
}

// again runs this test binary in namespaces of its own and returns its exit code.
func again() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envChild+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = namespaces()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "netnstest: start the tests again in a user namespace:", err)
		return 1
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() >= 0 {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "netnstest: tests in the user namespace:", err)
		return 1
	}
	return 0
}

func namespaces() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
}

// rootless reports what keeps an ordinary user from running kernel tests.
func rootless() *Unavailable {
	if u := tunNode(); u != nil {
		return u
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{execName, "", "true"}
	cmd.SysProcAttr = namespaces()
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if b, e := os.ReadFile("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"); e == nil && len(b) > 0 && b[0] == '1' {
		return &Unavailable{"AppArmor forbids user namespaces to ordinary users", "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"}
	}
	if b, e := os.ReadFile("/proc/sys/kernel/unprivileged_userns_clone"); e == nil && len(b) > 0 && b[0] == '0' {
		return &Unavailable{"this kernel forbids user namespaces to ordinary users", "sudo sysctl kernel.unprivileged_userns_clone=1"}
	}
	return &Unavailable{fmt.Sprintf("no user namespace for an ordinary user (%v)", err), "sudo sysctl user.max_user_namespaces=10000"}
}

// probe reports what keeps the superuser of this user namespace from running kernel tests.
func probe() *Unavailable {
	if u := tunNode(); u != nil {
		return u
	}
	err := onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	if err != nil {
		return &Unavailable{fmt.Sprintf("no network namespace can be made (%v)", err), "run the tests with CAP_SYS_ADMIN and CAP_NET_ADMIN (docker run --privileged)"}
	}
	return nil
}

func tunNode() *Unavailable {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	switch {
	case err == nil:
		_ = f.Close()
		return nil
	case errors.Is(err, os.ErrPermission):
		return &Unavailable{"/dev/net/tun is not open to this user", "sudo chmod 0666 /dev/net/tun"}
	case errors.Is(err, os.ErrNotExist):
		return &Unavailable{"/dev/net/tun does not exist", "sudo mkdir -p /dev/net && sudo mknod -m 0666 /dev/net/tun c 10 200"}
	default:
		return &Unavailable{fmt.Sprintf("/dev/net/tun: %v", err), "sudo modprobe tun"}
	}
}
