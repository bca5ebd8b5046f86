package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"
)

const (
	headerTimeout = 2 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 8 << 10
	// maxConns bounds the connections of one listener.
	maxConns = 256
)

// Serve answers on every address until ctx ends; requests under way then have
// two seconds more. It returns when nothing of it runs any more. A listener
// that cannot be opened is an error at once.
func Serve(ctx context.Context, name string, addrs []netip.AddrPort, h http.Handler, log *slog.Logger) (wait func(), err error) {
	var listeners []net.Listener
	for _, a := range addrs {
		l, err := net.Listen("tcp", a.String())
		if err != nil {
			// A machine without IPv6 still has the other loopback address.
			if a.Addr() == netip.IPv6Loopback() && len(listeners) > 0 {
				log.Warn("listener left out", "server", name, "error", err)
				continue
			}
			for _, l := range listeners {
				_ = l.Close()
			}
			return nil, fmt.Errorf("admin: %s: %w", name, err)
		}
		listeners = append(listeners, &limited{Listener: l, slots: make(chan struct{}, maxConns)})
	}
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	for _, l := range listeners {
		go serve(srv, l, log)
	}
	go func() {
		defer close(done)
		<-ctx.Done()
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), headerTimeout)
		defer cancel()
		if srv.Shutdown(limit) != nil {
			_ = srv.Close()
		}
	}()
	return func() { <-done }, nil
}

func serve(srv *http.Server, l net.Listener, log *slog.Logger) {
	if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		log.Error("server ended", "error", err)
	}
}

// limited is a listener with a bounded number of connections. More are closed
// at once rather than left waiting.
type limited struct {
	net.Listener
	slots chan struct{}
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &slotted{Conn: c, slots: l.slots}, nil
		default:
			_ = c.Close()
		}
	}
}

type slotted struct {
	net.Conn
	slots chan struct{}
	once  onceFlag
}

func (c *slotted) Close() error {
	if c.once.first() {
		<-c.slots
	}
	return c.Conn.Close()
}

// CloseWrite keeps the half-close of what it wraps.
func (c *slotted) CloseWrite() error {
	if hc, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return hc.CloseWrite()
	}
	return c.Close()
}
