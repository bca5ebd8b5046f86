package cni

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A configuration that belongs to somebody else stays theirs. The agent may
// give files away, but has no CAP_FOWNER to touch them afterwards.
func TestReplaceKeepsModeAndOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	path := filepath.Join(t.TempDir(), "10-a.conflist")
	if err := os.WriteFile(path, []byte("old"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 65534, 65533); err != nil {
		t.Skipf("this user namespace has one user: %v", err)
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Ends with the thread.
		if err := withoutFOWNER(); err != nil {
			done <- err
			return
		}
		done <- replace(path, strings.NewReader("new"), 0o600, path)
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode().Perm() != 0o640 || st.Uid != 65534 || st.Gid != 65533 {
		t.Errorf("%v of %d:%d, want -rw-r----- of 65534:65533", info.Mode(), st.Uid, st.Gid)
	}
}

// withoutFOWNER takes the capability from this thread.
func withoutFOWNER() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	data[0].Effective &^= 1 << unix.CAP_FOWNER
	return unix.Capset(&header, &data[0])
}
