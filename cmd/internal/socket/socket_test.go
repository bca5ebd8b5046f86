package socket_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ztun/ztun/cmd/internal/socket"
)

func TestListenReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "agent.sock")
	for range 2 {
		l, err := socket.Listen("unixpacket", path, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(path)
		if err != nil || info.Mode().Perm() != 0o600 || info.Mode()&os.ModeSocket == 0 {
			t.Errorf("socket = %v, %v", info.Mode(), err)
		}
		_ = l.Close() // As a process that dies, it leaves the socket behind.
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := socket.Listen("unixpacket", path, 0, 0); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("Listen on a file = %v", err)
	}
}
