package cluster

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// A Segment is what a wire shows of one TCP segment.
type Segment struct {
	From, To netip.AddrPort
	Payload  int // bytes
}

// A Wire records the TCP segments of both families on every interface of a node.
type Wire struct {
	fd   int
	done chan struct{}

	// mu guards the fields below.
	mu       sync.Mutex
	segments []Segment
}

// maxSegments bounds what a Wire keeps.
const maxSegments = 200_000

// Wire starts to record; the caller closes it.
func (n *Node) Wire() (*Wire, error) {
	w := &Wire{done: make(chan struct{})}
	err := n.Within(func() error {
		var err error
		const all = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // network order
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all&0xffff); err != nil {
			return err
		}
		_ = unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
		return unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
	})
	if err != nil {
		return nil, fmt.Errorf("e2e: wire of %s: %w", n.Name, err)
	}
	go w.record()
	return w, nil
}

// Within runs f on a thread in the node's network namespace. The thread ends after it.
func (n *Node) Within(f func() error) error {
	ns, err := os.Open(n.NetNS())
	if err != nil {
		return err
	}
	defer ns.Close()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends a thread that is left so
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			result <- err
			return
		}
		result <- f()
	}()
	return <-result
}

// Close ends the recording and returns all of it.
func (w *Wire) Close() []Segment {
	close(w.done)
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.segments
}

func (w *Wire) record() {
	defer unix.Close(w.fd)
	buf := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		select {
		case <-w.done:
			return
		default:
		}
		if err != nil {
			continue // the timeout
		}
		if s, ok := segment(buf[:n]); ok {
			w.mu.Lock()
			if len(w.segments) < maxSegments {
				w.segments = append(w.segments, s)
			}
			w.mu.Unlock()
		}
	}
}

// segment reads an IP packet that carries TCP.
func segment(p []byte) (Segment, bool) {
	if len(p) < 20 {
		return Segment{}, false
	}
	switch p[0] >> 4 {
	case 4:
		header, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
		if p[9] != unix.IPPROTO_TCP || header < 20 || total > len(p) || total < header {
			return Segment{}, false
		}
		return tcpSegment(p[header:total], netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])))
	case 6:
		const header = 40
		if len(p) < header || p[6] != unix.IPPROTO_TCP {
			return Segment{}, false
		}
		total := header + int(binary.BigEndian.Uint16(p[4:]))
		if total > len(p) {
			return Segment{}, false
		}
		return tcpSegment(p[header:total], netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])))
	}
	return Segment{}, false
}

func tcpSegment(tcp []byte, from, to netip.Addr) (Segment, bool) {
	if len(tcp) < 20 || int(tcp[12]>>4)*4 > len(tcp) {
		return Segment{}, false
	}
	return Segment{
		From:    netip.AddrPortFrom(from, binary.BigEndian.Uint16(tcp)),
		To:      netip.AddrPortFrom(to, binary.BigEndian.Uint16(tcp[2:])),
		Payload: len(tcp) - int(tcp[12]>>4)*4,
	}, true
}
