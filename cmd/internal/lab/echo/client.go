package echo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Call is what the client does.
type Call struct {
	// URL is http://HOST[:PORT][/PATH] or tcp://HOST:PORT.
	URL string
	// Data is the body of the request, or what is sent on the connection.
	Data string
	// Count is how often. 1
	Count int
	// Reuse makes all calls on one connection where HTTP can.
	Reuse bool
	// Timeout bounds each call. 5 s
	Timeout time.Duration
}

// Do makes the calls and copies the answers to out. It stops at the first
// that fails.
func Do(ctx context.Context, c Call, out io.Writer) error {
	if c.Count == 0 {
		c.Count = 1
	}
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	target, err := url.Parse(c.URL)
	if err != nil {
		return fmt.Errorf("call: %w", err)
	}
	var one func(context.Context) error
	switch target.Scheme {
	case "http":
		transport := &http.Transport{DisableKeepAlives: !c.Reuse}
		defer transport.CloseIdleConnections()
		one = func(ctx context.Context) error { return get(ctx, transport, c, out) }
	case "tcp":
		if _, _, err := net.SplitHostPort(target.Host); err != nil {
			return fmt.Errorf("call: %s: want tcp://HOST:PORT", c.URL)
		}
		one = func(ctx context.Context) error { return exchange(ctx, target.Host, c.Data, out) }
	default:
		return fmt.Errorf("call: %q: want http://HOST or tcp://HOST:PORT", c.URL)
	}
	for range c.Count {
		limited, cancel := context.WithTimeout(ctx, c.Timeout)
		err := one(limited)
		cancel()
		if err != nil {
			return fmt.Errorf("call: %w", err)
		}
	}
	return nil
}

func get(ctx context.Context, transport *http.Transport, c Call, out io.Writer) error {
	method := http.MethodGet
	if c.Data != "" {
		method = http.MethodPost
	}
	request, err := http.NewRequestWithContext(ctx, method, c.URL, strings.NewReader(c.Data))
	if err != nil {
		return err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(out, response.Body); err != nil {
		return err
	}
	if response.StatusCode >= 400 {
		return fmt.Errorf("%s: %s", c.URL, response.Status)
	}
	return nil
}

// exchange sends data, ends its side, and copies what comes until the far
// side's end.
func exchange(ctx context.Context, address, data string, out io.Writer) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := io.WriteString(conn, data); err != nil {
		return err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	_, err = io.Copy(out, conn)
	return err
}

// Errno returns what a call's error was to the kernel, and its name. Running
// into our own deadline is ETIMEDOUT. ok is false for anything else.
func Errno(err error) (errno syscall.Errno, name string, ok bool) {
	switch {
	case errors.As(err, &errno):
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		errno = unix.ETIMEDOUT
	default:
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			return 0, "", false
		}
		errno = unix.ETIMEDOUT
	}
	return errno, unix.ErrnoName(errno), true
}
