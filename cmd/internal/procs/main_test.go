package procs

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainLeaks(m) }

const (
	uidA = "0a1b2c3d-0000-4000-8000-00000000000a"
	uidB = "0a1b2c3d-0000-4000-8000-00000000000b"
)

var (
	idA = strings.Repeat("a", 64)
	idB = strings.Repeat("b", 64)
)

// A table is a /proc of processes that are not, in namespaces that are.
type table struct {
	t   *testing.T
	dir string
}

// newTable makes one whose host is in a namespace of its own.
func newTable(t *testing.T) *table {
	t.Helper()
	p := &table{t: t, dir: t.TempDir()}
	p.add(1, "systemd", 1, "0::/init.scope\n", netnstest.New(t, "host"))
	return p
}

// add puts a process into the table.
func (p *table) add(pid int, name string, started uint64, cgroups string, ns *netnstest.NS) {
	p.t.Helper()
	dir := filepath.Join(p.dir, fmt.Sprint(pid))
	p.must(os.MkdirAll(filepath.Join(dir, "ns"), 0o700))
	p.must(os.MkdirAll(filepath.Join(dir, "fd"), 0o700))
	p.must(os.Symlink(ns.Path(), filepath.Join(dir, "ns/net")))
	p.write(pid, "cgroup", cgroups)
	p.write(pid, "stat", statLine(pid, name, started))
}

func (p *table) write(pid int, name, text string) {
	p.t.Helper()
	p.must(os.WriteFile(filepath.Join(p.dir, fmt.Sprint(pid), name), []byte(text), 0o600))
}

func (p *table) remove(pid int) {
	p.t.Helper()
	p.must(os.RemoveAll(filepath.Join(p.dir, fmt.Sprint(pid))))
}

func (p *table) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func statLine(pid int, name string, started uint64) string {
	return fmt.Sprintf("%d (%s) S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %d 1000 10 18446744073709551615\n", pid, name, started)
}

// podNS makes a namespace with an interface that has addresses.
func podNS(t *testing.T, name string, cidrs ...string) *netnstest.NS {
	t.Helper()
	ns := netnstest.New(t, name)
	netnstest.Veth(t, ns, "eth0", ns, "peer")
	ns.Addr("eth0", cidrs...)
	return ns
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// cgroupOf is what a container of a pod is in, as the cgroupfs driver makes it.
func cgroupOf(uid, container string) string {
	return "0::/kubepods/burstable/pod" + uid + "/" + container + "\n"
}

func identityOf(t *testing.T, f *os.File) nsID {
	t.Helper()
	id, err := identify(f)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// running starts a program called name that does nothing, in a namespace, and ends
// with the test. files are its descriptors from 3 on.
func running(t *testing.T, ns *netnstest.NS, name string, files ...*os.File) *exec.Cmd {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(sleep, path); err != nil {
		t.Fatal(err)
	}
	cmd := ns.Command(path, "600")
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(cmd) })
	netnstest.Eventually(t, name+" runs", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		if err != nil {
			return false
		}
		st, err := parseStat(b)
		return err == nil && st.name == name
	})
	return cmd
}

// end ends a program; it may be called twice.
func end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// enterCgroup puts a process into a cgroup that ends with the test.
func enterCgroup(t *testing.T, pid int, path string) {
	t.Helper()
	root := ""
	for _, r := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if f, err := os.OpenFile(r+"/cgroup.procs", os.O_WRONLY, 0); err == nil {
			_ = f.Close()
			root = r
			break
		}
	}
	if root == "" {
		u := &netnstest.Unavailable{Reason: "no hierarchy of cgroups may be written", Mend: "sudo mount -o remount,rw /sys/fs/cgroup"}
		if os.Getuid() == 0 && os.Getenv("CI") == "true" && os.Getenv("ZTUN_NETNSTEST_CHILD") == "" {
			t.Fatal(u)
		}
		t.Skip(u)
	}
	dir := root
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		dir += "/" + part
		if err := os.Mkdir(dir, 0o755); err == nil {
			t.Cleanup(func() {
				netnstest.Eventually(t, "cgroup is empty", func() bool { return os.Remove(dir) == nil || os.IsNotExist(os.Remove(dir)) })
			})
		} else if !os.IsExist(err) {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/cgroup.procs", fmt.Append(nil, pid), 0); err != nil {
		t.Fatal(err)
	}
}
