package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// streamBuffer is the size of one read or write on a stream, in bytes.
const streamBuffer = 128 << 10

// streams are connections that carry as much as they can, in one direction.
// They block in system calls, as iperf's do: waiting in Go's poller takes
// CPU from the proxies, which is not what is to be measured.
type streams struct {
	received atomic.Uint64 // Bytes.

	mu sync.Mutex
	// mu guards the fields below.
	files []*os.File
}

// The first byte of a stream says who sends.
const (
	clientSends = 'u'
	serverSends = 'd'
)

func (s *streams) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		f, err := blocking(c)
		if err != nil {
			continue
		}
		go func() {
			defer f.Close()
			direction := make([]byte, 1)
			if _, err := io.ReadFull(f, direction); err != nil {
				return
			}
			if direction[0] == serverSends {
				send(f)
			} else {
				s.receive(f)
			}
		}()
	}
}

// blocking turns a connection into a file that blocks, without the no-delay
// that Go sets and programs that send in bulk do not: it would cut a small
// segment off the end of each write.
func blocking(c net.Conn) (*os.File, error) {
	if err := c.(*net.TCPConn).SetNoDelay(false); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	f, err := c.(*net.TCPConn).File()
	return f, errors.Join(err, c.Close())
}

// open opens streams to a server and starts to fill or drain them.
func (s *streams) open(o order) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.files) > 0 {
		return errors.New("bench: streams are open already")
	}
	for range o.Conns {
		f, err := openStream(netip.AddrPortFrom(o.Addr.Addr(), portStream), o.Down)
		if err != nil {
			s.closeLocked()
			return fmt.Errorf("bench: open stream: %w", err)
		}
		s.files = append(s.files, f)
	}
	for _, f := range s.files {
		go func() {
			defer f.Close()
			if o.Down {
				s.receive(f)
			} else {
				send(f)
			}
		}()
	}
	return nil
}

func openStream(target netip.AddrPort, down bool) (*os.File, error) {
	c, err := net.DialTimeout("tcp4", target.String(), connectTimeout)
	if err != nil {
		return nil, err
	}
	f, err := blocking(c)
	if err != nil {
		return nil, err
	}
	direction := byte(clientSends)
	if down {
		direction = serverSends
	}
	if _, err := f.Write([]byte{direction}); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (s *streams) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

// closeLocked wakes whoever is in a read or write, who then closes.
func (s *streams) closeLocked() {
	for _, f := range s.files {
		if raw, err := f.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { unix.Shutdown(int(fd), unix.SHUT_RDWR) })
		}
	}
	s.files = nil
}

// send writes until the connection ends.
func send(f *os.File) {
	b := make([]byte, streamBuffer)
	for {
		if _, err := f.Write(b); err != nil {
			return
		}
	}
}

// receive reads until the connection ends, and counts.
func (s *streams) receive(f *os.File) {
	b := make([]byte, streamBuffer)
	for {
		n, err := f.Read(b)
		s.received.Add(uint64(n))
		if err != nil {
			return
		}
	}
}
