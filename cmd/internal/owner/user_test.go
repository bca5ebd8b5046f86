package owner

import (
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// asUser lets a process of a user connect, and returns what admit says.
func asUser(t *testing.T, s *Server, allowed, uid int) error {
	t.Helper()
	if os.Getuid() != 0 && uid != os.Getuid() {
		t.Skip("only root has processes of other users")
	}
	dir, err := os.MkdirTemp("/tmp", "owner")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := dir + "/s"
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	self, err := os.Open("/proc/self/exe") // It may lie where only root may go.
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.Command("/proc/self/fd/3", "-test.run=^TestConnectForAnother$", "-test.count=1")
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env = []string{connectTo + "=" + path}
	cmd.Dir = "/"
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	err = s.admit(conn)
	_ = stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return err
}

const connectTo = "ZTUN_OWNER_TEST_CONNECT"

// TestConnectForAnother is not a test but asUser's process.
func TestConnectForAnother(t *testing.T) {
	path := os.Getenv(connectTo)
	if path == "" {
		return
	}
	conn, err := net.Dial("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = os.Stdin.Read(make([]byte, 1))
}
