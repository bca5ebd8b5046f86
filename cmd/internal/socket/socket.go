// Package socket makes the agent's Unix sockets.
package socket

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// Listen makes a socket of a network such as "unix" or "unixpacket", of mode
// 0600, and the directory it is in. It takes the place of an older one at once,
// and is never open to others, not even for a moment. Zero uid and gid leave it
// to our own user. Closing it leaves the file, which may be a successor's.
func Listen(network, path string, uid, gid int) (*net.UnixListener, error) {
	l, err := listen(network, path, uid, gid)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

func listen(network, path string, uid, gid int) (*net.UnixListener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket == 0 {
		return nil, errors.New("what is there is not a socket")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	// Its mode is that of the directory it is made in until it is changed.
	dir, err := os.MkdirTemp(filepath.Dir(path), ".s")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "s")
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	// The name that is bound has to fit 107 bytes even if path just does.
	name := fmt.Sprintf("/proc/self/fd/%d/s", d.Fd())
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: name, Net: network})
	if err != nil {
		return nil, err
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
		return nil, err
	}
	return l, nil
}
