package zds

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait of a test for something that must come.
const patience = 20 * time.Second

// eventually polls for what the kernel and other goroutines bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func listen(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "zds.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l, path
}

// device is a file that stands for a TUN device; equal inodes mean the same.
func device(t *testing.T) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "device")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func inode(t *testing.T, f *os.File) uint64 {
	t.Helper()
	var st unix.Stat_t
	rc, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var statErr error
	err = rc.Control(func(fd uintptr) { statErr = unix.Fstat(int(fd), &st) })
	if err := errors.Join(err, statErr); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// openFiles counts this process' descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// descriptorsOf counts this process' descriptors of files with those inodes. All of its
// descriptors would not do: those that an earlier test forgot go when they like.
func descriptorsOf(t *testing.T, inodes []uint64) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Stat("/proc/self/fd/"+e.Name(), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && slices.Contains(inodes, st.Ino) {
			n++
		}
	}
	return n
}

// peer is a hand-driven end of a connection.
type peer struct {
	t    *testing.T
	conn *net.UnixConn
}

func (p peer) send(msg []byte, files ...*os.File) {
	p.t.Helper()
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := p.conn.WriteMsgUnix(msg, oob, nil); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// receive reads one message. Its files are closed with the test at the latest:
// forgotten ones would go during another, which counts.
func (p peer) receive() ([]byte, []*os.File, error) {
	_ = p.conn.SetReadDeadline(time.Now().Add(patience))
	msg, files, err := receive(p.conn, make([]byte, maxPacket))
	p.t.Cleanup(func() { closeAll(files) })
	return msg, files, err
}

func (p peer) request(r request, files ...*os.File) {
	p.t.Helper()
	msg, err := encodeRequest(r)
	if err != nil {
		p.t.Fatal(err)
	}
	p.send(msg, files...)
}

// wantAck reads one answer and returns its text.
func (p peer) wantAck(why string) string {
	p.t.Helper()
	msg, files, err := p.receive()
	if err != nil {
		p.t.Fatalf("%s: no answer: %v", why, err)
	}
	if len(files) > 0 {
		p.t.Fatalf("%s: an answer with %d files", why, len(files))
	}
	r, err := decodeResponse(msg)
	if err != nil {
		p.t.Fatalf("%s: %v", why, err)
	}
	return r.text
}

func (p peer) wantOK(why string) {
	p.t.Helper()
	if text := p.wantAck(why); text != "" {
		p.t.Fatalf("%s: answered %q, want no error", why, text)
	}
}

// wantClosed expects the other side to hang up.
func (p peer) wantClosed(why string) {
	p.t.Helper()
	for {
		msg, files, err := p.receive()
		closeAll(files)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			p.t.Fatalf("%s: still open", why)
		}
		if err != nil {
			return
		}
		p.t.Logf("%s: before the end: %x", why, msg)
	}
}

func getfd(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var flags int
	var fcntlErr error
	err = rc.Control(func(fd uintptr) { flags, fcntlErr = unix.FcntlInt(fd, unix.F_GETFD, 0) })
	return flags, errors.Join(err, fcntlErr)
}

func pidfdOpen(pid int) (int, error) { return unix.PidfdOpen(pid, 0) }
