package h2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/ztun/ztun/tunnel/splice"
	"github.com/ztun/ztun/tunnel/splice/splicetest"
)

const interopTimeout = 30 * time.Second

// listen serves every connection to a loopback port until the test ends.
func listen(t testing.TB, serve func(net.Conn)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return l.Addr().String()
}

// An interopServer is our server on a loopback port: echo, or a refusal by the
// authority.
type interopServer struct {
	loop  *splicetest.Loop
	addr  string
	conns []*Conn // owned by loop
}

func startServer(t testing.TB, cfg Config) *interopServer {
	srv := &interopServer{loop: splicetest.NewLoop()}
	t.Cleanup(srv.loop.Close)
	cfg.OnStream = srv.stream
	srv.addr = listen(t, func(c net.Conn) {
		srv.loop.Do(func() {
			conn := New(srv.loop, newNetEnd(srv.loop, c), &cfg)
			srv.conns = append(srv.conns, conn)
		})
	})
	t.Cleanup(func() {
		srv.loop.Do(func() {
			for _, c := range srv.conns {
				c.Close(nil)
				c.release(ErrClosed)
			}
		})
	})
	return srv
}

func (srv *interopServer) stream(s *Stream, r Request) {
	switch {
	case strings.HasPrefix(r.Authority, "refused"):
		s.Respond(Response{Status: 401, EndStream: true, Headers: []Header{{Name: "proxy-status", Value: "ztun; error=x"}}})
		s.Close()
	case strings.HasPrefix(r.Authority, "reset"):
		s.Respond(Response{Status: 200})
		s.Reset(io.ErrUnexpectedEOF)
	case strings.HasPrefix(r.Authority, "first"):
		s.Respond(Response{Status: 200})
		s.Write([]byte("hello"))
		s.CloseWrite()
		sink(s, nil)
	default:
		s.Respond(Response{Status: 200, Headers: []Header{{Name: "baggage", Value: "b"}}})
		echo(s)
	}
}

// echo sends back what it gets, with back-pressure, and half-closes.
func echo(s *Stream) {
	var pending []byte
	buf := make([]byte, 64<<10)
	eof := false
	s.Notify(func() {
		for {
			n, err := s.Write(pending)
			if pending = pending[n:]; len(pending) > 0 {
				if !errors.Is(err, splice.ErrAgain) {
					s.Close()
				}
				return
			}
			if eof {
				s.CloseWrite()
				s.Close()
				return
			}
			n, err = s.Read(buf)
			pending = buf[:n]
			switch {
			case err == io.EOF:
				eof = true
			case errors.Is(err, splice.ErrAgain):
				return
			case err != nil:
				s.Close()
				return
			}
		}
	})
}

// sink reads to the end and closes.
func sink(s *Stream, done func([]byte, error)) {
	var all []byte
	buf := make([]byte, 64<<10)
	s.Notify(func() {
		for {
			n, err := s.Read(buf)
			all = append(all, buf[:n]...)
			if errors.Is(err, splice.ErrAgain) {
				return
			}
			if err != nil {
				s.Close()
				if done != nil {
					done(all, err)
					done = nil
				}
				return
			}
		}
	})
}

// An interopClient is our client connected to addr.
type interopClient struct {
	t      testing.TB
	loop   *splicetest.Loop
	conn   *Conn
	closed chan error
	away   chan struct{}

	// noEnd is for a peer that does not pass on a half-close: the stream is
	// given up once everything came back.
	noEnd bool
}

func startClient(t testing.TB, addr string, cfg Config) *interopClient {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	cl := &interopClient{t: t, loop: splicetest.NewLoop(), closed: make(chan error, 1), away: make(chan struct{}, 1)}
	cfg.Client = true
	cfg.OnClose = func(err error) { cl.closed <- err }
	cfg.OnGoAway = func() { cl.away <- struct{}{} }
	cl.loop.Do(func() { cl.conn = New(cl.loop, newNetEnd(cl.loop, nc), &cfg) })
	t.Cleanup(func() {
		cl.loop.Do(func() { cl.conn.Close(nil); cl.conn.release(ErrClosed) })
		cl.loop.Close()
	})
	return cl
}

type result struct {
	response Response
	data     []byte
	err      error
}

// exchange opens a stream, sends data once it is accepted, half-closes and
// reads to the end.
func (cl *interopClient) exchange(authority string, data []byte) result {
	cl.t.Helper()
	done := make(chan result, 1)
	cl.loop.Do(func() {
		var s *Stream
		var err error
		s, err = cl.conn.Open(Request{Authority: authority}, func(r Response, err error) {
			if err != nil || r.Status != 200 {
				done <- result{response: r, err: err}
				s.Close()
				return
			}
			cl.talk(s, data, func(got []byte, err error) { done <- result{r, got, err} })
		})
		if err != nil {
			done <- result{err: err}
		}
	})
	select {
	case r := <-done:
		return r
	case <-time.After(interopTimeout):
		cl.t.Errorf("%s: no end", authority)
		return result{}
	}
}

func (cl *interopClient) talk(s *Stream, data []byte, done func([]byte, error)) {
	buf, want := make([]byte, 64<<10), len(data)
	var got []byte
	sent := false
	s.Notify(func() {
		for !sent {
			n, err := s.Write(data)
			if data = data[n:]; len(data) == 0 {
				sent = true
				if !cl.noEnd {
					s.CloseWrite()
				}
			} else if !errors.Is(err, splice.ErrAgain) {
				sent = true
			} else {
				break
			}
		}
		for {
			n, err := s.Read(buf)
			got = append(got, buf[:n]...)
			if cl.noEnd && len(got) == want {
				err = io.EOF
			}
			if errors.Is(err, splice.ErrAgain) {
				return
			}
			if err != nil {
				s.Close()
				done(got, err)
				return
			}
		}
	})
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func (r result) wantEcho(t testing.TB, data []byte) {
	t.Helper()
	if r.response.Status != 200 || r.err != io.EOF || sha256.Sum256(r.data) != sha256.Sum256(data) {
		t.Errorf("status %d, %d bytes of %d, %v", r.response.Status, len(r.data), len(data), r.err)
	}
}

// goServer is Go's own HTTP/2 server as a CONNECT proxy that echoes.
func goServer(t testing.TB) (addr string) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method != http.MethodConnect:
			w.WriteHeader(400)
		case strings.HasPrefix(r.Host, "refused"):
			w.Header().Set("Proxy-Status", "go; error=x")
			w.WriteHeader(503)
		case strings.HasPrefix(r.Host, "reset"):
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		default:
			rc := http.NewResponseController(w)
			w.WriteHeader(200)
			rc.Flush()
			buf := make([]byte, 32<<10)
			for {
				n, err := r.Body.Read(buf)
				if w.Write(buf[:n]); err != nil {
					return
				}
				rc.Flush()
			}
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: http2Only(), HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 50}}
	var serving sync.WaitGroup
	serving.Go(func() { s.Serve(l) })
	t.Cleanup(func() { s.Close(); serving.Wait() })
	return l.Addr().String()
}

// http2Only is HTTP/2 without TLS and without an upgrade.
func http2Only() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

func TestClientWithGoServer(t *testing.T) {
	cl := startClient(t, goServer(t), Config{})
	t.Run("echo", func(t *testing.T) {
		data := random(8 << 20)
		cl.exchange("a:1", data).wantEcho(t, data)
	})
	t.Run("refusal", func(t *testing.T) {
		r := cl.exchange("refused:1", nil)
		if r.response.Status != 503 || r.response.Header("proxy-status") != "go; error=x" || r.err != nil {
			t.Errorf("%+v", r)
		}
	})
	t.Run("reset", func(t *testing.T) {
		if r := cl.exchange("reset:1", nil); !errors.Is(r.err, splice.ErrReset) {
			t.Errorf("%+v", r)
		}
	})
	t.Run("many streams", func(t *testing.T) {
		var all sync.WaitGroup
		for i := range 40 {
			all.Go(func() {
				data := random(100000 + i)
				cl.exchange("a:1", data).wantEcho(t, data)
			})
		}
		all.Wait()
		var slots int
		cl.loop.Do(func() { slots = cl.conn.Slots() })
		if slots != 50 {
			t.Errorf("%d slots, want what the server announced", slots)
		}
	})
}

// goClient is Go's own HTTP/2 client over plain TCP.
func goClient(t testing.TB) *http.Transport {
	tr := &http.Transport{Protocols: http2Only()}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func goConnect(tr *http.Transport, addr, authority string, body io.Reader) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(context.Background(), interopTimeout)
	context.AfterFunc(ctx, cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "http://"+addr, body)
	if err != nil {
		return nil, err
	}
	req.Host = authority
	return tr.RoundTrip(req)
}

func TestServerWithGoClient(t *testing.T) {
	srv := startServer(t, Config{})
	tr := goClient(t)
	exchange := func(t *testing.T, data []byte) {
		t.Helper()
		resp, err := goConnect(tr, srv.addr, "a:1", bytes.NewReader(data))
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 || resp.Header.Get("Baggage") != "b" || err != nil || !bytes.Equal(got, data) {
			t.Errorf("status %d, %d bytes of %d, %v", resp.StatusCode, len(got), len(data), err)
		}
	}
	t.Run("echo", func(t *testing.T) { exchange(t, random(8<<20)) })
	t.Run("many streams", func(t *testing.T) {
		var all sync.WaitGroup
		for i := range 150 {
			all.Go(func() { exchange(t, random(30000+i)) })
		}
		all.Wait()
	})
	t.Run("server speaks first and the client later", func(t *testing.T) {
		pr, pw := io.Pipe()
		resp, err := goConnect(tr, srv.addr, "first:1", pr)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if string(got) != "hello" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		pw.Close()
		resp.Body.Close()
	})
	t.Run("refusal", func(t *testing.T) {
		resp, err := goConnect(tr, srv.addr, "refused:1", bytes.NewReader(nil))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != 401 || resp.Header.Get("Proxy-Status") != "ztun; error=x" {
			t.Errorf("%v", resp)
		}
	})
	t.Run("reset", func(t *testing.T) {
		resp, err := goConnect(tr, srv.addr, "reset:1", bytes.NewReader(nil))
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		var se http2.StreamError
		if !errors.As(err, &se) || se.Code != http2.ErrCodeConnect {
			t.Errorf("error %v, want CONNECT_ERROR", err)
		}
	})
	t.Run("get", func(t *testing.T) {
		resp, err := (&http.Client{Transport: tr, Timeout: interopTimeout}).Get("http://" + srv.addr + "/")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 400 {
			t.Errorf("status %d", resp.StatusCode)
		}
	})
	t.Run("goaway", func(t *testing.T) {
		srv.loop.Do(func() {
			for _, c := range srv.conns {
				c.GoAway()
			}
		})
		exchange(t, []byte("on a new connection, or just in time"))
	})
}

func TestOurClientWithOurServer(t *testing.T) {
	srv := startServer(t, Config{})
	cl := startClient(t, srv.addr, Config{})
	data := random(32 << 20)
	cl.exchange("a:1", data).wantEcho(t, data)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			data := random(50000 + i)
			cl.exchange("a:1", data).wantEcho(t, data)
		})
	}
	all.Wait()
	srv.loop.Do(srv.conns[0].GoAway)
	select {
	case err := <-cl.closed:
		if err != nil {
			t.Errorf("closed with %v", err)
		}
	case <-time.After(interopTimeout):
		t.Error("not closed")
	}
}

// tool finds a program of nghttp2. CI must have it.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		msg := name + " is not installed: apt-get install nghttp2-client nghttp2-proxy nghttp2-server"
		if os.Getenv("CI") == "true" {
			t.Fatal(msg)
		}
		t.Skip(msg)
	}
	return path
}

// nghttpx starts nghttp2's proxy between addr and the server at backend, HTTP/2
// without TLS on both sides.
func nghttpx(t *testing.T, backend string) (addr string) {
	t.Helper()
	path := tool(t, "nghttpx")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr = l.Addr().String()
	l.Close()
	comma := func(addr string) string { return strings.Replace(addr, ":", ",", 1) }
	cmd := exec.Command(path, "--http2-proxy", "--conf=/dev/null", "--workers=1", "--single-process",
		"--frontend="+comma(addr)+";no-tls", "--backend="+comma(backend)+";;proto=h2", "--errorlog-file=/dev/stderr", "--accesslog-file=/dev/null", "--log-level=ERROR")
	var log bytes.Buffer
	cmd.Stderr, cmd.Stdout = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("nghttpx: %s", log.Bytes())
		}
	})
	for deadline := time.Now().Add(interopTimeout); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatalf("nghttpx does not listen: %v", err)
		}
	}
}

// nghttp2 is the other end of both our roles here: client, nghttpx, server.
// nghttpx (1.52) passes on neither a half-close nor a reset of a tunnel.
func TestBothRolesWithNghttpx(t *testing.T) {
	srv := startServer(t, Config{})
	cl := startClient(t, nghttpx(t, srv.addr), Config{})
	cl.noEnd = true
	t.Run("echo", func(t *testing.T) {
		data := random(8 << 20)
		cl.exchange("10.0.0.2:8080", data).wantEcho(t, data)
	})
	t.Run("many streams", func(t *testing.T) {
		var all sync.WaitGroup
		for i := range 80 {
			all.Go(func() {
				data := random(60000 + i)
				cl.exchange(fmt.Sprintf("10.0.0.2:%d", 1000+i), data).wantEcho(t, data)
			})
		}
		all.Wait()
	})
	t.Run("refusal", func(t *testing.T) {
		r := cl.exchange("refused:1", nil)
		if r.response.Status != 401 || r.response.Header("proxy-status") != "ztun; error=x" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("server speaks first and ends", func(t *testing.T) {
		if r := cl.exchange("first:1", make([]byte, 100)); string(r.data) != "hello" || r.err != io.EOF {
			t.Errorf("%+v", r)
		}
	})
}

func TestServerAnswersNghttp(t *testing.T) {
	srv := startServer(t, Config{})
	out, err := exec.Command(tool(t, "nghttp"), "-nv", "--timeout=20", "http://"+srv.addr+"/").CombinedOutput()
	if err != nil {
		t.Logf("nghttp: %v", err)
	}
	for _, want := range []string{
		"[SETTINGS_MAX_CONCURRENT_STREAMS(0x03):200]", "[SETTINGS_MAX_FRAME_SIZE(0x05):1048576]", "(window_size_increment=16711681)",
		":status: 400",
	} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("output lacks %q", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}

func TestServerUnderH2load(t *testing.T) {
	srv := startServer(t, Config{})
	out, err := exec.Command(tool(t, "h2load"), "-n", "900", "-c", "3", "-m", "50", "-T", "20", "http://"+srv.addr+"/").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("status codes: 0 2xx, 0 3xx, 900 4xx, 0 5xx")) {
		t.Errorf("h2load: %v\n%s", err, out)
	}
}
