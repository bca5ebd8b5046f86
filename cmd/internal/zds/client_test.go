package zds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	mu     sync.Mutex
	fail   error
	files  map[string]Files // Of the running pods, by UID.
	starts int
	stops  int
	// updates makes every pod an Updater, which takes no change if fixed.
	updates, fixed bool
	changes        int
}

type startedPod struct {
	s     *starter
	uid   string
	files Files
}

func (s *starter) Start(w Workload, files Files) (Proxy, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		files.Close()
		return nil, s.fail
	}
	if s.files[w.UID].Device != nil {
		panic("two at once")
	}
	if s.files == nil {
		s.files = map[string]Files{}
	}
	s.files[w.UID] = files
	s.starts++
	p := startedPod{s, w.UID, files}
	if s.updates {
		return changingPod{p}, nil
	}
	return p, nil
}

// changingPod is an Updater.
type changingPod struct{ startedPod }

func (p changingPod) Update(Workload) error {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.s.changes++
	if p.s.fixed {
		return errors.New("no such change")
	}
	return nil
}

// changed makes every pod an Updater from now on, and says of how many changes
// they were told since it was called last.
func (s *starter) changed(fixed bool) (told int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	told, s.changes = s.changes, 0
	s.updates, s.fixed = true, fixed
	return told
}

func (p startedPod) Stop() {
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	delete(p.s.files, p.uid)
	p.s.stops++
	p.files.Close()
}

func (s *starter) setFail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *starter) device(uid string) *os.File { return s.filesOf(uid).Device }

func (s *starter) filesOf(uid string) Files {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.files[uid]
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
	msg, files, err := p.receive()
	if err != nil || len(files) > 0 {
		ct.Fatalf("hello: %v, %d files", err, len(files))
	}
	if _, err := decodeHello(msg); err != nil {
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

// addWith is an add of a device that so many ICMP sockets follow.
func addWith(uid string, icmp int) request {
	r := addOf(uid)
	r.icmp = icmp
	return r
}

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

	p = ct.accept()
	p.request(addOf("again"), device(t))
	p.wantOK("the same add")
	if !ct.ready.Load() || !ct.client.Stats().Connected {
		t.Errorf("connected again: ready %v, %+v", ct.ready.Load(), ct.client.Stats())
	}
	ct.wantRunning("after the agent was away", "again", "deleted", "gone", "kept")
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

// TestClientReadinessOutlivesAgent: it changes with what an agent says, not with
// its being there.
func TestClientReadinessOutlivesAgent(t *testing.T) {
	ct := newClientTest(t)
	p := ct.accept()
	ct.snapshot(p)
	ct.wantReady("no pods", true)
	ct.starter.setFail(errors.New("no room"))
	p.request(addOf("u"), device(t))
	_ = p.wantAck("add")
	ct.wantReady("a pod that is not served", false)
	_ = p.conn.Close()
	p = ct.accept()
	ct.wantReady("the agent has not said yet that the pod is gone", false)
	ct.snapshot(p)
	ct.wantReady("it is", true)
	_ = p.conn.Close()
	p = ct.accept()
	p.request(addOf("u"), device(t))
	_ = p.wantAck("add")
	ct.wantReady("within the snapshot", true)
	ct.snapshot(p)
	ct.wantReady("the pod is not served", false)
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

// TestClientUpdatesPod: what needs no other device cuts nothing.
func TestClientUpdatesPod(t *testing.T) {
	ct := newClientTest(t)
	ct.starter.changed(false)
	p := ct.accept()
	last := addOf("u").workload
	p.request(addOf("u"), device(t))
	p.wantOK("add")
	for _, tt := range []struct {
		why     string
		change  func(*Workload)
		refuse  bool
		updates bool
		starts  bool
	}{
		{why: "the same"},
		{why: "addresses of the node", change: func(w *Workload) { w.Device.NodeAddresses = nil }, updates: true},
		{why: "an address", change: func(w *Workload) { w.Device.Addresses = w.Device.Addresses[:1] }, updates: true},
		{why: "settings", change: func(w *Workload) { w.Device.BypassInbound, w.Device.ProbePorts = false, nil }, updates: true},
		{why: "what it cannot take", change: func(w *Workload) { w.Device.VirtualInterfaces = false }, refuse: true, updates: true, starts: true},
		{why: "another device", change: func(w *Workload) { w.Device.ID = "two" }, starts: true},
		{why: "another way to read it", change: func(w *Workload) { w.Device.Offload = !w.Device.Offload }, starts: true},
		{why: "another account", change: func(w *Workload) { w.ServiceAccount = "other" }, starts: true},
	} {
		ct.starter.changed(tt.refuse)
		before, _ := ct.starter.counts()
		d := *last.Device
		last.Device = &d
		if tt.change != nil {
			tt.change(&last)
		}
		dev := device(t)
		p.request(request{kind: kindAdd, workload: last}, dev)
		p.wantOK(tt.why)
		told := ct.starter.changed(false)
		if starts, _ := ct.starter.counts(); (starts > before) != tt.starts || (told > 0) != tt.updates {
			t.Errorf("%s: %d starts, told of %d changes", tt.why, starts-before, told)
		}
		want := 1 // The test's.
		if tt.starts {
			want = 2
		}
		if got := descriptorsOf(t, []uint64{inode(t, dev)}); got != want {
			t.Errorf("%s: %d descriptors of the device, want %d", tt.why, got, want)
		}
		if pods := ct.client.Pods(); len(pods) != 1 || !pods[0].Workload.Equal(last) {
			t.Errorf("%s: it is described as %+v", tt.why, pods)
		}
	}
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

// levels counts log lines by level.
type levels struct {
	slog.Handler
	warn, debug int
}

func (*levels) Enabled(context.Context, slog.Level) bool { return true }
func (l *levels) WithAttrs([]slog.Attr) slog.Handler     { return l }
func (l *levels) Handle(_ context.Context, r slog.Record) error {
	switch r.Level {
	case slog.LevelWarn:
		l.warn++
	case slog.LevelDebug:
		l.debug++
	}
	return nil
}

// TestClientOutOfDescriptors: a pod that could not even be tried is pending as
// any other that could not be started, and each reason is told once.
func TestClientOutOfDescriptors(t *testing.T) {
	st, log := &starter{}, &levels{}
	c := NewClient(ClientConfig{Starter: st, Log: slog.New(log)})
	closed := device(t)
	_ = closed.Close() // Cannot be duplicated.
	if err := c.add(fullWorkload("u"), Files{Device: closed}); err == nil {
		t.Fatal("a pod was started on a closed file")
	}
	for range 3 {
		c.retryPending()
	}
	if p := c.Pods(); len(p) != 1 || p[0].Err == nil || p[0].Proxy != nil {
		t.Fatalf("pods = %+v, want one pending", p)
	}
	st.setFail(errors.New("no room"))
	keep, err := dup(device(t))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.add(fullWorkload("u"), Files{Device: keep})
	for range 3 {
		c.retryPending()
	}
	if log.warn != 2 || log.debug != 3 {
		t.Errorf("%d warnings and %d lines at debug for two reasons in five attempts", log.warn, log.debug)
	}
	st.setFail(nil)
	c.retryPending()
	if p := c.Pods(); len(p) != 1 || p[0].Proxy == nil || c.Stats().Pending != 0 {
		t.Fatalf("pods = %+v, want one running", p)
	}
	c.stop("u")
}

// TestClientProtocolErrors: each is answered, then the connection ends and a
// new one comes; pods go on, and no descriptor is left open.
func TestClientProtocolErrors(t *testing.T) {
	f, f2, f3, f4, f5 := device(t), device(t), device(t), device(t), device(t)
	raw := func(msg []byte, files ...*os.File) func(peer) { return func(p peer) { p.send(msg, files...) } }
	add := func(r request) []byte {
		msg, err := encodeRequest(r)
		if err != nil {
			t.Fatal(err)
		}
		return msg
	}
	addMsg, stock := add(addOf("u")), add(request{kind: kindAdd, workload: workload("u")})
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
		{"add without a descriptor", raw(addMsg), "add u with 0 descriptors, not 1"},
		{"add with a descriptor too many", raw(addMsg, f, f2), "add u with 2 descriptors, not 1"},
		{"stock add with a descriptor too many", raw(stock, f, f2), "with 2 descriptors, not 1"},
		{"announced sockets are missing", raw(add(addWith("u", 2)), f), "with 1 descriptors, not 3"},
		{"an announced socket is missing", raw(add(addWith("u", 2)), f, f2), "with 2 descriptors, not 3"},
		{"a socket more than announced", raw(add(addWith("u", 1)), f, f2, f3), "with 3 descriptors, not 2"},
		{"only the device is missing", raw(add(addWith("u", 2)), f2, f3), "with 2 descriptors, not 3"},
		{"more descriptors than any message has", raw(add(addWith("u", 2)), f, f2, f3, f4, f5), "more than 4"},
		{"del with a descriptor", raw(delMsg, f), "with 1 descriptors, not 0"},
		{"snapshot sent with descriptors", raw(sentMsg, f, f2, f3), "with 3 descriptors, not 0"},
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
			eventually(t, "no descriptor is left", func() bool { return openFiles(t) == before })
			_ = p.conn.Close()
		})
	}
}

// TestClientTakesICMPSockets: they come in the order in which they were sent,
// and on every way that ends without a pod they are closed with the device.
func TestClientTakesICMPSockets(t *testing.T) {
	ct := newClientTest(t)
	p := ct.accept()
	dev, v4, v6 := device(t), device(t), device(t)
	before := openFiles(t)
	// The client closes what it no longer needs after it has answered, or said
	// hello, as the scheduler likes.
	files := func(n int, why string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s: %d descriptors are open", why, n), func() bool { return openFiles(t)-before == n })
	}
	p.request(addWith("u", 2), dev, v4, v6)
	p.wantOK("add with both")
	got := ct.starter.filesOf("u")
	if len(got.ICMP) != 2 || inode(t, got.Device) != inode(t, dev) ||
		inode(t, got.ICMP[0]) != inode(t, v4) || inode(t, got.ICMP[1]) != inode(t, v6) {
		t.Fatalf("the pod got %+v", got)
	}
	files(3, "running")
	p.request(addWith("u", 2), dev, v4, v6)
	p.wantOK("the same again")
	files(3, "running as described")
	r := addWith("u", 1)
	r.workload.Device.ID = "two"
	p.request(r, dev, v6)
	p.wantOK("another device, one family")
	files(2, "with one socket")

	ct.starter.setFail(errors.New("no room"))
	p.request(addWith("v", 2), dev, v4, v6)
	_ = p.wantAck("a pod that does not start")
	files(2+3, "pending")
	p.request(request{kind: kindDel, workload: Workload{UID: "v"}})
	p.wantOK("del of a pending pod")
	files(2, "the pending pod is gone")
	p.request(addWith("v", 2), dev, v4, v6)
	_ = p.wantAck("a pod that does not start")
	_ = p.conn.Close()
	before-- // That connection.
	p = ct.accept()
	before++
	files(2, "a new connection forgets what was pending")

	ct.starter.setFail(errors.New("no room"))
	p.request(addWith("v", 2), dev, v4, v6)
	_ = p.wantAck("a pod that does not start")
	ct.starter.setFail(nil)
	eventually(t, "the pod starts after all", func() bool { return len(ct.starter.filesOf("v").ICMP) == 2 })
	ct.snapshot(p) // Without u.
	eventually(t, "u stopped", func() bool { return ct.starter.device("u") == nil })
	files(3, "retried")
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
