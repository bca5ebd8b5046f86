package zds

import (
	"fmt"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// A process is a proxy at the other end of connections. A device's reader is a
// process, not a connection: it goes on reading when its connection is lost,
// and stops for certain only when it has ended.
type process struct {
	pid   int      // 0 when it lives in a PID namespace that we cannot see.
	uid   uint32   //
	inode uint64   // Of its pidfd; unique where the kernel has pidfs.
	pidfd *os.File // nil when the kernel cannot tell us of its end.

	// Guarded by the Server's mu.
	conns int
	gone  bool
	hello hello // Of the latest connection that said one.
}

// peerProcess finds out who connected.
func peerProcess(conn *net.UnixConn) (*process, error) {
	rc, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	p := &process{}
	var optErr error
	err = rc.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); optErr != nil {
			return
		}
		p.pid, p.uid = int(cred.Pid), cred.Uid
		// Linux 6.5 names the peer without a race, across PID namespaces too.
		pidfd, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		if err != nil && p.pid > 0 {
			pidfd, err = unix.PidfdOpen(p.pid, 0)
		}
		if err == nil {
			p.adopt(pidfd)
		}
	})
	if err == nil {
		err = optErr
	}
	if err != nil {
		return nil, fmt.Errorf("zds: peer's credentials: %w", err)
	}
	return p, nil
}

func (p *process) adopt(pidfd int) {
	unix.CloseOnExec(pidfd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	const pidfsMagic = 0x50494446
	if unix.Fstatfs(pidfd, &fs) == nil && fs.Type == pidfsMagic && unix.Fstat(pidfd, &st) == nil {
		p.inode = st.Ino
	}
	// Non-blocking, so that waiting for its end costs no thread.
	if unix.SetNonblock(pidfd, true) != nil {
		_ = unix.Close(pidfd)
		return
	}
	p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
}

// same reports whether both are one process. p must not have ended: until
// then its PID is not given to another.
func (p *process) same(o *process) bool {
	if p.inode != 0 && o.inode != 0 {
		return p.inode == o.inode
	}
	return p.pidfd != nil && p.pid != 0 && p.pid == o.pid
}

// logger names the process in what log takes. One outside of our PID namespace
// has no number here.
func (p *process) logger(log *slog.Logger) *slog.Logger {
	if p.pid == 0 {
		return log.With("proxy_pidfd_inode", p.inode)
	}
	return log.With("proxy_pid", p.pid)
}

// wait returns once the process has ended, or close was called.
func (p *process) wait() {
	rc, err := p.pidfd.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n > 0
	})
}

func (p *process) close() {
	if p.pidfd != nil {
		_ = p.pidfd.Close()
	}
}
