package soak

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/meshtest"
)

// sockets makes sockets in a pod's namespace. It keeps one thread there, where
// NS.Do would take a new one for each connection.
type sockets struct{ asked chan chan<- made }

type made struct {
	fd  int
	err error
}

func newSockets(t *testing.T, p *meshtest.Pod) *sockets {
	s := &sockets{asked: make(chan chan<- made)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.NS.Do(func() {
			for answer := range s.asked {
				fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				answer <- made{fd, err}
			}
		})
	}()
	t.Cleanup(func() {
		close(s.asked)
		<-ended
	})
	return s
}

// dial opens a connection from the namespace.
func (s *sockets) dial(to netip.AddrPort, timeout time.Duration) (conn, error) {
	answer := make(chan made)
	s.asked <- answer
	m := <-answer
	if m.err != nil {
		return nil, m.err
	}
	// An IPv6 socket speaks both families.
	err := unix.Connect(m.fd, &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())})
	f := os.NewFile(uintptr(m.fd), "socket")
	defer f.Close()
	if err == unix.EINPROGRESS {
		err = connected(f, timeout)
	}
	if err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return kernelConn{c.(*net.TCPConn)}, nil
}

// connected waits for the end of a connect.
func connected(f *os.File, timeout time.Duration) error {
	if err := f.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var errno error
	tried := false
	err = rc.Write(func(fd uintptr) bool {
		var info *unix.TCPInfo
		if info, errno = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); errno != nil {
			return true
		}
		if !tried && info.State == unix.BPF_TCP_SYN_SENT {
			tried = true
			return false
		}
		var n int
		if n, errno = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); errno == nil && n != 0 {
			errno = syscall.Errno(n)
		}
		return errno != nil || info.State != unix.BPF_TCP_SYN_SENT
	})
	if err != nil {
		return err
	}
	return errno
}

// State tells what the kernel knows of the connection.
func (c kernelConn) State() string {
	rc, err := c.SyscallConn()
	if err != nil {
		return err.Error()
	}
	s := fmt.Sprintf("%v -> %v: ", c.LocalAddr(), c.RemoteAddr())
	err = rc.Control(func(fd uintptr) {
		i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			s += err.Error()
			return
		}
		in, _ := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
		out, _ := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
		s += fmt.Sprintf("state %d, unread %d, unacknowledged or unsent %d, in flight %d, lost %d, retransmits %d, rto %d us, rtt %d us, cwnd %d, peer's window %d, own %d, last sent %d ms ago, last received %d ms ago",
			i.State, in, out, i.Unacked, i.Lost, i.Retransmits, i.Rto, i.Rtt, i.Snd_cwnd, i.Snd_wnd, i.Rcv_wnd, i.Last_data_sent, i.Last_data_recv)
	})
	if err != nil {
		return s + err.Error()
	}
	return s
}

// accept hands what a pod's listener accepts to serve, once its first word
// has come.
func accept(t *testing.T, p *meshtest.Pod, port uint16, serve func(first uint64, c conn)) {
	l := p.NS.Listen("tcp", fmt.Sprintf(":%d", port))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go greet(kernelConn{c.(*net.TCPConn)}, serve)
		}
	}()
}

func greet(c conn, serve func(first uint64, c conn)) {
	var first [word]byte
	if _, err := io.ReadFull(c, first[:]); err != nil {
		c.Reset()
		return
	}
	serve(binary.LittleEndian.Uint64(first[:]), c)
}

// goroutines is a dump of all, those with the same stack once.
func goroutines() string {
	b := make([]byte, 64<<20)
	b = b[:runtime.Stack(b, true)]
	type group struct {
		n    int
		text string
	}
	groups, order := map[string]*group{}, []string{}
	for _, g := range strings.Split(string(b), "\n\n") {
		head, stack, _ := strings.Cut(g, "\n")
		var lines []string
		for _, l := range strings.Split(stack, "\n") {
			l, _, _ = strings.Cut(l, "(0x")
			l, _, _ = strings.Cut(l, " +0x")
			lines = append(lines, l)
		}
		key := strings.Join(lines, "\n")
		if groups[key] == nil {
			groups[key] = &group{text: head + "\n" + key}
			order = append(order, key)
		}
		groups[key].n++
	}
	var s strings.Builder
	for _, k := range order {
		fmt.Fprintf(&s, "%d: %s\n\n", groups[k].n, groups[k].text)
	}
	return s.String()
}
