package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	redirectPort = 15001
	// redirectMark keeps the proxy's own connections from being redirected.
	redirectMark = 0x539
	// redirectBuffer is io.Copy's.
	redirectBuffer = 32 << 10
)

// redirect sends this namespace's connections to server through a plain Go
// proxy on kernel sockets: what a proxy costs before it does anything.
func redirect(server netip.Addr) error {
	l, err := net.Listen("tcp4", fmt.Sprintf(":%d", redirectPort))
	if err != nil {
		return fmt.Errorf("bench: redirect: %w", err)
	}
	if err := capture(server); err != nil {
		l.Close()
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go forward(c.(*net.TCPConn))
		}
	}()
	return nil
}

// capture adds the rules, or puts up with those of a former proxy.
func capture(server netip.Addr) error {
	program, err := findTool("iptables", "iptables")
	if err != nil {
		return err
	}
	for _, rule := range []string{
		fmt.Sprintf("OUTPUT -p tcp -d %v -m mark --mark %#x -j RETURN", server, redirectMark),
		fmt.Sprintf("OUTPUT -p tcp -d %v -j REDIRECT --to-ports %d", server, redirectPort),
	} {
		run := func(verb string) ([]byte, error) {
			cmd := exec.Command(program, append([]string{"-w", "5", "-t", "nat", verb}, strings.Fields(rule)...)...)
			// The customary place may not be ours to write.
			cmd.Env = append(cmd.Environ(), "XTABLES_LOCKFILE=/dev/shm/xtables.lock")
			return cmd.CombinedOutput()
		}
		if _, err := run("-C"); err == nil {
			continue
		}
		if out, err := run("-A"); err != nil {
			return fmt.Errorf("bench: iptables -t nat -A %s: %w: %s", rule, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// forward joins a redirected connection with one to where it was going.
func forward(app *net.TCPConn) {
	defer app.Close()
	target, err := originalTarget(app)
	if err != nil {
		return
	}
	dialer := net.Dialer{Timeout: connectTimeout, Control: func(_, _ string, raw syscall.RawConn) error {
		var markErr error
		err := raw.Control(func(fd uintptr) {
			markErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, redirectMark)
		})
		return errors.Join(err, markErr)
	}}
	c, err := dialer.DialContext(context.Background(), "tcp4", target)
	if err != nil {
		return
	}
	server := c.(*net.TCPConn)
	defer server.Close()
	done := make(chan struct{})
	go func() {
		copyAll(server, app)
		close(done)
	}()
	copyAll(app, server)
	<-done
}

// copyAll copies through a buffer, not by splice: a proxy that has something
// to do with the bytes has to see them.
func copyAll(to, from *net.TCPConn) {
	b := make([]byte, redirectBuffer)
	for {
		n, err := from.Read(b)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				from.CloseRead()
				return
			}
		}
		if err != nil {
			to.CloseWrite()
			return
		}
	}
}

// originalTarget asks the kernel where a redirected connection was going.
func originalTarget(c *net.TCPConn) (string, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	var target string
	var optErr error
	err = raw.Control(func(fd uintptr) {
		// A sockaddr_in is shorter than the structure that this call fills.
		var m *unix.IPv6Mreq
		if m, optErr = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); optErr == nil {
			port := int(m.Multiaddr[2])<<8 | int(m.Multiaddr[3])
			target = net.JoinHostPort(netip.AddrFrom4([4]byte(m.Multiaddr[4:8])).String(), strconv.Itoa(port))
		}
	})
	return target, errors.Join(err, optErr)
}
