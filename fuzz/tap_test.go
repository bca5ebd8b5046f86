package fuzz

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun"
)

// A tap carries packets between the proxy's device and the kernel's, and looks
// at what leaves the proxy.
type tap struct {
	t             *testing.T
	proxy, kernel *tun.Device // the far ends of what each of them reads
	stop          int         // eventfd
	done          chan struct{}

	// mu guards the fields below.
	mu    sync.Mutex
	look  func(p []byte) error // of each packet that leaves the proxy; nil: none
	first error                // that look returned
	sent  [2]int               // packets from and to the proxy
}

func newTap(t *testing.T, proxy, kernel *tun.Device) *tap {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	p := &tap{t: t, proxy: proxy, kernel: kernel, stop: stop, done: make(chan struct{})}
	go p.run()
	return p
}

// watch sets what looks at the packets from now on.
func (p *tap) watch(look func(p []byte) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.look = look
}

// inject writes a packet to the proxy's device.
func (p *tap) inject(h tun.Header, b []byte) { _ = p.proxy.Write(h, b) }

func (p *tap) run() {
	defer close(p.done)
	fds := []unix.PollFd{{Fd: int32(p.proxy.FD()), Events: unix.POLLIN}, {Fd: int32(p.kernel.FD()), Events: unix.POLLIN}, {Fd: int32(p.stop), Events: unix.POLLIN}}
	var vector tun.Vector
	buf := make([]byte, tun.MaxPacket)
	vector.Set(0, buf)
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if fds[2].Revents != 0 {
			return
		}
		for range 64 {
			n, h, err := p.proxy.Read(&vector)
			if err != nil {
				break
			}
			p.leaves(buf[:n])
			_ = p.kernel.Write(h, buf[:n])
		}
		for range 64 {
			n, h, err := p.kernel.Read(&vector)
			if err != nil {
				break
			}
			p.count(1)
			_ = p.proxy.Write(h, buf[:n])
		}
	}
}

func (p *tap) count(way int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent[way]++
}

func (p *tap) leaves(b []byte) {
	p.count(0)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.look != nil && p.first == nil {
		p.first = p.look(b)
	}
}

func (p *tap) err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.first
}

func (p *tap) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("%d packets came from the proxy, %d went to it; %v", p.sent[0], p.sent[1], p.first)
}

func (p *tap) close() {
	if _, err := unix.Write(p.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		p.t.Error(err)
	}
	<-p.done
	unix.Close(p.stop)
}

// A seen packet is what a router would read of one.
type seen struct {
	src, dst netip.AddrPort // without port for what has none, or a later fragment
	tcp      bool
	fragment bool // not the first
	flags    byte
	payload  int
}

// TCP flags.
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// readPacket reads a packet that leaves the proxy; ok is false for what is no
// IP packet at all. It trusts no length.
func readPacket(b []byte) (p seen, ok bool) {
	var src, dst netip.Addr
	var protocol byte
	var l4 []byte
	switch {
	case len(b) >= 20 && b[0]>>4 == 4 && int(b[0]&15)*4 >= 20 && int(b[0]&15)*4 <= len(b):
		src, _ = netip.AddrFromSlice(b[12:16])
		dst, _ = netip.AddrFromSlice(b[16:20])
		protocol, l4 = b[9], b[int(b[0]&15)*4:]
		p.fragment = b[6]&0x1f != 0 || b[7] != 0
	case len(b) >= 40 && b[0]>>4 == 6:
		src, _ = netip.AddrFromSlice(b[8:24])
		dst, _ = netip.AddrFromSlice(b[24:40])
		protocol, l4 = b[6], b[40:]
		for protocol == 0 || protocol == 43 || protocol == 60 || protocol == 44 {
			if len(l4) < 8 {
				break
			}
			size := 8
			if protocol == 44 {
				p.fragment = p.fragment || l4[2] != 0 || l4[3]&0xf8 != 0
			} else {
				size = min(8+int(l4[1])*8, len(l4))
			}
			protocol, l4 = l4[0], l4[size:]
		}
	default:
		return p, false
	}
	p.src, p.dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	if p.tcp = protocol == 6; !p.tcp {
		return p, true
	}
	if p.fragment || len(l4) < 20 {
		p.payload = len(l4)
		return p, true
	}
	p.src = netip.AddrPortFrom(src, uint16(l4[0])<<8|uint16(l4[1]))
	p.dst = netip.AddrPortFrom(dst, uint16(l4[2])<<8|uint16(l4[3]))
	p.flags = l4[13]
	p.payload = max(0, len(l4)-int(l4[12]>>4)*4)
	return p, true
}

func (p seen) String() string {
	return fmt.Sprintf("%v -> %v tcp=%v fragment=%v flags=%#x payload=%d", p.src, p.dst, p.tcp, p.fragment, p.flags, p.payload)
}
