package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ztun/ztun/tun/netnstest"
)

// childArg makes the test program be what the next argument says.
const childArg = "@child"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == childArg {
		switch os.Args[2] {
		case "privileges":
			os.Exit(privilegesChild())
		case "proxy":
			os.Exit(command(os.Args[3:]))
		}
		os.Exit(2)
	}
	netnstest.Main(m)
}

// privilegesChild drops everything, on many threads, and prints what the
// kernel says of each.
func privilegesChild() int {
	release, started := make(chan struct{}), make(chan struct{})
	for range 8 { // Threads that were there before.
		go func() {
			started <- struct{}{}
			var buf [1]byte
			r, w, _ := os.Pipe()
			go func() { <-release; _ = w.Close() }()
			rc, _ := r.SyscallConn()
			_ = rc.Control(func(fd uintptr) { _, _ = syscall.Read(int(fd), buf[:]) })
		}()
		<-started
	}
	if err := dropPrivileges(); err != nil {
		fmt.Println(err)
		return 1
	}
	files, _ := filepath.Glob("/proc/self/task/*/status")
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for _, l := range strings.Split(string(text), "\n") {
			if strings.HasPrefix(l, "Cap") || strings.HasPrefix(l, "NoNewPrivs") {
				fmt.Println(l)
			}
		}
	}
	var l syscall.Rlimit
	_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l)
	fmt.Println("files at most:", l.Cur == l.Max)
	if err := syscall.Sethostname([]byte("x")); !errors.Is(err, syscall.EPERM) {
		fmt.Println("the host name could be changed:", err)
		return 1
	}
	return 0
}

func child(t *testing.T, what string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", append([]string{childArg, what}, args...)...)
	cmd.Env = []string{}
	return cmd
}

func TestPrivilegesAreGone(t *testing.T) {
	attrs := map[string]*syscall.SysProcAttr{"as we are": nil}
	if os.Getuid() == 0 {
		// In an ordinary user's namespace there is but one user, and "as we are"
		// is the ordinary one.
		if m, err := os.ReadFile("/proc/self/uid_map"); err == nil && strings.HasSuffix(strings.TrimSpace(string(m)), " 4294967295") {
			attrs["ordinary user"] = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		attrs["with ambient capabilities"] = &syscall.SysProcAttr{AmbientCaps: []uintptr{12}}
	}
	for name, attr := range attrs {
		t.Run(name, func(t *testing.T) {
			cmd := child(t, "privileges")
			cmd.SysProcAttr = attr
			if attr != nil && attr.Credential != nil {
				// The test program lies where only root may go.
				self, err := os.Open("/proc/self/exe")
				if err != nil {
					t.Fatal(err)
				}
				defer self.Close()
				cmd.ExtraFiles = []*os.File{self}
				cmd.Path = "/proc/self/fd/3"
			}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			threads := 0
			for _, l := range strings.Split(strings.TrimSpace(string(out)), "\n") {
				name, value, _ := strings.Cut(l, ":")
				value = strings.TrimSpace(value)
				switch {
				case name == "CapBnd": // Only a privileged process can empty it.
				case name == "NoNewPrivs":
					threads++
					if value != "1" {
						t.Error(l)
					}
				case strings.HasPrefix(name, "Cap") && strings.Trim(value, "0") != "":
					t.Error(l)
				case name == "files at most" && value != "true":
					t.Error(l)
				}
			}
			if threads < 3 {
				t.Errorf("only %d threads were looked at:\n%s", threads, out)
			}
		})
	}
}

func TestVerifyStatus(t *testing.T) {
	const good = "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n" +
		"CapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n"
	if err := verifyStatus(good); err != nil {
		t.Errorf("a clean thread: %v", err)
	}
	for _, bad := range []string{
		"", strings.Replace(good, "CapEff:\t0000000000000000\n", "", 1),
		strings.Replace(good, "CapEff:\t0000000000000000", "CapEff:\t0000000000001000", 1),
		strings.Replace(good, "CapPrm:\t0000000000000000", "CapPrm:\t0000000000001000", 1),
		strings.Replace(good, "CapAmb:\t0000000000000000", "CapAmb:\t1000000000000000", 1),
		strings.Replace(good, "NoNewPrivs:\t1", "NoNewPrivs:\t0", 1),
	} {
		if err := verifyStatus(bad); err == nil {
			t.Errorf("accepted:\n%s", bad)
		}
	}
	if err := verifyPrivileges(t.TempDir()); err == nil {
		t.Error("a /proc without threads was accepted")
	}
}

func TestCommand(t *testing.T) {
	for _, tt := range []struct {
		args           []string
		env            []string
		code           int
		stdout, stderr string
	}{
		{args: []string{"version"}, stdout: "ztun-proxy "},
		{args: []string{"help"}, stdout: "usage: "},
		{args: []string{"what"}, code: 1, stderr: "usage: "},
		{args: []string{"proxy", "ztunnel"}, env: []string{"PROXY_MODE=dedicated", "SECRET_TTL=soon"}, code: 1,
			stderr: "ztun-proxy: config: SECRET_TTL"},
		{env: []string{"XDS_ADDRESS="}, code: 1, stderr: "ztun-proxy: config: XDS_ADDRESS"},
		{env: []string{"XDS_ROOT_CA=SYSTEM", "RUST_LOG=loud"}, code: 1, stderr: "ztun-proxy: config: RUST_LOG"},
	} {
		cmd := child(t, "proxy", tt.args...)
		cmd.Env = append(cmd.Env, tt.env...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != tt.code ||
			!strings.HasPrefix(stdout.String(), tt.stdout) || !strings.HasPrefix(stderr.String(), tt.stderr) {
			t.Errorf("%q %q = %d, %q, %q; want %d, %q, %q", tt.args, tt.env, code, stdout.String(), stderr.String(),
				tt.code, tt.stdout, tt.stderr)
		}
		if tt.code != 0 && tt.stderr != "usage: " && strings.Count(stderr.String(), "\n") != 1 {
			t.Errorf("%q: not one line: %q", tt.env, stderr.String())
		}
	}
}

func TestOneLine(t *testing.T) {
	err := errors.Join(errors.New("a"), errors.Join(errors.New("b"), errors.New("c\nd")))
	if got := oneLine(err); got != "a; b; c; d" {
		t.Errorf("oneLine = %q", got)
	}
}

// TestImports keeps what only a privileged process needs out of this program.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Skipf("go list: %v", err)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, "github.com/ztun/ztun/netstack") {
		t.Fatalf("go list names no netstack among %d packages", len(deps))
	}
	for _, d := range deps {
		for _, banned := range []string{
			"k8s.io/", "sigs.k8s.io/", "github.com/vishvananda/", "github.com/spf13/cobra", "istio.io/istio",
			"github.com/ztun/ztun/tun/podnet", "github.com/ztun/ztun/xds/control", "github.com/ztun/ztun/cmd/internal/agent",
		} {
			if strings.HasPrefix(d, banned) {
				t.Errorf("ztun-proxy imports %s", d)
			}
		}
	}
}
