package echo

import (
	"context"
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a server on free ports and returns them: HTTP, TCP, banner.
func serve(t *testing.T) [3]string {
	t.Helper()
	var addresses [3]string
	for i := range addresses {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addresses[i] = l.Addr().String()
		l.Close()
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, Config{HTTP: addresses[:1], TCP: addresses[1:2], Banner: addresses[2:]})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve = %v, want nil", err)
		}
	})
	for _, a := range addresses {
		for {
			conn, err := net.Dial("tcp", a)
			if err == nil {
				conn.Close()
				break
			}
			select {
			case err := <-ended:
				t.Fatalf("Serve = %v", err)
			default:
			}
		}
	}
	return addresses
}

func TestServerSaysWhomItSaw(t *testing.T) {
	addresses := serve(t)
	for _, tt := range []struct {
		name string
		call Call
		want []string
	}{
		{"http", Call{URL: "http://" + addresses[0] + "/x"}, []string{"server: ", "client: 127.0.0.1:"}},
		{"http with a body", Call{URL: "http://" + addresses[0], Data: "canary"}, []string{"client: ", "canary"}},
		{"twice on one connection", Call{URL: "http://" + addresses[0], Count: 2, Reuse: true}, []string{"client: "}},
		{"tcp", Call{URL: "tcp://" + addresses[1], Data: "canary"}, []string{"canary"}},
		{"banner", Call{URL: "tcp://" + addresses[2]}, []string{"server: ", "client: 127.0.0.1:"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			if err := Do(context.Background(), tt.call, &out); err != nil {
				t.Fatal(err)
			}
			for _, w := range tt.want {
				if n := strings.Count(out.String(), w); n != max(1, tt.call.Count) {
					t.Errorf("Do(%+v) printed %q %d times in %q, want %d", tt.call, w, n, out.String(), max(1, tt.call.Count))
				}
			}
		})
	}
}

func TestErrnoNamesWhatHappened(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	refused := Do(context.Background(), Call{URL: "http://" + closed}, &strings.Builder{})

	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	timeout := Do(context.Background(), Call{URL: "tcp://" + silent.Addr().String(), Timeout: 1}, &strings.Builder{})

	for _, tt := range []struct {
		err  error
		want syscall.Errno
		name string
	}{
		{refused, syscall.ECONNREFUSED, "ECONNREFUSED"},
		{timeout, syscall.ETIMEDOUT, "ETIMEDOUT"},
		{errors.New("other"), 0, ""},
	} {
		if errno, name, _ := Errno(tt.err); errno != tt.want || name != tt.name {
			t.Errorf("Errno(%v) = %d, %q, want %d, %q", tt.err, errno, name, tt.want, tt.name)
		}
	}
}

func TestDoRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, u := range []string{"", "https://x", "tcp://host", "ftp://x", "http://%zz"} {
		if err := Do(context.Background(), Call{URL: u}, &strings.Builder{}); err == nil {
			t.Errorf("Do(%q) = nil, want an error", u)
		}
	}
}
