// Package echo is the lab's own server and client: small enough that nothing
// has to be installed to see a mesh at work. The server says whom it saw; the
// client says what happened, down to the errno.
package echo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// Config is what a Server listens on. At least one list must not be empty.
type Config struct {
	// HTTP answers requests with who it is, whom it saw, and the request's body.
	HTTP []string
	// TCP sends back what it gets, and closes its side when the client has.
	TCP []string
	// Banner does so after a line of its own, as servers of mail do.
	Banner []string
	// Log takes a line a connection. Nil: none.
	Log *slog.Logger
}

// maxBody bounds how much of a request's body is sent back, in bytes.
const maxBody = 1 << 20

// Serve listens until ctx ends, then returns nil.
func Serve(ctx context.Context, c Config) error {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	s := &server{name: name, log: c.Log}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	defer running.Wait()
	for _, l := range []struct {
		addresses []string
		serve     func(context.Context, net.Listener) error
	}{{c.HTTP, s.serveHTTP}, {c.TCP, s.serveTCP(false)}, {c.Banner, s.serveTCP(true)}} {
		for _, address := range l.addresses {
			listener, err := net.Listen("tcp", address)
			if err != nil {
				cancel(nil)
				return fmt.Errorf("echo: %w", err)
			}
			c.Log.Info("listening", "address", listener.Addr().String())
			running.Go(func() {
				defer context.AfterFunc(ctx, func() { listener.Close() })()
				if err := l.serve(ctx, listener); err != nil && ctx.Err() == nil {
					cancel(fmt.Errorf("echo: %s: %w", address, err))
				}
			})
		}
	}
	<-ctx.Done()
	if cause := context.Cause(ctx); cause != ctx.Err() {
		return cause
	}
	return nil
}

type server struct {
	name string
	log  *slog.Logger
}

func (s *server) serveHTTP(ctx context.Context, l net.Listener) error {
	web := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       5 * time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.log.Info("request", "client", r.RemoteAddr, "method", r.Method, "path", r.URL.Path)
			fmt.Fprintf(w, "server: %s\nclient: %s\n", s.name, r.RemoteAddr)
			io.Copy(w, io.LimitReader(r.Body, maxBody))
		}),
	}
	defer context.AfterFunc(ctx, func() { web.Close() })()
	return web.Serve(l)
}

func (s *server) serveTCP(banner bool) func(context.Context, net.Listener) error {
	return func(ctx context.Context, l net.Listener) error {
		var open sync.WaitGroup
		defer open.Wait()
		for {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			open.Go(func() { s.echo(ctx, conn.(*net.TCPConn), banner) })
		}
	}
}

// echo returns what conn sends until its end, and then ends conn the same way.
func (s *server) echo(ctx context.Context, conn *net.TCPConn, banner bool) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	s.log.Info("connection", "client", conn.RemoteAddr().String())
	if banner {
		if _, err := fmt.Fprintf(conn, "server: %s client: %s\n", s.name, conn.RemoteAddr()); err != nil {
			return
		}
	}
	n, err := io.Copy(conn, conn)
	if err != nil && !errors.Is(err, net.ErrClosed) {
		s.log.Info("connection ended", "client", conn.RemoteAddr().String(), "bytes", n, "error", err)
		conn.SetLinger(0)
		return
	}
	conn.CloseWrite()
}
