package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// maxFrame is more than the longest super-segment with its headers.
	maxFrame = 68 << 10
	// maxCommand bounds a line of input, in bytes.
	maxCommand = 64
)

// Listen taps every interface of the network namespace. Each line on in
// ("report" or "reset") is answered by a line of JSON on out: what has been
// Seen up to then. It returns when in ends.
func Listen(in *os.File, out io.Writer, words []string) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return fmt.Errorf("wire: packet socket: %w", err)
	}
	defer unix.Close(fd)
	// The tap must not lose what it is asked about; in a user namespace the
	// system's limit holds.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<20); err != nil {
			return fmt.Errorf("wire: receive buffer: %w", err)
		}
	}
	t := newTap(words)
	buffer := make([]byte, maxFrame)
	commands := lines{}
	for {
		wait := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(in.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(wait, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wire: %w", err)
		}
		// Frames first: an answer covers all that came before the question.
		if err := t.readFrames(fd, buffer); err != nil {
			return err
		}
		if wait[1].Revents == 0 {
			continue
		}
		asked, err := commands.read(int(in.Fd()))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, command := range asked {
			if err := t.readFrames(fd, buffer); err != nil {
				return err
			}
			if err := json.NewEncoder(out).Encode(t.seen); err != nil {
				return fmt.Errorf("wire: %w", err)
			}
			if command == "reset" {
				t.reset()
			}
		}
	}
}

// readFrames counts the frames that wait, once each: what a bridge sends out
// again has come in before.
func (t *tap) readFrames(fd int, buffer []byte) error {
	for {
		n, from, err := unix.Recvfrom(fd, buffer, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN):
			continue // One interface went; the others are still there.
		case err != nil:
			return fmt.Errorf("wire: %w", err)
		}
		if link, ok := from.(*unix.SockaddrLinklayer); ok && link.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		t.frame(buffer[:n])
	}
}

// lines cuts a descriptor's input into lines.
type lines struct{ rest []byte }

func (l *lines) read(fd int) ([]string, error) {
	buffer := make([]byte, 4*maxCommand)
	n, err := unix.Read(fd, buffer)
	if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("wire: commands: %w", err)
	}
	if n == 0 {
		return nil, io.EOF
	}
	l.rest = append(l.rest, buffer[:n]...)
	var found []string
	for {
		line, after, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			break
		}
		found = append(found, string(line))
		l.rest = after
	}
	if len(l.rest) > maxCommand {
		return nil, errors.New("wire: command too long")
	}
	return found, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
