package xds

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/ztun/ztun/xds/istiodtest"
)

// A logBook is a log that can be read while it is written.
type logBook struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// above returns the lines above INFO.
func (l *logBook) above() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
			lines = append(lines, line)
		}
	}
	return lines
}

func (l *logBook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// serveOn serves s on l, with options, as name, whose root it writes.
func (s *server) serveOn(l net.Listener, name string, options ...grpc.ServerOption) (stop func()) {
	s.t.Helper()
	cert, root := newCertificate(s.t, name)
	s.write("root.pem", root)
	options = append(options, grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}})))
	g := grpc.NewServer(options...)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	stop = sync.OnceFunc(func() { g.Stop(); <-done })
	s.t.Cleanup(stop)
	return stop
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// istiod closes each connection after half an hour, as gRPC servers do.
func TestMaxConnectionAgeIsInvisible(t *testing.T) {
	s := &server{t: t, streams: make(chan *stream), dir: t.TempDir()}
	s.write("token", []byte("secret"))
	l := listen(t, "127.0.0.1:0")
	s.serveOn(l, "istiod.test", grpc.KeepaliveParams(keepalive.ServerParameters{
		MaxConnectionAge: time.Second, MaxConnectionAgeGrace: 2 * time.Second}))
	a := newBook()
	var log logBook
	var answered atomic.Int32
	config := s.config(Subscription{typeA, a})
	config.Log, config.Answered = log.logger(), func() { answered.Add(1) }
	config.Dial = func(ctx context.Context, _ string) (net.Conn, error) { return dialTCP(ctx, l.Addr().String()) }
	r := start(t, config)
	want := map[string]string(nil)
	for n := range 2 {
		st := s.accept()
		st.want("what is held, and no more", &request{TypeUrl: typeA, InitialResourceVersions: want})
		st.send(&response{TypeUrl: typeA, Nonce: "1", Resources: []*resource{added("x", fmt.Sprint(n), fmt.Sprint("X", n))}})
		st.want("ack", &request{TypeUrl: typeA, ResponseNonce: "1"})
		want = map[string]string{"x": fmt.Sprint(n)}
		r.slept(t) // Nobody but the server ended it.
		a.want(t, "nothing is lost in between", map[string]string{"x": fmt.Sprint("X", n)})
	}
	if got := r.Stats().Terminations; got["Reconnect"]+got["Complete"] != 2 {
		t.Errorf("terminations = %v", got)
	}
	if lines := log.above(); len(lines) > 0 {
		t.Errorf("logged %q", lines)
	}
	if n := answered.Load(); n != 2 {
		t.Errorf("Answered was called %d times for 2 streams", n)
	}
}

// raw sends what it is given as the bytes of a message.
type raw struct{}

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}
func (raw) Name() string { return "proto" }

var _ encoding.CodecV2 = raw{}

// Whatever comes instead of an answer: one clear warning, what is held is kept,
// and the next attempt is served.
func TestGarbageFromIstiod(t *testing.T) {
	garble := func(messages ...[]byte) grpc.ServerOption {
		return grpc.StreamInterceptor(func(_ any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
			for _, m := range messages {
				if err := ss.SendMsg(m); err != nil {
					return err
				}
			}
			<-ss.Context().Done()
			return nil
		})
	}
	for name, tt := range map[string]struct {
		serve func(s *server, l net.Listener) (stop func())
		says  string
	}{
		"bytes instead of a message": {func(s *server, l net.Listener) func() {
			return s.serveOn(l, "istiod.test", grpc.ForceServerCodecV2(raw{}), garble([]byte("\xff\xff\xff\xff garbage")))
		}, "unmarshal"},
		"no TLS": {func(s *server, l net.Listener) func() {
			return s.play(l, func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) })
		}, "istiod.test"},
		"a hang-up": {func(s *server, l net.Listener) func() { return s.play(l, func(net.Conn) {}) }, "istiod.test"},
		"another service": {func(s *server, l net.Listener) func() {
			return s.serveOn(l, "istiod.test", grpc.StreamInterceptor(func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
				return status.Error(codes.Unimplemented, "unknown service")
			}))
		}, "unknown service"},
		"a refusal": {func(s *server, l net.Listener) func() {
			s.write("token", []byte("e30.eyJhdWQiOiJ2YXVsdCJ9.c2lnbmF0dXJl"))
			return s.serveOn(l, "istiod.test", grpc.StreamInterceptor(func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
				return status.Error(codes.Unauthenticated, "authentication failure")
			}))
		}, `authentication failure (the token is for audience \"vault\"`},
		"another server": {func(s *server, l net.Listener) func() { return s.serveOn(l, "other.test") }, "other.test"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{t: t, streams: make(chan *stream), dir: t.TempDir()}
			s.write("token", []byte("secret"))
			l := listen(t, "127.0.0.1:0")
			addr := l.Addr().String()
			stop := s.serveOn(l, "istiod.test")
			var log logBook
			a := newBook()
			config := s.config(Subscription{typeA, a})
			config.Log = log.logger()
			config.Dial = func(ctx context.Context, _ string) (net.Conn, error) { return dialTCP(ctx, addr) }
			r := start(t, config)
			st := s.accept()
			st.want("first", &request{TypeUrl: typeA})
			st.send(&response{TypeUrl: typeA, Nonce: "1", Resources: []*resource{added("x", "1", "X")}})
			st.want("ack", &request{TypeUrl: typeA, ResponseNonce: "1"})
			stop()
			stop = tt.serve(s, listen(t, addr))
			for range 5 {
				r.slept(t)
			}
			stop()
			a.want(t, "what is held is kept", map[string]string{"x": "X"})
			lines := log.above()
			named := 0
			for _, line := range lines {
				if strings.Contains(line, tt.says) {
					named++
				}
			}
			// The end of the first server, and that nobody listened in between, may be two more.
			if named == 0 || named > 1 && tt.says != "istiod.test" || !strings.Contains(lines[len(lines)-1], "istiod.test") {
				t.Errorf("%d of %d lines say %q: %q", named, len(lines), tt.says, lines)
			}
			s.serveOn(listen(t, addr), "istiod.test")
			for {
				select {
				case <-r.sleeps:
					continue
				case st = <-s.streams:
				case <-time.After(patience):
					t.Fatal("no stream with an istiod that is right again")
				}
				break
			}
			st.want("what is held", &request{TypeUrl: typeA, InitialResourceVersions: map[string]string{"x": "1"}})
		})
	}
}

// play hands each connection to a server that is none.
func (s *server) play(l net.Listener, serve func(net.Conn)) (stop func()) {
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
			_ = c.Close()
		}
	})
	return func() { _ = l.Close(); conns.Wait() }
}

func TestAddress(t *testing.T) {
	for given, want := range map[string]string{
		"istiod.istio-system.svc:15012":          "istiod.istio-system.svc:15012",
		"https://istiod.istio-system.svc:15012":  "istiod.istio-system.svc:15012",
		"https://istiod.istio-system.svc:15012/": "istiod.istio-system.svc:15012",
		"https://istiod.example.com":             "istiod.example.com:443",
		"https://[fd00::1]":                      "[fd00::1]:443",
		"https://[fd00::1]:15012":                "[fd00::1]:15012",
		"https://istiod:http":                    "",
		"https://":                               "",
		"istiod":                                 "",
		":15012":                                 "",
		"http://istiod:15012":                    "",
	} {
		c, err := New(Config{Address: given, RootCA: "SYSTEM", Subscriptions: []Subscription{{typeA, newBook()}}})
		switch {
		case want == "" && err == nil:
			t.Errorf("%s: taken as %s", given, c.config.Address)
		case want != "" && (err != nil || c.config.Address != want):
			t.Errorf("%s: %v, want %s", given, err, want)
		}
	}
}

// The name is asked for at each attempt, whatever its TTL: istiod may have moved.
func TestNameIsResolvedAtEachAttempt(t *testing.T) {
	names := istiodtest.UseNameserver(t, "istiod.istio-system.svc")
	s := &server{t: t, streams: make(chan *stream), dir: t.TempDir()}
	s.write("token", []byte("secret"))
	first := listen(t, "127.0.0.1:0")
	port := first.Addr().(*net.TCPAddr).Port
	stop := s.serveOn(first, "istiod.istio-system.svc")
	var log logBook
	config := s.config(Subscription{typeA, newBook()})
	config.Address, config.Log, config.Dial = fmt.Sprintf("https://istiod.istio-system.svc:%d", port), log.logger(), nil
	r := start(t, config)

	for range 3 {
		r.slept(t)
	}
	if r.isReady() || r.Stats().Terminations["ConnectionError"] < 3 {
		t.Errorf("without the name: ready %v, %v", r.isReady(), r.Stats().Terminations)
	}
	names.Set([4]byte{127, 0, 0, 1})
	st := next(t, r, s)
	st.want("first", &request{TypeUrl: typeA})
	st.send(&response{TypeUrl: typeA, Nonce: "1"})
	st.want("ack", &request{TypeUrl: typeA, ResponseNonce: "1"})
	asked := names.Queries.Load()

	second := listen(t, fmt.Sprintf("127.0.0.2:%d", port))
	s.serveOn(second, "istiod.istio-system.svc")
	names.Set([4]byte{127, 0, 0, 2})
	stop()
	next(t, r, s).want("from where it is now", &request{TypeUrl: typeA})
	if names.Queries.Load() == asked {
		t.Error("nobody was asked for the name again")
	}
}

func next(t *testing.T, r *run, s *server) *stream {
	t.Helper()
	for {
		select {
		case <-r.sleeps:
		case st := <-s.streams:
			return st
		case <-time.After(patience):
			t.Fatal("no stream was opened")
		}
	}
}

// What fails at the start, or goes on failing, is told once, and again later.
func TestLevels(t *testing.T) {
	c := &Client{began: time.Unix(1000, 0)}
	refused := errors.New(`lookup istiod: read udp 10.0.0.1:43210->10.0.0.2:53: i/o timeout`)
	again := errors.New(`lookup istiod: read udp 10.0.0.1:50000->10.0.0.2:53: i/o timeout`)
	for _, step := range []struct {
		at   time.Duration
		end  Termination
		err  error
		want slog.Level
	}{
		{0, ConnectionError, refused, slog.LevelInfo},
		{time.Second, ConnectionError, again, slog.LevelDebug},
		{2 * time.Second, Error, errors.New("unauthenticated"), slog.LevelDebug},
		{5 * time.Second, ConnectionError, again, slog.LevelWarn},
		{6 * time.Second, ConnectionError, refused, slog.LevelDebug},
		{7 * time.Second, Error, errors.New("unauthenticated"), slog.LevelWarn},
		{8 * time.Second, Error, errors.New("unauthenticated"), slog.LevelDebug},
		{8 * time.Second, ConnectionError, again, slog.LevelDebug},
		{9 * time.Second, Reconnect, io.EOF, slog.LevelInfo},
		{5 * time.Minute, Error, errors.New("unauthenticated"), slog.LevelDebug},
		{6 * time.Minute, Error, errors.New("unauthenticated"), slog.LevelWarn},
		{6 * time.Minute, ConnectionError, again, slog.LevelWarn},
		{7 * time.Minute, Complete, io.EOF, slog.LevelInfo},
	} {
		if got := c.level(step.end, step.err, c.began.Add(step.at)); got != step.want {
			t.Errorf("%v after %v: %v, want %v", step.err, step.at, got, step.want)
		}
	}
	c = &Client{began: time.Unix(1000, 0), answered: true}
	if got := c.level(Error, refused, c.began); got != slog.LevelWarn {
		t.Errorf("a stream that was answered, right after the start: %v, want a warning", got)
	}
}

// A failure after a success is another one, even if it says the same.
func TestFailureAfterASuccessIsTold(t *testing.T) {
	s := newServer(t)
	var log logBook
	config := s.config(Subscription{typeA, newBook()})
	config.Log = log.logger()
	r := start(t, config)
	for want := 1; want <= 3; want++ {
		st := s.accept()
		if _, err := st.s.Recv(); err != nil {
			t.Fatal(err)
		}
		st.send(&response{TypeUrl: typeA, Nonce: "1"})
		st.want("ack", &request{TypeUrl: typeA, ResponseNonce: "1"})
		for range 3 { // Told once for all three.
			st.end <- status.Error(codes.Internal, "boom")
			r.slept(t)
			if lines := log.above(); len(lines) != want {
				t.Errorf("logged %q, want %d lines", lines, want)
			}
			st = s.accept()
		}
		st.end <- nil
		r.slept(t)
	}
}

// The roots are a mounted ConfigMap, which Kubernetes swaps as a directory, and
// the token a projected volume, which it swaps alike.
func TestKubernetesSwapsTheDirectories(t *testing.T) {
	s := newServer(t)
	root, err := os.ReadFile(s.path("root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	v := istiodtest.NewVolume(t, "root-cert.pem", "istio-token")
	v.Swap(map[string]string{"root-cert.pem": string(root), "istio-token": "first"})
	var log logBook
	config := s.config(Subscription{typeA, newBook()})
	config.Log = log.logger()
	config.RootCA, config.Token = v.Path("root-cert.pem"), TokenFile(v.Path("istio-token"))
	r := start(t, config)
	for i, files := range []map[string]string{
		{"root-cert.pem": string(root), "istio-token": "second"},
		{"root-cert.pem": "garbage", "istio-token": "third"}, // The earlier roots serve on.
		{"root-cert.pem": "garbage", "istio-token": "fourth"},
		{"istio-token": "fifth"},
	} {
		st := next(t, r, s)
		if got, want := st.metadata().Get("authorization"), "Bearer "+[]string{"first", "second", "third", "fourth"}[i]; len(got) != 1 || got[0] != want {
			t.Errorf("authorization = %q, want %q", got, want)
		}
		v.Swap(files)
		st.end <- nil
	}
	next(t, r, s)
	lines := log.above()
	if len(lines) != 2 || !strings.Contains(lines[0], "no certificate in "+config.RootCA) || !strings.Contains(lines[1], "no such file") {
		t.Errorf("logged %q, want a line for the garbage and one for the missing file", lines)
	}
}
