package netnstest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NS is a network namespace of a test. It ends with the test.
type NS struct {
	t    testing.TB
	name string
	file *os.File
	link *netlink.Handle
}

// New makes a network namespace with loopback up and without duplicate address detection. name is only for messages.
func New(t testing.TB, name string) *NS {
	t.Helper()
	Require(t)
	ns := &NS{t: t, name: name}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		var err error
		if ns.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		ns.link, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		t.Fatalf("netnstest: make namespace %s: %v", name, err)
	}
	t.Cleanup(func() {
		ns.link.Close()
		_ = ns.file.Close()
	})
	ns.Up("lo")
	for _, s := range []string{"accept_dad", "dad_transmits"} {
		if p := "net/ipv6/conf/default/" + s; ns.HasSysctl(p) {
			ns.SetSysctl(p, "0")
		}
	}
	return ns
}

// Require skips the test, or fails it in CI, where kernel tests cannot run.
func Require(t testing.TB) {
	t.Helper()
	if unavailable != nil {
		skip(t, unavailable)
	}
}

func skip(t testing.TB, why *Unavailable) {
	t.Helper()
	if os.Getenv(envCI) == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// Name is the name given to New.
func (ns *NS) Name() string { return ns.name }

// File is the namespace as a file, as setns takes it. It is closed at the end of the test.
func (ns *NS) File() *os.File { return ns.file }

// Path names the namespace to any process of the same user while the test runs.
func (ns *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.file.Fd()) }

// Netlink is an rtnetlink handle in the namespace.
func (ns *NS) Netlink() *netlink.Handle { return ns.link }

// Do runs f on a thread inside the namespace. Sockets that f makes stay in it. f may call t.Fatal. Goroutines that f
// starts run elsewhere.
func (ns *NS) Do(f func()) {
	ns.t.Helper()
	err := onThread(func() error {
		if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		f()
		return nil
	})
	if errors.Is(err, errGoexit) {
		if ns.t.Skipped() && !ns.t.Failed() {
			ns.t.SkipNow()
		}
		ns.t.FailNow()
	}
	if err != nil {
		ns.t.Fatalf("netnstest: enter namespace %s: %v", ns.name, err)
	}
}

// Command is exec.Command for a program inside the namespace.
func (ns *NS) Command(name string, args ...string) *exec.Cmd {
	return ns.wrap(exec.Command("/proc/self/exe"), name, args)
}

// CommandContext is exec.CommandContext for a program inside the namespace.
func (ns *NS) CommandContext(ctx context.Context, name string, args ...string) *exec.Cmd {
	return ns.wrap(exec.CommandContext(ctx, "/proc/self/exe"), name, args)
}

func (ns *NS) wrap(cmd *exec.Cmd, name string, args []string) *exec.Cmd {
	cmd.Args = append([]string{execName, ns.Path(), name}, args...)
	return cmd
}

// packages name what to install for programs that tests run.
var packages = map[string]string{"ip": "iproute2"}

// Run runs a program inside the namespace to its end and returns what it printed; the test fails if it fails. Without
// the program it is skipped, as without namespaces.
func (ns *NS) Run(name string, args ...string) string {
	ns.t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		pkg := packages[name]
		if pkg == "" {
			pkg = name
		}
		skip(ns.t, &Unavailable{Reason: "there is no program " + name, Mend: "sudo apt-get install -y " + pkg})
	}
	out, err := ns.Command(name, args...).CombinedOutput()
	if err != nil {
		ns.t.Fatalf("netnstest: in %s: %s %s: %v\n%s", ns.name, name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Dial is net.DialTimeout from inside the namespace. address must be literal.
func (ns *NS) Dial(network, address string, timeout time.Duration) (c net.Conn, err error) {
	ns.Do(func() { c, err = net.DialTimeout(network, address, timeout) })
	return c, err
}

// Listen is net.Listen inside the namespace, closed at the end of the test. address must be literal.
func (ns *NS) Listen(network, address string) net.Listener {
	ns.t.Helper()
	var l net.Listener
	var err error
	ns.Do(func() { l, err = net.Listen(network, address) })
	if err != nil {
		ns.t.Fatalf("netnstest: in %s: %v", ns.name, err)
	}
	ns.t.Cleanup(func() { _ = l.Close() })
	return l
}

// ListenPacket is net.ListenPacket inside the namespace, closed at the end of the test. address must be literal.
func (ns *NS) ListenPacket(network, address string) net.PacketConn {
	ns.t.Helper()
	var c net.PacketConn
	var err error
	ns.Do(func() { c, err = net.ListenPacket(network, address) })
	if err != nil {
		ns.t.Fatalf("netnstest: in %s: %v", ns.name, err)
	}
	ns.t.Cleanup(func() { _ = c.Close() })
	return c
}

// HasSysctl tells whether the namespace has /proc/sys/path.
func (ns *NS) HasSysctl(path string) (ok bool) {
	ns.Do(func() { _, err := os.Stat("/proc/sys/" + path); ok = err == nil })
	return ok
}

// Sysctl reads /proc/sys/path in the namespace, without the newline.
func (ns *NS) Sysctl(path string) (value string) {
	ns.t.Helper()
	ns.Do(func() {
		b, err := os.ReadFile("/proc/sys/" + path)
		if err != nil {
			ns.t.Fatalf("netnstest: in %s: %v", ns.name, err)
		}
		value = strings.TrimSpace(string(b))
	})
	return value
}

// SetSysctl writes /proc/sys/path in the namespace.
func (ns *NS) SetSysctl(path, value string) {
	ns.t.Helper()
	ns.Do(func() {
		if err := os.WriteFile("/proc/sys/"+path, []byte(value), 0o644); err != nil {
			ns.t.Fatalf("netnstest: in %s: %v", ns.name, err)
		}
	})
}
