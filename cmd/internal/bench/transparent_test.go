package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/zds"
)

// runTransparent is the smallest proxy that can take the other seat. It finds
// what it needs where a stock ztunnel does, and joins connections that were
// redirected to it with where they were going, in plain text.
func runTransparent() error {
	if err := checkSeat(); err != nil {
		return err
	}
	client := zds.NewClient(zds.ClientConfig{Socket: os.Getenv("INPOD_UDS"), Starter: transparent{}})
	return client.Run(context.Background())
}

// seatedBy stands before the command, and must reach it.
const seatedBy = "SEATED_BY='the bench'"

// checkSeat looks at the environment as a stock ztunnel would.
func checkSeat() error {
	for name, want := range map[string]string{"PROXY_MODE": "shared", "CLUSTER_ID": "Kubernetes", "SEATED_BY": "the bench"} {
		if got := os.Getenv(name); got != want {
			return fmt.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"NODE_NAME", "POD_NAME", "POD_NAMESPACE", "INPOD_UDS"} {
		if os.Getenv(name) == "" {
			return fmt.Errorf("no %s", name)
		}
	}
	if _, err := netip.ParseAddr(os.Getenv("INSTANCE_IP")); err != nil {
		return fmt.Errorf("INSTANCE_IP: %w", err)
	}
	if token, err := os.ReadFile(os.Getenv("AUTH_TOKEN")); err != nil || len(token) == 0 {
		return fmt.Errorf("AUTH_TOKEN: %d bytes, %w", len(token), err)
	}
	return errors.Join(checkControl("XDS"), checkControl("CA"))
}

// checkControl makes sure that the control plane is reached and proves who it
// is.
func checkControl(name string) error {
	address, err := url.Parse(os.Getenv(name + "_ADDRESS"))
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(os.Getenv(name + "_ROOT_CA"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	conn, err := tls.Dial("tcp", address.Host, &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return conn.Close()
}

type transparent struct{}

// Start listens in a pod.
func (transparent) Start(_ zds.Workload, files zds.Files) (zds.Proxy, error) {
	p := &transparentPod{files: files, netns: fmt.Sprintf("/proc/self/fd/%d", files.Device.Fd())}
	for port, bind := range map[int]bool{15001: false, 15006: true} {
		err := inNetns(p.netns, func() error {
			l, err := (&net.ListenConfig{Control: mark}).Listen(context.Background(), "tcp4", fmt.Sprintf(":%d", port))
			if err == nil {
				p.listeners = append(p.listeners, l)
				p.running.Go(func() { p.serve(l, bind) })
			}
			return err
		})
		if err != nil {
			p.Stop()
			return nil, err
		}
	}
	return p, nil
}

type transparentPod struct {
	files     zds.Files
	netns     string
	listeners []net.Listener
	running   sync.WaitGroup
}

func (p *transparentPod) Stop() {
	for _, l := range p.listeners {
		l.Close()
	}
	p.running.Wait()
	p.files.Close()
}

// serve joins what comes to l; to the pod itself in the name of the client, as
// a stock ztunnel does.
func (p *transparentPod) serve(l net.Listener, inbound bool) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go p.join(c.(*net.TCPConn), inbound)
	}
}

func (p *transparentPod) join(from *net.TCPConn, inbound bool) {
	defer from.Close()
	target, err := originalTarget(from)
	if err != nil {
		return
	}
	dialer := net.Dialer{Timeout: connectTimeout, Control: mark}
	if inbound {
		dialer.LocalAddr = &net.TCPAddr{IP: from.RemoteAddr().(*net.TCPAddr).IP}
	}
	var to net.Conn
	err = inNetns(p.netns, func() (err error) {
		to, err = dialer.Dial("tcp4", target)
		return err
	})
	if err != nil {
		return
	}
	defer to.Close()
	done := make(chan struct{})
	go func() {
		copyAll(to.(*net.TCPConn), from)
		close(done)
	}()
	copyAll(from, to.(*net.TCPConn))
	<-done
}

// mark sets what a stock ztunnel sets on its sockets.
func mark(_, _ string, raw syscall.RawConn) error {
	var optErr error
	err := raw.Control(func(fd uintptr) {
		optErr = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 1337),
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
	})
	return errors.Join(err, optErr)
}
