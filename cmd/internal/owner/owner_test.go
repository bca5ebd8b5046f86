package owner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var question = Question{Node: netip.MustParseAddrPort("10.0.0.254:40000"), App: netip.MustParseAddrPort("10.0.0.1:8080"), Pod: "uid"}

// agent is a server that runs.
type agent struct {
	*Server
	socket string
	stop   func()
}

func newAgent(t *testing.T, socket string, cfg ServerConfig) *agent {
	t.Helper()
	_ = os.Remove(socket)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{Server: NewServer(cfg), socket: socket}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Serve(ctx, l) }()
	var once sync.Once
	a.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("Serve returned %v", err)
			}
		})
	}
	t.Cleanup(a.stop)
	return a
}

func newClient(t *testing.T, socket string) *Client {
	t.Helper()
	c := NewClient(socket)
	c.patience = 20 * time.Second // No test waits for it.
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { _ = c.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return c
}

type answer struct {
	owner Owner
	err   error
}

func (c *Client) get(q Question) answer {
	got := make(chan answer, 1)
	c.Ask(q, func(o Owner, err error) { got <- answer{o, err} })
	return <-got
}

func (c *Client) want(t *testing.T, q Question, o Owner, err error) {
	t.Helper()
	if got := c.get(q); got.owner != o || !errors.Is(got.err, err) {
		t.Errorf("%+v: %v, %v, want %v, %v", q, got.owner, got.err, o, err)
	}
}

func socketOf(t *testing.T) string { return filepath.Join(t.TempDir(), SocketName) }

// owners says who owns a connection by the node's port.
func owners(node, _ netip.AddrPort) (Owner, error) {
	if node.Port() >= 10 {
		return Kubelet, errors.New("no netlink today")
	}
	return Owner(node.Port()), nil
}

func from(port uint16) Question {
	q := question
	q.Node = netip.AddrPortFrom(q.Node.Addr(), port)
	return q
}

func TestAnswers(t *testing.T) {
	var log strings.Builder
	a := newAgent(t, socketOf(t), ServerConfig{Of: owners, UID: os.Getuid(), Log: slog.New(slog.NewTextHandler(&log, nil))})
	c := newClient(t, a.socket)
	for o := None; o <= Unknown; o++ {
		c.want(t, from(uint16(o)), o, nil)
	}
	c.want(t, from(10), None, ErrAway)
	q6 := Question{Node: netip.MustParseAddrPort("[fd00::fe]:2"), App: netip.MustParseAddrPort("[fd00::1]:80"), Pod: strings.Repeat("x", maxUID)}
	c.want(t, q6, Kubelet, nil)
	q6.Pod += "x"
	c.want(t, q6, None, ErrRefused)
	c.want(t, Question{}, None, ErrRefused)
	a.stop()
	if st := a.Stats(); fmt.Sprint(st.Answers) != "map[failed:1 kubelet:2 local:1 none:1 unknown:1]" || st.Refused != 0 {
		t.Errorf("%+v", st)
	}
	if strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), "no netlink today") {
		t.Errorf("log: %s", log.String())
	}
}

func TestNothingIsSaidOfOtherPods(t *testing.T) {
	asked := 0
	a := newAgent(t, socketOf(t), ServerConfig{
		UID: os.Getuid(),
		Of:  func(netip.AddrPort, netip.AddrPort) (Owner, error) { asked++; return Kubelet, nil },
		Addresses: func(uid string) []netip.Addr {
			if uid == "uid" {
				return []netip.Addr{netip.MustParseAddr("fd00::1"), question.App.Addr()}
			}
			return nil
		},
	})
	c := newClient(t, a.socket)
	c.want(t, question, Kubelet, nil)
	other := question
	other.Pod = "other"
	c.want(t, other, None, nil)
	other = question
	other.App = netip.MustParseAddrPort("10.0.0.2:8080")
	c.want(t, other, None, nil)
	a.stop()
	if asked != 1 {
		t.Errorf("the kernel was asked %d times", asked)
	}
}

func TestAgentThatIsAway(t *testing.T) {
	socket := socketOf(t)
	c := newClient(t, socket)
	c.want(t, question, None, ErrAway)
	for range 3 {
		a := newAgent(t, socket, ServerConfig{Of: owners, UID: os.Getuid()})
		for range 2 * askers { // Every connection, old ones too.
			c.want(t, from(2), Kubelet, nil)
		}
		a.stop()
		c.want(t, from(2), None, ErrAway)
	}
}

// hungAgent accepts and says what it is told, or nothing.
func hungAgent(t *testing.T, socket string, says []byte) {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = l.Close() })
	wg.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				buf := make([]byte, maxQuestion)
				for {
					if _, err := conn.Read(buf); err != nil {
						return
					}
					if says != nil {
						_, _ = conn.Write(says)
					}
				}
			})
		}
	})
}

func TestAgentThatHangs(t *testing.T) {
	socket := socketOf(t)
	hungAgent(t, socket, nil)
	c := NewClient(socket)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { _ = c.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	if got := c.get(question); !errors.Is(got.err, ErrAway) || !errors.Is(got.err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", got)
	}
	// Nobody waits for it now.
	if got := c.get(question); got.err != ErrAway {
		t.Errorf("%v", got)
	}
	c.mu.Lock()
	c.hung = c.hung.Add(-hungFor)
	c.mu.Unlock()
	if got := c.get(question); !errors.Is(got.err, os.ErrDeadlineExceeded) {
		t.Errorf("not asked again: %v", got)
	}
}

func TestAgentThatTalksNonsense(t *testing.T) {
	for _, says := range []string{"\x01", "\x02\x02", "\x01\x04", "\x01\x02\x03"} {
		socket := socketOf(t)
		hungAgent(t, socket, []byte(says))
		newClient(t, socket).want(t, question, None, ErrAway)
	}
}

func TestTooManyQuestions(t *testing.T) {
	socket := socketOf(t)
	release := make(chan struct{})
	a := newAgent(t, socket, ServerConfig{UID: os.Getuid(), Of: func(netip.AddrPort, netip.AddrPort) (Owner, error) { <-release; return Kubelet, nil }})
	c := newClient(t, a.socket)
	got := make(chan answer, maxWaiting+askers+1)
	for range maxWaiting + askers + 1 {
		c.Ask(question, func(o Owner, err error) { got <- answer{o, err} })
	}
	// The last one, at least, found no room, and was told at once.
	if first := <-got; first.err != ErrBusy {
		t.Fatalf("%+v while nothing is answered", first)
	}
	busy := 1
	close(release)
	for range maxWaiting + askers {
		switch a := <-got; {
		case a.err == ErrBusy:
			busy++
		case a.err != nil || a.owner != Kubelet:
			t.Errorf("%+v", a)
		}
	}
	if busy > askers+1 {
		t.Errorf("%d of %d found no room", busy, maxWaiting+askers+1)
	}
}

func TestWhatIsAskedAtTheEndIsAway(t *testing.T) {
	c := NewClient(socketOf(t))
	got := make(chan answer, 1)
	c.Ask(question, func(o Owner, err error) { got <- answer{o, err} })
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	if a := <-got; !errors.Is(a.err, ErrAway) {
		t.Errorf("%+v", a)
	}
	if a := c.get(question); a.err != ErrAway {
		t.Errorf("%+v", a)
	}
}

func TestServerHangsUpOnNonsense(t *testing.T) {
	good, err := question.append(nil)
	if err != nil {
		t.Fatal(err)
	}
	a := newAgent(t, socketOf(t), ServerConfig{Of: owners, UID: os.Getuid()})
	mixed := append([]byte{}, good...)
	copy(mixed[1:], make([]byte, 10)) // The node's end is no IPv4 address any more.
	mixed[3] = 0xfd
	for name, b := range map[string][]byte{
		"short": good[:uidAt], "version": append([]byte{2}, good[1:]...), "long": append(good, make([]byte, maxQuestion)...), "families": mixed,
	} {
		conn, err := net.Dial("unixpacket", a.socket)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 9)); err != io.EOF {
			t.Errorf("%s: %d bytes, %v, want the end", name, n, err)
		}
		_ = conn.Close()
	}
	newClient(t, a.socket).want(t, from(2), Kubelet, nil)
}

// Only the proxy's user may ask; root, as which we run, is another.
func TestOthersAreTurnedAway(t *testing.T) {
	a := NewServer(ServerConfig{Of: owners, UID: os.Getuid() + 1})
	if err := asUser(t, a, os.Getuid()+1, os.Getuid()+1); err != nil {
		t.Errorf("the proxy's: %v", err)
	}
	if err := asUser(t, a, os.Getuid()+1, os.Getuid()); err != nil {
		t.Errorf("our own: %v", err)
	}
	if err := asUser(t, a, os.Getuid()+1, os.Getuid()+2); err == nil || !strings.Contains(err.Error(), "user") {
		t.Errorf("another's: %v", err)
	}
	if st := a.Stats(); st.Refused != 1 {
		t.Errorf("%+v", st)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	a := newAgent(t, socketOf(t), ServerConfig{Of: owners, UID: os.Getuid()})
	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	good, _ := from(2).append(nil)
	for i := range maxConns + 1 {
		conn, err := net.Dial("unixpacket", a.socket)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, conn)
		_, _ = conn.Write(good)
		_, err = conn.Read(make([]byte, 9))
		if (err == nil) != (i < maxConns) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
	_ = open[0].Close()
	c := newClient(t, a.socket)
	for c.get(from(2)).err != nil { // Until its end is noticed.
	}
}

func FuzzQuestion(f *testing.F) {
	b, _ := question.append(nil)
	f.Add(b)
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseAnswer(b)
		q, err := parseQuestion(b)
		if err != nil {
			return
		}
		again, err := q.append(nil)
		if err != nil || string(again) != string(b) {
			t.Fatalf("% x became % x, %v", b, again, err)
		}
	})
}
