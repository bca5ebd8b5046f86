package main

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/tun/netnstest"
)

// A generation is a proxy that was replaced.
type generation struct {
	*exec.Cmd
	exited chan struct{}
}

// next starts another proxy beside the one that runs, in a namespace of its
// own, as a rolling update does, and returns the one that ran.
func (n *node) next(env ...string) generation {
	n.Helper()
	old := generation{n.proxy, n.exited}
	n.Cleanup(func() { _ = old.Process.Kill(); <-old.exited })
	home := netnstest.New(n.T, "next")
	relay := home.Listen("tcp", "127.0.0.1:15012") // The control plane's.
	go func() {
		for {
			c, err := relay.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				d, err := n.ns.Dial("tcp", "127.0.0.1:15012", patience)
				if err != nil {
					return
				}
				defer d.Close()
				go func() { _, _ = io.Copy(d, c); _ = d.(*net.TCPConn).CloseWrite() }()
				_, _ = io.Copy(c, d)
			}()
		}
	}()
	n.home = home
	n.startProxy(env...)
	return old
}

// load is a constant load from pa to pb, and what came of it.
type load struct {
	n       *node
	stop    chan struct{}
	wg      sync.WaitGroup
	fresh   atomic.Int64 // Requests on connections of their own.
	kept    atomic.Int64 // Requests on connections that last.
	bytes   atomic.Int64 // Echoed on one connection and compared.
	mu      sync.Mutex
	worst   time.Duration // That a request took.
	failure []error
}

func (l *load) fail(what string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = append(l.failure, fmt.Errorf("%s: %w", what, err))
}

func (l *load) took(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.worst = max(l.worst, d)
}

// run calls f until the end of the load, and then done.
func (l *load) run(what string, f func() error, done func()) {
	l.wg.Go(func() {
		defer done()
		for {
			select {
			case <-l.stop:
				return
			default:
			}
			start := time.Now()
			if err := f(); err != nil {
				l.fail(what, err)
				return
			}
			l.took(time.Since(start))
		}
	})
}

func startLoad(n *node) *load {
	l := &load{n: n, stop: make(chan struct{})}
	for i := range 2 {
		l.run("a new connection", func() error {
			c, err := n.pa.Dial("tcp", "10.1.0.12:8080", patience)
			if err != nil {
				return err
			}
			defer c.Close()
			defer l.fresh.Add(1)
			return echo(c, "fresh")
		}, func() {})
		c := n.connect()
		l.run("an old connection", func() error {
			defer l.kept.Add(1)
			defer time.Sleep(time.Duration(i) * 3 * time.Millisecond) // One is often idle.
			return echo(c, strings.Repeat("kept", 1+i*500))
		}, func() { _ = c.Close() })
	}
	c := n.connect()
	random := rand.New(rand.NewPCG(1, 2))
	sent, got := make([]byte, 200<<10), make([]byte, 200<<10)
	l.run("the long-lived connection", func() error {
		for i := range sent {
			sent[i] = byte(random.Uint32())
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		wrote := make(chan error, 1)
		go func() { _, err := c.Write(sent); wrote <- err }()
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if !bytes.Equal(sent, got) {
			return fmt.Errorf("bytes differ after %d", l.bytes.Load())
		}
		l.bytes.Add(int64(len(sent)))
		return <-wrote
	}, func() { _ = c.Close() })
	return l
}

// more waits until every kind of request has been made a few more times.
func (l *load) more() {
	l.n.Helper()
	fresh, kept, bytes := l.fresh.Load(), l.kept.Load(), l.bytes.Load()
	eventually(l.n.T, "the load goes on", func() bool {
		l.mu.Lock()
		failed := len(l.failure) > 0
		l.mu.Unlock()
		return failed || l.fresh.Load() > fresh+20 && l.kept.Load() > kept+20 && l.bytes.Load() > bytes
	})
}

func (l *load) end() {
	l.n.Helper()
	close(l.stop)
	l.wg.Wait()
	for _, err := range l.failure {
		l.n.Errorf("failed: %v", err)
	}
	l.n.Logf("%d requests on new connections, %d on old ones, %d bytes compared on one; %d failed; the slowest took %v",
		l.fresh.Load(), l.kept.Load(), l.bytes.Load(), len(l.failure), l.worst)
}

// TestRolloutCutsNothing: two rollouts under load. Each old proxy gets its
// SIGTERM as soon as the next one is ready, and lasts as long as a connection of
// its own or of an older one.
func TestRolloutCutsNothing(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *node) {
		env := []string{"CONNECTION_TERMINATION_DEADLINE=60s"}
		n.startProxy(env...)
		l := startLoad(n)
		l.more()
		var old []generation
		for range 2 {
			g := n.next(env...)
			old = append(old, g)
			if err := g.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			l.more()
			n.wantTaken()
			l.more()
		}
		for _, g := range old {
			select {
			case <-g.exited:
				t.Error("a proxy has ended before its connections")
			default:
			}
		}
		l.end()
		for i, g := range old {
			select {
			case <-g.exited:
			case <-time.After(patience):
				t.Fatalf("generation %d does not end", i+1)
			}
			if code := g.ProcessState.ExitCode(); code != 0 {
				t.Errorf("generation %d: exit code %d", i+1, code)
			}
		}
		n.wantNewConnection("of the last proxy")
		n.signal(syscall.SIGTERM)
		n.wantExit("nothing is left")
	})
}

// wantTaken waits until the latest proxy serves both pods.
func (n *node) wantTaken() {
	n.Helper()
	eventually(n.T, "the latest proxy serves both pods", func() bool {
		_, text, err := n.http("GET", "15020", "/metrics")
		return err == nil && strings.Contains(text, "workload_manager_active_proxy_count 2.0")
	})
}

// TestSuccessorThatDies leaves the device to the proxy before it, though the
// agent that handed it over is another one by then; and the next one takes over
// from that.
func TestSuccessorThatDies(t *testing.T) {
	n := newNode(t)
	env := []string{"CONNECTION_TERMINATION_DEADLINE=60s"}
	n.startProxy(env...)
	first := n.connect()
	n.wantEcho("of the first proxy", first)
	g1 := n.next(env...)
	n.wantTaken()
	second := n.connect()
	n.wantEcho("of the first proxy, through the second", first)
	n.wantEcho("of the second proxy", second)

	n.stopAgent()
	n.wantEcho("of the first proxy, without an agent", first)
	n.startAgent()
	eventually(t, "the agent has the devices again", func() bool {
		return !slices.ContainsFunc(n.agent.Status(), func(s agent.Status) bool { return !s.Held })
	})
	n.wantEcho("of the first proxy, with another agent", first)
	n.wantNewConnection("of the second proxy, with another agent")

	n.kill()
	n.wantEcho("of the first proxy, which reads again", first)
	n.wantNewConnection("of the first proxy, which reads again")
	if err := echo(second, "gone"); err == nil {
		t.Error("a connection survived its proxy")
	}

	// Told to end it takes new connections too while nobody else is there.
	n.next(env...)
	n.wantTaken()
	if err := g1.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first proxy drains", func() bool { return strings.Contains(n.log.String(), "the next proxy takes over") })
	n.kill()
	n.wantEcho("of the first proxy, which is about to end and reads again", first)
	n.wantNewConnection("of the first proxy, which is about to end and reads again")

	n.next(env...)
	n.wantTaken()
	n.wantEcho("of the first proxy, through the third", first)
	n.wantNewConnection("of the third proxy")
	_ = first.Close()
	select {
	case <-g1.exited:
	case <-time.After(patience):
		t.Error("the first proxy does not end")
	}
	n.wantNewConnection("of the third proxy alone")
}
