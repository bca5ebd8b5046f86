package soak

import (
	"errors"
	"net"
	"syscall"
)

// A conn is one end of a connection.
type conn interface {
	Read(p []byte) (int, error)
	Write(p []byte) (int, error)
	CloseWrite() error
	// Reset ends both directions at once.
	Reset()
	// Close gives the end back.
	Close() error
	// Shrink makes the receive buffer so many bytes, if it can.
	Shrink(n int)
}

// errReset matches the error of an end whose connection was reset by the peer
// or by what is in between.
var errReset = errors.New("soak: reset")

// kernelConn is a conn on a socket of the kernel.
type kernelConn struct{ *net.TCPConn }

func (c kernelConn) Reset() {
	_ = c.SetLinger(0)
	_ = c.TCPConn.Close()
}

func (c kernelConn) Shrink(n int) { _ = c.SetReadBuffer(n) }

func (c kernelConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	return n, asReset(err)
}

func (c kernelConn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	return n, asReset(err)
}

// asReset translates what the kernel says after a RST.
func asReset(err error) error {
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return errors.Join(errReset, err)
	}
	return err
}
