package agent

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// Listen makes a seqpacket socket that proxies connect to, of mode 0600. It
// takes the place of an older one at once, and is never open to others, not even
// for a moment. Zero uid and gid leave it to our own user.
func Listen(path string, uid, gid int) (*net.UnixListener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("agent: socket: %s exists and is not a socket", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("agent: socket: %w", err)
	}
	// Its mode is that of the directory it is made in until it is changed.
	dir, err := os.MkdirTemp(filepath.Dir(path), ".s")
	if err != nil {
		return nil, fmt.Errorf("agent: socket: %w", err)
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "s")
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("agent: socket: %w", err)
	}
	defer d.Close()
	// The name that is bound has to fit 107 bytes even if path just does.
	name := fmt.Sprintf("/proc/self/fd/%d/s", d.Fd())
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: name, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("agent: socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, 0o600)
	if err == nil && (uid != 0 || gid != 0) {
		err = os.Chown(tmp, uid, gid)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("agent: socket: %w", err)
	}
	return l, nil
}
