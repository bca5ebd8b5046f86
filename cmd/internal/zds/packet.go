package zds

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxPacket is the largest message that we take, in bytes. Stock peers
	// stop at 1024; a Device with older flows needs more.
	maxPacket = 64 << 10
	// maxReply is what a stock agent reads of an answer.
	maxReply = 1000
)

var (
	errTruncated = errors.New("zds: message longer than the buffer for it")
	errFiles     = errors.New("zds: more than one descriptor with one message")
)

// receive reads one message into buf. At most one file comes with it, which is
// the caller's. After an error none is left open. io.EOF: the peer has closed.
func receive(conn *net.UnixConn, buf []byte) (msg []byte, file *os.File, err error) {
	// Exactly one descriptor fits: CmsgSpace would round up to two.
	oob := make([]byte, unix.CmsgLen(4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	files, parseErr := takeFiles(oob[:oobn])
	switch {
	case err != nil:
	case flags&unix.MSG_TRUNC != 0:
		err = errTruncated
	case flags&unix.MSG_CTRUNC != 0 || len(files) > 1:
		err = errFiles
	case parseErr != nil:
		err = fmt.Errorf("zds: control message: %w", parseErr)
	case n == 0:
		err = io.EOF
	}
	if err != nil {
		for _, f := range files {
			_ = f.Close()
		}
		return nil, nil, err
	}
	if len(files) == 1 {
		file = files[0]
	}
	return buf[:n], file, nil
}

// takeFiles adopts every descriptor in a control message. They are
// close-on-exec: the net package asks for that.
func takeFiles(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue // Some other control message, which nobody asked for.
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "device"))
		}
	}
	return files, nil
}

// send writes one message, with file if it is not nil, before deadline.
func send(conn *net.UnixConn, msg []byte, file *os.File, deadline time.Time) error {
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	if file == nil {
		_, _, err := conn.WriteMsgUnix(msg, nil, nil)
		return err
	}
	// Not Fd: it may change flags that other holders share.
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = rc.Control(func(fd uintptr) {
		_, _, sendErr = conn.WriteMsgUnix(msg, unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(err, sendErr)
}

// dup returns another descriptor of the same open file.
func dup(f *os.File) (*os.File, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	err = rc.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("zds: duplicate descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
