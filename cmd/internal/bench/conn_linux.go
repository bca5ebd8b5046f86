package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"

	"golang.org/x/sys/unix"
)

// connect starts a connection; ready goes on with it.
func (d *driver) connect(c *conn) error {
	fd, err := socket(c.netns)
	if err != nil {
		return err
	}
	c.fd, c.state, c.got = fd, connConnecting, 0
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fmt.Errorf("bench: no delay: %w", err)
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: d.target.Addr().As4(), Port: int(d.target.Port())})
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return d.fail(c, err)
	}
	return d.control(unix.EPOLL_CTL_ADD, fd, unix.EPOLLOUT, c.index)
}

// socket makes a socket that does not block, in the network namespace of that
// path.
func socket(netns string) (fd int, err error) {
	err = visit(netns, func() error {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("bench: socket: %w", err)
		}
		return nil
	})
	return fd, err
}

// visit runs f in the network namespace of that path, here if it is empty.
// What sockets f makes stay there.
func visit(netns string, f func() error) error {
	if netns == "" {
		return f()
	}
	return inNetns(netns, f)
}

func (d *driver) close(c *conn) {
	if c.state != connClosed {
		unix.Close(c.fd)
		c.state = connClosed
	}
}

// ready goes on with a connection about which epoll had something to say.
func (d *driver) ready(c *conn) error {
	switch c.state {
	case connConnecting:
		return d.established(c)
	case connIdle, connWaiting:
		return d.receive(c)
	}
	return nil // Closed by an earlier event.
}

func (d *driver) established(c *conn) error {
	errno, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && errno != 0 {
		err = unix.Errno(errno)
	}
	if err != nil {
		return d.fail(c, err)
	}
	c.state = connIdle
	d.connected++
	if err := d.control(unix.EPOLL_CTL_MOD, c.fd, unix.EPOLLIN, c.index); err != nil {
		return err
	}
	if d.fresh {
		return d.send(c, freshRequest)
	}
	return d.openNext()
}

func (d *driver) send(c *conn, text string) error {
	c.state, c.got = connWaiting, 0
	// Less than any send buffer: it fits or the connection has ended.
	if _, err := unix.Write(c.fd, []byte(text)); err != nil {
		return d.fail(c, err)
	}
	return nil
}

// receive reads what is there of an answer, and goes on when it is whole.
func (d *driver) receive(c *conn) error {
	n, err := unix.Read(c.fd, c.buf[c.got:])
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return nil
	case err != nil:
		return d.fail(c, err)
	}
	c.got += n
	want, err := answerLength(c.buf[:c.got])
	switch {
	case err != nil:
		return d.fail(c, err)
	case n == 0 && (!d.fresh || want != c.got):
		return d.fail(c, io.ErrUnexpectedEOF)
	case c.got > want && want > 0, c.got == len(c.buf):
		return d.fail(c, fmt.Errorf("answer is longer than %d bytes", want))
	// A connection of one request has ended with the server's FIN: whoever
	// closes first has to remember it, and clients run out of ports.
	case d.fresh && n == 0, !d.fresh && c.got == want:
		return d.finish(c)
	}
	return nil
}

// finish counts an answer and begins with the next request.
func (d *driver) finish(c *conn) error {
	now := d.now()
	d.result.Total++
	counts := now >= d.warm && now < d.end
	if d.interval > 0 {
		counts = c.due >= d.warm
	}
	if counts {
		d.result.Done++
		d.result.Latency.record(now - c.due)
	}
	return d.again(c)
}

// again gives a connection that has nothing to do its next request.
func (d *driver) again(c *conn) error {
	c.state = connIdle
	if d.fresh {
		d.close(c)
	}
	switch {
	case d.interval == 0 && d.now() < d.end:
		return d.begin(d.turn(c), d.now())
	case d.interval > 0 && len(d.due) > 0:
		return d.next(c)
	case d.interval > 0:
		d.free = append(d.free, c)
	}
	return nil
}

// turn is the connection whose turn is next, now that c has nothing to do.
func (d *driver) turn(c *conn) *conn {
	if len(d.free) == 0 {
		return c
	}
	d.free = append(d.free, c)
	c, d.free = d.free[0], d.free[1:]
	return c
}

// maxFailures is how many fresh connections may fail, unless they are few
// among many.
const (
	maxFailures     = 100
	maxFailureShare = 20 // One in so many.
)

// fail ends a connection. Those that are to be kept alive must not; the
// others are counted.
func (d *driver) fail(c *conn, err error) error {
	err = fmt.Errorf("bench: %v: %w", d.target, err)
	d.close(c)
	if !d.fresh {
		return err
	}
	d.result.Failed++
	if d.result.Failure == "" {
		d.result.Failure = err.Error()
	}
	if d.result.Failed >= maxFailures && d.result.Failed*maxFailureShare > d.result.Total {
		return err
	}
	return d.again(c)
}

// answerLength returns the length of the HTTP answer that b begins with, 0
// while its head is not there yet.
func answerLength(b []byte) (int, error) {
	head, _, whole := bytes.Cut(b, []byte("\r\n\r\n"))
	if !whole {
		return 0, nil
	}
	status, fields, _ := bytes.Cut(head, []byte("\r\n"))
	if !bytes.HasPrefix(status, []byte("HTTP/1.1 200")) {
		return 0, fmt.Errorf("answer is %.60q", status)
	}
	for len(fields) > 0 {
		var field []byte
		field, fields, _ = bytes.Cut(fields, []byte("\r\n"))
		name, value, _ := bytes.Cut(field, []byte(":"))
		if !bytes.EqualFold(name, []byte("Content-Length")) {
			continue
		}
		n, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 20)
		if err != nil {
			return 0, fmt.Errorf("answer's length is %.20q", value)
		}
		return len(head) + 4 + int(n), nil
	}
	return 0, errors.New("answer has no length")
}
