package zds

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// serverTest is a server and the hand-driven proxies that it talks to. Each
// proxy is a process of its own: a child that lives until kill.
type serverTest struct {
	*testing.T
	server *Server
	path   string

	mu   sync.Mutex
	next *exec.Cmd // Who connects next.
}

func newServerTest(t *testing.T, standins ...Standin) *serverTest {
	l, path := listen(t)
	cfg := ServerConfig{}
	for _, s := range standins {
		cfg.Standin = s
	}
	st := &serverTest{T: t, server: NewServer(cfg), path: path}
	st.server.retry = 50 * time.Millisecond
	st.server.peer = st.peer
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = st.server.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-done })
	return st
}

// peer answers with the process that the test says connects.
func (st *serverTest) peer(conn *net.UnixConn) (*process, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.next == nil {
		return &process{}, nil // One that cannot be watched.
	}
	p := &process{pid: st.next.Process.Pid}
	fd, err := pidfdOpen(p.pid)
	if err != nil {
		return nil, err
	}
	p.adopt(fd)
	return p, nil
}

// process starts a child that stands for a proxy.
func (st *serverTest) process() *exec.Cmd {
	st.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		st.Fatal(err)
	}
	st.Cleanup(func() { kill(cmd) })
	return cmd
}

func kill(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// connect is a new connection from proc, before its hello. nil: from a
// process that cannot be watched.
func (st *serverTest) connect(proc *exec.Cmd) peer {
	st.Helper()
	st.mu.Lock()
	st.next = proc
	st.mu.Unlock()
	before := st.server.Proxies()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: st.path, Net: "unixpacket"})
	if err != nil {
		st.Fatal(err)
	}
	st.Cleanup(func() { _ = conn.Close() })
	eventually(st.T, "admitted", func() bool { return st.server.Proxies() > before })
	return peer{st.T, conn}
}

func (st *serverTest) greet(proc *exec.Cmd) peer {
	p := st.connect(proc)
	hello, err := encodeHello(hello{})
	if err != nil {
		st.Fatal(err)
	}
	p.send(hello)
	return p
}

// want reads one request, closes its device, and answers with text.
func (p peer) want(k kind, uid, text string) (inodeOf uint64) {
	p.t.Helper()
	msg, files, err := p.receive()
	if err != nil {
		p.t.Fatalf("waiting for %v %s: %v", k, uid, err)
	}
	r, err := decodeRequest(msg)
	if err != nil {
		p.t.Fatal(err)
	}
	if r.kind != k || r.workload.UID != uid {
		p.t.Fatalf("got %v %s, want %v %s", r.kind, r.workload.UID, k, uid)
	}
	if len(files) != r.files() {
		p.t.Fatalf("%v with %d files, want %d", r.kind, len(files), r.files())
	}
	if len(files) > 0 {
		inodeOf = inode(p.t, files[0])
	}
	closeAll(files)
	p.answer(text)
	return inodeOf
}

func (p peer) answer(text string) {
	p.t.Helper()
	msg, err := encodeResponse(response{text: text})
	if err != nil {
		p.t.Fatal(err)
	}
	p.send(msg)
}

// wantNothing checks that no request is on its way: a Del that is caused now
// is the next thing to come.
func (st *serverTest) wantNothing(p peer) {
	st.Helper()
	if err := st.server.Set(workload("marker"), Files{}); err != nil {
		st.Fatal(err)
	}
	st.server.mu.Lock()
	for _, c := range st.server.conns {
		c.told["marker"] = 0 // As if it had been told to keep it.
	}
	st.server.mu.Unlock()
	done := make(chan error, 1)
	go func() { done <- st.server.Delete(context.Background(), "marker") }()
	p.want(kindDel, "marker", "")
	if err := <-done; err != nil {
		st.Fatal(err)
	}
}

func (st *serverTest) set(uid string) uint64 {
	st.Helper()
	f := device(st.T)
	n := inode(st.T, f)
	keep, err := dup(f)
	if err != nil {
		st.Fatal(err)
	}
	if err := st.server.Set(fullWorkload(uid), Files{Device: keep}); err != nil {
		st.Fatal(err)
	}
	return n
}

func (st *serverTest) wantServed(uid string, want bool) {
	st.Helper()
	eventually(st.T, "served", func() bool { return st.server.State(uid).Served == want })
}

func TestServerSnapshotThenLive(t *testing.T) {
	st := newServerTest(t)
	ino := st.set("u1")
	if s := st.server.State("u1"); !errors.Is(s.Err, ErrNoProxy) || s.Served || !s.Device {
		t.Errorf("state without a proxy = %+v", s)
	}
	p := st.greet(st.process())
	if got := p.want(kindAdd, "u1", ""); got != ino {
		t.Errorf("sent inode %d, want %d", got, ino)
	}
	p.want(kindSnapshotSent, "", "")
	st.wantServed("u1", true)
	st.set("u2")
	p.want(kindAdd, "u2", "")
	done := make(chan error, 1)
	go func() { done <- st.server.Delete(context.Background(), "u1") }()
	p.want(kindDel, "u1", "")
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := st.server.State("u1"); s.Set {
		t.Errorf("state after delete = %+v", s)
	}
}

func TestServerKeepsWithoutDevice(t *testing.T) {
	st := newServerTest(t)
	if err := st.server.Set(fullWorkload("u"), Files{}); err != nil {
		t.Fatal(err)
	}
	p := st.greet(st.process())
	p.want(kindKeep, "u", "")
	p.want(kindSnapshotSent, "", "")
	st.wantServed("u", true)
	st.set("u") // The device could be opened again.
	p.want(kindAdd, "u", "")
}

// TestServerOneReader: a device goes to a second proxy only when the first has
// ended, whatever becomes of its connection.
func TestServerOneReader(t *testing.T) {
	st := newServerTest(t)
	ino := st.set("u")
	first, second := st.process(), st.process()
	a := st.greet(first)
	a.want(kindAdd, "u", "")
	a.want(kindSnapshotSent, "", "")

	b := st.greet(second)
	b.want(kindKeep, "u", "")
	b.want(kindSnapshotSent, "", "")
	st.set("u2") // A new pod goes to the latest.
	b.want(kindAdd, "u2", "")

	_ = a.conn.Close() // Its process lives, and may be reading.
	eventually(t, "disconnected", func() bool { return st.server.Proxies() == 1 })
	st.wantNothing(b)

	a = st.greet(first) // It comes back, and is told of its pod again.
	for range 2 {
		msg, files, err := a.receive()
		if err != nil {
			t.Fatal(err)
		}
		r, _ := decodeRequest(msg)
		switch {
		case r.kind == kindAdd && r.workload.UID == "u" && len(files) == 1:
			closeAll(files)
		case r.kind == kindKeep && r.workload.UID == "u2":
		default:
			t.Fatalf("the first proxy is told %v %s", r.kind, r.workload.UID)
		}
		a.answer("")
	}
	a.want(kindSnapshotSent, "", "")

	kill(first)
	// Which older flows are left must be known before another proxy forwards them.
	eventually(t, "stale", func() bool { return st.server.State("u").Stale })
	st.wantNothing(b)
	if ok, err := st.server.Update(fullWorkload("u")); !ok || err != nil {
		t.Fatalf("Update = %v, %v", ok, err)
	}
	if got := b.want(kindAdd, "u", ""); got != ino {
		t.Errorf("the second proxy got inode %d, want %d", got, ino)
	}
	st.wantServed("u", true)
}

func TestServerUnwatchableProcessEndsWithItsConnection(t *testing.T) {
	st := newServerTest(t)
	st.set("u")
	a := st.greet(nil)
	a.want(kindAdd, "u", "")
	a.want(kindSnapshotSent, "", "")
	b := st.greet(nil)
	b.want(kindKeep, "u", "")
	b.want(kindSnapshotSent, "", "")
	_ = a.conn.Close()
	eventually(t, "stale", func() bool { return st.server.State("u").Stale })
	if _, err := st.server.Update(fullWorkload("u")); err != nil {
		t.Fatal(err)
	}
	b.want(kindAdd, "u", "")
}

func TestServerDeletesEverywhere(t *testing.T) {
	st := newServerTest(t)
	st.set("u")
	a, b := st.greet(st.process()), peer{}
	a.want(kindAdd, "u", "")
	a.want(kindSnapshotSent, "", "")
	b = st.greet(st.process())
	b.want(kindKeep, "u", "")
	b.want(kindSnapshotSent, "", "")
	done := make(chan error, 1)
	go func() { done <- st.server.Delete(context.Background(), "u") }()
	a.want(kindDel, "u", "")
	select {
	case err := <-done:
		t.Fatalf("Delete returned %v before every proxy had answered", err)
	default:
	}
	b.want(kindDel, "u", "")
	if err := <-done; err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := st.server.Delete(ctx, "nobody"); err != nil {
		t.Errorf("Delete of an unknown uid = %v", err)
	}
}

func TestServerUpdateAndNack(t *testing.T) {
	st := newServerTest(t)
	st.set("u")
	p := st.greet(st.process())
	p.want(kindAdd, "u", "no room")
	p.want(kindSnapshotSent, "", "")
	eventually(t, "refused", func() bool {
		s := st.server.State("u")
		return !s.Served && s.Err != nil && strings.Contains(s.Err.Error(), "no room")
	})
	p.want(kindAdd, "u", "") // Asked again: it cannot tell us by itself.
	st.wantServed("u", true)

	w := fullWorkload("u")
	w.Device.BypassInbound = false
	if ok, err := st.server.Update(w); !ok || err != nil {
		t.Fatalf("Update = %v, %v", ok, err)
	}
	p.want(kindAdd, "u", "")
	st.wantServed("u", true)
	if ok, err := st.server.Update(workload("nobody")); ok || err != nil {
		t.Errorf("Update of an unknown uid = %v, %v", ok, err)
	}
}

// TestServerSendsICMPSockets: after the device, in order, as often as it is
// sent; to a peer that knows only Istio's fields the message means one.
func TestServerSendsICMPSockets(t *testing.T) {
	st := newServerTest(t)
	want := []uint64{}
	open := func(n int) Files {
		var list []*os.File
		for range n {
			f := device(t)
			d, err := dup(f)
			if err != nil {
				t.Fatal(err)
			}
			_ = f.Close()
			want = append(want, inode(t, d))
			list = append(list, d)
		}
		return filesOf(list, false)
	}
	set := func(w Workload, n int) {
		t.Helper()
		want = want[:0]
		if err := st.server.Set(w, open(n)); err != nil {
			t.Fatal(err)
		}
	}
	p := st.greet(nil)
	p.want(kindSnapshotSent, "", "")
	expect := func(why string, n int) {
		t.Helper()
		msg, files, err := p.receive()
		if err != nil {
			t.Fatal(err)
		}
		r, err := decodeRequest(msg)
		if err != nil || r.files() != n || len(files) != n {
			t.Fatalf("%s: message of %d descriptors with %d, %v, want %d", why, r.files(), len(files), err, n)
		}
		for i, f := range files {
			if got := inode(t, f); got != want[i] {
				t.Errorf("%s: descriptor %d is inode %d, want %d", why, i, got, want[i])
			}
		}
		closeAll(files)
		p.answer("")
	}
	set(fullWorkload("u"), 3)
	expect("both families", 3)
	w := fullWorkload("u")
	w.Device.BypassInbound = false
	if ok, err := st.server.Update(w); !ok || err != nil {
		t.Fatalf("Update = %v, %v", ok, err)
	}
	expect("told again of the same device", 3)
	set(w, 2)
	expect("one family", 2)
	set(w, 1)
	expect("none", 1)
	set(workload("u"), 3)
	expect("without a description", 1)
	st.wantServed("u", true)
	eventually(t, "the server holds three descriptors", func() bool { return descriptorsOf(t, want) == 3 })
	if err := st.server.Set(fullWorkload("v"), open(4)); err == nil {
		t.Error("three ICMP sockets were taken")
	}
	if err := st.server.Set(fullWorkload("v"), Files{ICMP: []*os.File{}}); err != nil {
		t.Errorf("no files: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- st.server.Delete(context.Background(), "u") }()
	p.want(kindDel, "u", "")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	eventually(t, "after Delete the server holds none", func() bool { return descriptorsOf(t, want) == 0 })
}

// TestServerRetriesWhatItCouldNotSend: out of descriptors for a moment.
func TestServerRetriesWhatItCouldNotSend(t *testing.T) {
	st := newServerTest(t)
	p := st.greet(st.process())
	p.want(kindSnapshotSent, "", "")
	broken := device(t)
	_ = broken.Close()
	if err := st.server.Set(fullWorkload("u"), Files{Device: broken}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an error", func() bool { return st.server.State("u").Err != nil })
	st.server.mu.Lock()
	st.server.pods["u"].files.Device = device(t)
	st.server.mu.Unlock()
	p.want(kindAdd, "u", "")
	st.wantServed("u", true)
}

func TestServerDropsBadProxies(t *testing.T) {
	hello, _ := encodeHello(hello{})
	ack, _ := encodeResponse(response{})
	for _, tt := range []struct {
		name string
		do   func(*testing.T, peer)
	}{
		{"hangs up", func(t *testing.T, p peer) { _ = p.conn.Close() }},
		{"no hello", func(t *testing.T, p peer) { p.send(ack) }},
		{"hello of another version", func(t *testing.T, p peer) { p.send([]byte{0x08, 0x02}) }},
		{"hello with a descriptor", func(t *testing.T, p peer) { p.send(hello, device(t)) }},
		{"long hello", func(t *testing.T, p peer) { p.send(make([]byte, 4096)) }},
		{"answer to nothing", func(t *testing.T, p peer) {
			p.send(hello)
			p.want(kindSnapshotSent, "", "")
			p.send(ack)
		}},
		{"garbage for an answer", func(t *testing.T, p peer) {
			p.send(hello)
			if _, _, err := p.receive(); err != nil {
				t.Fatal(err)
			}
			p.send([]byte{0xff})
		}},
		{"answer with a descriptor", func(t *testing.T, p peer) {
			p.send(hello)
			if _, _, err := p.receive(); err != nil {
				t.Fatal(err)
			}
			p.send(ack, device(t))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := newServerTest(t)
			p := st.connect(st.process())
			tt.do(t, p)
			eventually(t, "dropped", func() bool { return st.server.Proxies() == 0 })
		})
	}
}

func TestServerBoundsConnections(t *testing.T) {
	st := newServerTest(t)
	st.server.mu.Lock()
	for range maxConns {
		st.server.conns = append(st.server.conns, newServerConn(st.server, nil, &process{}))
	}
	st.server.mu.Unlock()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: st.path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer{t, conn}.wantClosed("one too many")
	st.server.mu.Lock()
	st.server.conns = nil
	st.server.mu.Unlock()
}

// TestClientAndServer lets the real ones talk, through the loss of either.
func TestClientAndServer(t *testing.T) {
	starter := &starter{}
	_, path := func() (*net.UnixListener, string) { l, p := listen(t); _ = l.Close(); return l, p }()
	client := NewClient(ClientConfig{Socket: path, Starter: starter})
	cctx, stopClient := context.WithCancel(context.Background())
	clientDone := make(chan struct{})
	go func() { defer close(clientDone); _ = client.Run(cctx) }()
	defer func() {
		stopClient()
		<-clientDone
		for _, p := range client.Pods() {
			p.Proxy.Stop()
		}
	}()

	serve := func(set ...Workload) (*Server, func()) {
		_ = os.Remove(path)
		l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		s := NewServer(ServerConfig{})
		for _, w := range set { // Before the snapshot, which alone says Keep.
			if err := s.Set(w, Files{}); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(ctx, l) }()
		return s, func() { cancel(); <-done }
	}
	s, stop := serve()
	dev := device(t)
	keep, err := dup(dev)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Set(fullWorkload("u"), Files{Device: keep}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "served", func() bool { return s.State("u").Served })
	if got := s.State("u").Reader; got != os.Getpid() {
		t.Errorf("reader = %d, want this process, %d", got, os.Getpid())
	}
	stop()
	if err := s.Set(fullWorkload("late"), Files{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Set on a closed server = %v", err)
	}

	// The agent's next life: it cannot open the device, so it says Keep.
	s, stop = serve(fullWorkload("u"))
	eventually(t, "kept", func() bool { return s.State("u").Served })
	if starts, stops := starter.counts(); starts != 1 || stops != 0 {
		t.Errorf("%d starts and %d stops, want 1 and 0", starts, stops)
	}
	if err := s.Delete(context.Background(), "u"); err != nil {
		t.Fatal(err)
	}
	// A Del within the snapshot is obeyed at its end.
	eventually(t, "stopped after Delete", func() bool { _, stops := starter.counts(); return stops == 1 })
	if _, err := dev.Seek(0, io.SeekStart); err != nil {
		t.Errorf("the caller's own descriptor: %v", err)
	}
	stop()
}
