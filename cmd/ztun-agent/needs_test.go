package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun/netnstest"
)

func TestMissingCapabilitiesAreNamed(t *testing.T) {
	for _, tt := range []struct{ effective, want string }{
		{"000001ffffffffff", ""},
		{"0000000000281000", ""}, // SYS_ADMIN, SYS_PTRACE, NET_ADMIN.
		{"0000000000081000", "CAP_SYS_ADMIN (to enter"},
		{"0000000000280000", "CAP_NET_ADMIN (to make TUN"},
		{"0000000000201000", "CAP_SYS_PTRACE (to see"},
		{"0000000000000000", "CAP_SYS_ADMIN"},
		{"nonsense", "capabilities"},
	} {
		status := filepath.Join(t.TempDir(), "status")
		if err := os.WriteFile(status, []byte("Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t"+tt.effective+"\nSeccomp:\t0\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := checkCapabilities(status)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("CapEff %s: %v, want %q", tt.effective, err, tt.want)
		}
	}
}

func TestWhoDeniesTUN(t *testing.T) {
	for errno, want := range map[unix.Errno]string{
		unix.ENOENT: "hostPath volume of type CharDevice", unix.EPERM: "runc 1.2.0 to 1.2.3", unix.EACCES: "SELinux",
		unix.ENXIO: "load the module tun", unix.ENODEV: "load the module tun", unix.EMFILE: "/dev/net/tun",
	} {
		err := explainTUN("/dev/net/tun", errno)
		if !errors.Is(err, errno) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", errno, err, want)
		}
	}
	if err := checkTUN(filepath.Join(t.TempDir(), "tun")); err == nil || !strings.Contains(err.Error(), "not in the container") {
		t.Errorf("no node: %v", err)
	}
}

func TestHostsProc(t *testing.T) {
	if _, err := openHost(t.TempDir(), "/proc/self/ns/net"); err == nil || !strings.Contains(err.Error(), "is not mounted at") {
		t.Errorf("an empty folder: %v", err)
	}
}

// TestHostsNamespace is the one that is named.
func TestHostsNamespace(t *testing.T) {
	ns, proc := netnstest.New(t, "host"), t.TempDir()
	if err := os.Mkdir(filepath.Join(proc, "1"), 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := openHost(proc, ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want, err := ns.File().Stat()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := f.Stat(); err != nil || !os.SameFile(got, want) {
		t.Errorf("another namespace was opened: %v", err)
	}
	if _, err := openHost(proc, "/nowhere"); err == nil || !strings.Contains(err.Error(), "network namespace: open /nowhere") {
		t.Errorf("no namespace: %v", err)
	}
}

func TestNodeAddresses(t *testing.T) {
	ns := netnstest.New(t, "host")
	ns.Bridge("cni0")
	ns.Addr("cni0", "10.9.0.2/24", "10.9.0.1/24", "fd09::1/64", "169.254.1.1/32")
	ns.Up("cni0")
	ns.Bridge("kube-ipvs0")
	ns.Addr("kube-ipvs0", "10.96.0.1/32")
	ns.Up("kube-ipvs0")
	ns.Bridge("down")
	ns.Addr("down", "10.9.1.1/24")
	ns.Down("down")
	got, err := nodeAddresses(ns.File())
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, a := range got {
		all = append(all, a.String())
	}
	if s := strings.Join(all, " "); s != "10.9.0.1 10.9.0.2 fd09::1" {
		t.Errorf("addresses = %s", s)
	}
}
