package cni

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
	"github.com/ztun/ztun/cmd/internal/socket"
)

const event = `{"Netns":"/var/run/netns/cni-1","PodName":"a-1","PodNamespace":"demo","PodUID":"u-1","IPs":[{"Address":"10.1.0.5/24"}]}`

type enrollerFunc func(context.Context, Request) error

func (f enrollerFunc) Enrol(ctx context.Context, r Request) error { return f(ctx, r) }

// serve runs a server, and returns what speaks to it.
func serve(t *testing.T, e Enroller) (s *Server, post func(method, path, body string) (int, string), stop func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), wire.SocketName)
	s = NewServer(socket, e, nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	for _, err := os.Stat(socket); err != nil; _, err = os.Stat(socket) {
		if !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport, Timeout: patience}
	return s, func(method, path, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(method, "http://agent"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, strings.TrimSpace(string(text))
	}, stop
}

func TestServerAnswers(t *testing.T) {
	var got Request
	var answer error
	s, post, _ := serve(t, enrollerFunc(func(_ context.Context, r Request) error {
		got = r
		if r.PodName == "panic" {
			panic("of one pod")
		}
		return answer
	}))
	if code, text := post("POST", "/cmdadd", event); code != 200 || text != "" {
		t.Errorf("answer %d %q", code, text)
	}
	want := Request{Netns: "/var/run/netns/cni-1", PodName: "a-1", PodNamespace: "demo", PodUID: "u-1", IPs: []netip.Prefix{netip.MustParsePrefix("10.1.0.5/24")}}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	answer = errors.New("enrol: the proxy is away")
	got = Request{}
	for _, tt := range []struct {
		method, path, body string
		code               int
		text               string
	}{
		{"POST", "/cmdadd", event, 500, "enrol: the proxy is away"},
		{"POST", "/cmdadd", strings.Replace(event, "a-1", "panic", 1), 500, "cni: enrol: panic: of one pod"},
		{"POST", "/cmdadd", "{", 400, "cni: request: unexpected EOF"},
		{"POST", "/cmdadd", "{}", 400, "cni: request: path Netns"},
		{"POST", "/cmdadd", strings.Repeat("x", wire.MaxEvent+1), 400, "cni: request: more than 65536 bytes"},
		{"GET", "/cmdadd", "", 405, "cni: only POST"},
		{"POST", "/other", event, 404, ""},
	} {
		if code, text := post(tt.method, tt.path, tt.body); code != tt.code || !strings.HasPrefix(text, tt.text) {
			t.Errorf("%s %s %.100q = %d %q, want %d %q", tt.method, tt.path, tt.body, code, text, tt.code, tt.text)
		}
	}
	if diff := cmp.Diff(map[string]uint64{"200": 1, "400": 3, "405": 1, "500": 2}, s.Counts()); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

// TestServerIsRootsAlone looks at the socket itself, and at a second server that
// takes the first one's place.
func TestServerIsRootsAlone(t *testing.T) {
	s, _, stop := serve(t, enrollerFunc(func(context.Context, Request) error { return nil }))
	info, err := os.Stat(s.socket)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
	next, err := socket.Listen("unix", s.socket, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	stop()
	if after, err := os.Stat(s.socket); err != nil || os.SameFile(info, after) {
		t.Errorf("the next server's socket: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := NewServer(file, nil, nil).Run(context.Background()); err == nil {
		t.Error("a server without a socket runs")
	}
}

// TestStopEndsRequests holds a request and stops the server.
func TestStopEndsRequests(t *testing.T) {
	held := make(chan struct{})
	_, post, stop := serve(t, enrollerFunc(func(ctx context.Context, _ Request) error {
		close(held)
		<-ctx.Done()
		return context.Cause(ctx)
	}))
	answered := make(chan int, 1)
	go func() {
		code, _ := post("POST", "/cmdadd", event)
		answered <- code
	}()
	<-held
	stop()
	if code := <-answered; code == 200 {
		t.Error("a pod was let through by an agent that went away")
	}
}
