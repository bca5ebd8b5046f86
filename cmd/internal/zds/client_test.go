package zds

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// starter starts pods that do nothing but exist.
type starter struct {
	mu      sync.Mutex
	fail    error
	devices map[string]*os.File // Of the running pods, by UID.
	starts  int
	stops   int
}

type startedPod struct {
	s   *starter
	uid string
	f   *os.File
}

func (s *starter) Start(w Workload, device *os.File) (Proxy, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		_ = device.Close()
		return nil, s.fail
	}
	if s.devices[w.UID] != nil {
		panic("two at once")
	}
	if s.devices == nil {
		s.devices = map[string]*os.File{}
	}
	s.devices[w.UID] = device
	s.starts++
	return startedPod{s, w.UID, device}, nil
}

func (p startedPod) Stop() {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	delete(p.s.devices, p.uid)
	p.s.stops++
	_ = p.f.Close()
}

func (s *starter) setFail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *starter) device(uid string) *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.devices[uid]
}

func (s *starter) counts() (starts, stops int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.starts, s.stops
}

// clientTest is a client and the hand-driven agent that it talks to.
type clientTest struct {
	*testing.T
	listener *net.UnixListener
	client   *Client
	starter  *starter
	ready    atomic.Bool
}

func newClientTest(t *testing.T) *clientTest {
	l, path := listen(t)
	ct := &clientTest{T: t, listener: l, starter: &starter{}}
	ct.client = NewClient(ClientConfig{Socket: path, Starter: ct.starter, Ready: ct.ready.Store})
	ct.client.retry = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = ct.client.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		for _, p := range ct.client.Pods() {
			if p.Proxy != nil {
				p.Proxy.Stop()
			}
		}
	})
	return ct
}

// accept waits for the client and its hello.
func (ct *clientTest) accept() peer {
	ct.Helper()
	_ = ct.listener.SetDeadline(time.Now().Add(patience))
	conn, err := ct.listener.AcceptUnix()
	if err != nil {
		ct.Fatal(err)
	}
	ct.Cleanup(func() { _ = conn.Close() })
	p := peer{ct.T, conn}
	msg, file, err := p.receive()
	if err != nil || file != nil {
		ct.Fatalf("hello: %v, file %v", err, file)
	}
	if err := decodeHello(msg); err != nil {
		ct.Fatal(err)
	}
	return p
}

func (ct *clientTest) snapshot(p peer) {
	ct.Helper()
	p.request(request{kind: kindSnapshotSent})
	p.wantOK("snapshot sent")
}

func (ct *clientTest) wantRunning(why string, uids ...string) {
	ct.Helper()
	var got []string
	for _, p := range ct.client.Pods() {
		if p.Proxy != nil {
			got = append(got, p.Workload.UID)
		}
	}
	if strings.Join(got, " ") != strings.Join(uids, " ") {
		ct.Fatalf("%s: running %q, want %q", why, got, uids)
	}
}

func (ct *clientTest) wantReady(why string, want bool) {
	ct.Helper()
	eventually(ct.T, why, func() bool { return ct.ready.Load() == want })
}

func addOf(uid string) request { return request{kind: kindAdd, workload: fullWorkload(uid)} }

func TestClientServesSnapshot(t *testing.T) {
	ct := newClientTest(t)
	p := ct.accept()
	f := device(t)
	p.request(addOf("u1"), f)
	p.wantOK("add")
	ct.wantRunning("added", "u1")
	if ct.ready.Load() {
		t.Error("ready before the end of the snapshot")
	}
	if got, want := inode(t, ct.starter.device("u1")), inode(t, f); got != want {
		t.Errorf("the pod got inode %d, want %d", got, want)
	}
	ct.snapshot(p)
	ct.wantReady("after the snapshot", true)

	p.request(addOf("u2"), device(t))
	p.wantOK("live add")
	ct.wantRunning("two", "u1", "u2")
	p.request(request{kind: kindDel, workload: Workload{UID: "u1"}})
	p.wantOK("del")
	p.request(request{kind: kindDel, workload: Workload{UID: "nobody"}})
	p.wantOK("del of an unknown uid")
	ct.wantRunning("after del", "u2")
	if s := ct.client.Stats(); s.Active != 1 || s.Started != 2 || s.Stopped != 1 || s.Pending != 0 {
		t.Errorf("stats = %+v", s)
	}
}

func TestClientKeepsPodsOverReconnect(t *testing.T) {
	ct := newClientTest(t)
	p := ct.accept()
	for _, uid := range []string{"again", "kept", "gone", "deleted"} {
		p.request(addOf(uid), device(t))
		p.wantOK("add")
	}
	ct.snapshot(p)
	ct.wantReady("first connection", true)
	_ = p.conn.Close()
	ct.wantReady("disconnected", false)
	ct.wantRunning("while disconnected", "again", "deleted", "gone", "kept")

	p = ct.accept()
	p.request(addOf("again"), device(t))
	p.wantOK("the same add")
	p.request(request{kind: kindKeep, workload: Workload{UID: "kept"}})
	p.wantOK("keep")
	p.request(request{kind: kindKeep, workload: Workload{UID: "never seen"}})
	_ = p.wantAck("keep of a bad name") // A protocol error: names have no spaces.
	p.wantClosed("after a protocol error")
	ct.wantRunning("after a protocol error", "again", "deleted", "gone", "kept")

	p = ct.accept()
	p.request(addOf("again"), device(t))
	p.wantOK("the same add")
	p.request(request{kind: kindKeep, workload: Workload{UID: "kept"}})
	p.wantOK("keep")
	p.request(request{kind: kindKeep, workload: Workload{UID: "unknown"}})
	p.wantOK("keep of an unknown uid")
	p.request(request{kind: kindKeep, workload: Workload{UID: "deleted"}})
	p.wantOK("keep")
	p.request(request{kind: kindDel, workload: Workload{UID: "deleted"}})
	p.wantOK("del within the snapshot")
	ct.wantRunning("before the end of the snapshot", "again", "deleted", "gone", "kept")
	ct.snapshot(p)
	ct.wantRunning("reconciled", "again", "kept")
	if starts, stops := ct.starter.counts(); starts != 4 || stops != 2 {
		t.Errorf("%d starts and %d stops, want 4 and 2: a pod was touched", starts, stops)
	}
}

func TestClientReplacesPod(t *testing.T) {
	ct := newClientTest(t)
	p := ct.accept()
	p.request(addOf("u"), device(t))
	p.wantOK("add")
	for why, change := range map[string]func(*Device){
		"another device": func(d *Device) { d.ID = "two" },
		"other flags":    func(d *Device) { d.ID, d.BypassInbound = "two", false },
		"no id":          func(d *Device) { d.ID = "" },
	} {
		r := addOf("u")
		change(r.workload.Device)
		before, _ := ct.starter.counts()
		p.request(r, device(t))
		p.wantOK(why)
		starts, stops := ct.starter.counts()
		if starts != before+1 || stops != before {
			t.Errorf("%s: %d starts and %d stops, want %d and %d", why, starts, stops, before+1, before)
		}
	}
	ct.wantRunning("one is left", "u")
}

func TestClientRetriesPending(t *testing.T) {
	ct := newClientTest(t)
	ct.starter.setFail(errors.New("no room"))
	p := ct.accept()
	p.request(addOf("u"), device(t))
	if text := p.wantAck("add"); !strings.Contains(text, "failure to start proxy") || !strings.Contains(text, "no room") {
		t.Errorf("nack = %q", text)
	}
	ct.snapshot(p)
	if s := ct.client.Stats(); s.Pending != 1 || ct.ready.Load() {
		t.Errorf("stats = %+v, ready %v", s, ct.ready.Load())
	}
	ct.starter.setFail(nil)
	ct.wantReady("tried again", true)
	ct.wantRunning("tried again", "u")
}

func TestClientDropsPending(t *testing.T) {
	ct := newClientTest(t)
	ct.starter.setFail(errors.New("no room"))
	p := ct.accept()
	for _, uid := range []string{"deleted", "replaced"} {
		p.request(addOf(uid), device(t))
		_ = p.wantAck("add")
	}
	p.request(request{kind: kindDel, workload: Workload{UID: "deleted"}})
	p.wantOK("del before the snapshot clears pending")
	ct.starter.setFail(nil)
	good := device(t)
	r := addOf("replaced")
	r.workload.Device.ID = "good"
	p.request(r, good)
	p.wantOK("a good device for a pending uid")
	ct.snapshot(p)
	ct.wantReady("nothing is pending", true)
	ct.wantRunning("one", "replaced")
	if got, want := inode(t, ct.starter.device("replaced")), inode(t, good); got != want {
		t.Errorf("serves inode %d, want %d", got, want)
	}
	_ = p.conn.Close()
	p = ct.accept() // A new connection forgets what was pending.
	if s := ct.client.Stats(); s.Pending != 0 {
		t.Errorf("stats = %+v", s)
	}
	_ = p.conn.Close()
}

// TestClientProtocolErrors: each is answered, then the connection ends and a
// new one comes; pods go on, and no descriptor is left open.
func TestClientProtocolErrors(t *testing.T) {
	f, f2 := device(t), device(t)
	raw := func(msg []byte, files ...*os.File) func(peer) { return func(p peer) { p.send(msg, files...) } }
	addMsg, err := encodeRequest(addOf("u"))
	if err != nil {
		t.Fatal(err)
	}
	delMsg, _ := encodeRequest(request{kind: kindDel, workload: Workload{UID: "u"}})
	keepMsg, _ := encodeRequest(request{kind: kindKeep, workload: Workload{UID: "u"}})
	sentMsg, _ := encodeRequest(request{kind: kindSnapshotSent})
	twice := func(msg []byte) func(peer) {
		return func(p peer) {
			p.send(sentMsg)
			p.wantOK("snapshot")
			p.send(msg)
		}
	}
	for _, tt := range []struct {
		name string
		do   func(peer)
		want string
	}{
		{"add without a descriptor", raw(addMsg), "without a descriptor"},
		{"add with two descriptors", raw(addMsg, f, f2), "more than one"},
		{"del with a descriptor", raw(delMsg, f), "with a descriptor"},
		{"snapshot sent with a descriptor", raw(sentMsg, f), "with a descriptor"},
		{"garbage", raw([]byte{0xff, 0xff}), "request"},
		{"garbage with a descriptor", raw([]byte{0xff, 0xff}, f), "request"},
		{"an unknown payload", raw([]byte{0x22, 0x00}), "no payload"},
		{"too long", raw(make([]byte, maxPacket+1)), "longer"},
		{"no workload info", raw([]byte{0x0a, 0x03, 0x0a, 0x01, 'u'}, f), "no workload info"},
		{"a second snapshot", twice(sentMsg), "after the snapshot"},
		{"keep after the snapshot", twice(keepMsg), "after the snapshot"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ct := newClientTest(t)
			p := ct.accept()
			r := addOf("runs")
			p.request(r, f)
			p.wantOK("add")
			before := openFiles(t)
			tt.do(p)
			if text := p.wantAck("nack"); !strings.Contains(text, tt.want) {
				t.Errorf("nack = %q, want one that says %q", text, tt.want)
			}
			p.wantClosed("after the nack")
			_ = p.conn.Close()
			ct.wantRunning("after the error", "runs")
			p = ct.accept()
			if after := openFiles(t); after != before {
				t.Errorf("%d descriptors are open, %d were before", after, before)
			}
			_ = p.conn.Close()
		})
	}
}

func TestClientWaitsForSocket(t *testing.T) {
	l, path := listen(t)
	_ = l.Close() // Removes it.
	st := &starter{}
	c := NewClient(ClientConfig{Socket: path, Starter: st})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	defer func() { cancel(); <-done }()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ct := &clientTest{T: t, listener: l, client: c, starter: st}
	_ = ct.accept()
}

func TestClientDescriptorIsCloseOnExec(t *testing.T) {
	ct := newClientTest(t)
	p := ct.accept()
	p.request(addOf("u"), device(t))
	p.wantOK("add")
	flags, err := getfd(ct.starter.device("u"))
	if err != nil || flags&1 == 0 {
		t.Errorf("descriptor flags = %#x, %v, want FD_CLOEXEC", flags, err)
	}
}

func TestBackoff(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // wait does not wait.
	b := backoff{min: connectBackoffMin}
	var got []time.Duration
	for range 12 {
		b.wait(ctx)
		got = append(got, b.next)
	}
	if got[0] != 20*time.Millisecond || got[1] != 40*time.Millisecond || got[11] != 15*time.Second {
		t.Errorf("waits %v, want 20ms doubling to 15s", got)
	}
	b.reset()
	b.wait(ctx)
	if b.next != 20*time.Millisecond {
		t.Errorf("after reset %v", b.next)
	}
}
