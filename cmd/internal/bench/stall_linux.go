package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// stallPatience is how long a sender may be held up and still go on.
	stallPatience = 2 * time.Second
	// maxStall ends the wait for a sender that nothing stops, in bytes.
	maxStall = 256 << 20
)

// stallReader accepts connections and never reads. It holds the last one.
func stallReader(l net.Listener) {
	var last net.Conn
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if last != nil {
			last.Close()
		}
		last = c
	}
}

// stall sends to a reader that never reads, and returns how many bytes went
// before nothing did for stallPatience.
func stall(target netip.AddrPort) (sent uint64, err error) {
	fd, err := socket("")
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	// What was sent is of no use to anybody.
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, fmt.Errorf("bench: linger: %w", err)
	}
	if err := connectWithin(fd, target); err != nil {
		return 0, fmt.Errorf("bench: connect to %v: %w", target, err)
	}
	b := make([]byte, streamBuffer)
	for last := time.Now(); time.Since(last) < stallPatience && sent < maxStall; {
		n, err := unix.SendmsgN(fd, b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case err == nil:
			sent, last = sent+uint64(n), time.Now()
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			time.Sleep(10 * time.Millisecond)
		default:
			return 0, fmt.Errorf("bench: send to %v: %w", target, err)
		}
	}
	return sent, nil
}
