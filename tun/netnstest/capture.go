package netnstest

import (
	"encoding/binary"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// maxCaptured bounds what a Capture keeps.
const maxCaptured = 100_000

// Capture records the IP packets that cross an interface, both directions, from layer 3 on.
type Capture struct {
	fd   int
	done chan struct{}
	stop int // eventfd

	// mu guards the fields below.
	mu      sync.Mutex
	packets [][]byte
}

// Capture starts to record at an interface, until the end of the test.
func (ns *NS) Capture(link string) *Capture {
	ns.t.Helper()
	index := ns.Link(link).Attrs().Index
	c := &Capture{done: make(chan struct{})}
	var err error
	ns.Do(func() {
		all := uint16(unix.ETH_P_ALL)
		proto := int(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, all)))
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return
		}
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
		err = unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: index})
	})
	if err == nil {
		c.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	}
	if err != nil {
		ns.t.Fatalf("netnstest: capture %s in %s: %v", link, ns.name, err)
	}
	go c.record()
	ns.t.Cleanup(c.close)
	return c
}

func (c *Capture) close() {
	_, _ = unix.Write(c.stop, binary.NativeEndian.AppendUint64(nil, 1))
	<-c.done
	_ = unix.Close(c.fd)
	_ = unix.Close(c.stop)
}

func (c *Capture) record() {
	defer close(c.done)
	buf := make([]byte, 1<<17)
	for {
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}, {Fd: int32(c.stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return
		}
		for {
			n, _, err := unix.Recvfrom(c.fd, buf, 0)
			if err != nil {
				break
			}
			c.mu.Lock()
			if len(c.packets) < maxCaptured && n > 0 && (buf[0]>>4 == 4 || buf[0]>>4 == 6) {
				c.packets = append(c.packets, slices.Clone(buf[:n]))
			}
			c.mu.Unlock()
		}
		if fds[1].Revents != 0 {
			return
		}
	}
}

// Packets returns those recorded so far that match.
func (c *Capture) Packets(match func(packet []byte) bool) [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out [][]byte
	for _, p := range c.packets {
		if match(p) {
			out = append(out, p)
		}
	}
	return out
}

// Wait fails the test unless a packet that matches is recorded soon.
func (c *Capture) Wait(t testing.TB, what string, match func(packet []byte) bool) []byte {
	t.Helper()
	var found [][]byte
	Eventually(t, what, func() bool {
		found = c.Packets(match)
		return len(found) > 0
	})
	return found[0]
}

// Eventually polls until ok, and fails the test after half a minute.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("netnstest: gave up waiting: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
