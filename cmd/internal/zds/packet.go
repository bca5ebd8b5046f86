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
	// maxFiles is how many descriptors come with one message.
	maxFiles = 1 + MaxICMP + 1
)

var (
	errTruncated = errors.New("zds: message longer than the buffer for it")
	errFiles     = fmt.Errorf("zds: more than %d descriptors with one message", maxFiles)
)

// receive reads one message into buf. At most maxFiles files come with it,
// which are the caller's. After an error none is left open. io.EOF: the peer has
// closed.
func receive(conn *net.UnixConn, buf []byte) (msg []byte, files []*os.File, err error) {
	// Exactly so many descriptors fit: CmsgSpace may round up to one more.
	oob := make([]byte, unix.CmsgLen(4*maxFiles))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	var parseErr error
	files, parseErr = takeFiles(oob[:oobn])
	switch {
	case err != nil:
	case flags&unix.MSG_TRUNC != 0:
		err = errTruncated
	case flags&unix.MSG_CTRUNC != 0 || len(files) > maxFiles:
		err = errFiles
	case parseErr != nil:
		err = fmt.Errorf("zds: control message: %w", parseErr)
	case n == 0:
		err = io.EOF
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return buf[:n], files, nil
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
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}

// send writes one message and its files before deadline.
func send(conn *net.UnixConn, msg []byte, files []*os.File, deadline time.Time) error {
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	return withFDs(files, nil, func(fds []int) error {
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		_, _, err := conn.WriteMsgUnix(msg, oob, nil)
		return err
	})
}

// withFDs calls do with the descriptors of files, which stay open meanwhile.
// Not Fd: it may change flags that other holders share.
func withFDs(files []*os.File, fds []int, do func([]int) error) error {
	if len(files) == 0 {
		return do(fds)
	}
	rc, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	err = rc.Control(func(fd uintptr) { doErr = withFDs(files[1:], append(fds, int(fd)), do) })
	return errors.Join(err, doErr)
}
