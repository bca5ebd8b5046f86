package zds

import (
	"context"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ours is a proxy of ztun, driven by hand.
type ours struct {
	peer
	proc *exec.Cmd
}

// greetAs connects a proxy of ztun that started at that moment.
func (st *serverTest) greetAs(proc *exec.Cmd, started uint64, leaving bool) ours {
	st.Helper()
	p := st.connect(proc)
	msg, err := encodeHello(hello{ztun: true, started: started, leaving: leaving})
	if err != nil {
		st.Fatal(err)
	}
	p.send(msg)
	return ours{p, proc}
}

// gets reads one request, answers with text, and returns it and its files.
func (p peer) gets(k kind, uid, text string) (request, Files) {
	p.t.Helper()
	msg, files, err := p.receive()
	if err != nil {
		p.t.Fatalf("waiting for %v %s: %v", k, uid, err)
	}
	r, err := decodeRequest(msg)
	if err != nil || r.kind != k || r.workload.UID != uid || r.files() != len(files) {
		p.t.Fatalf("got %v %s with %d files, %v, want %v %s", r.kind, r.workload.UID, len(files), err, k, uid)
	}
	f := filesOf(files, r.predecessor)
	p.t.Cleanup(f.Close)
	p.answer(text)
	return r, f
}

// plainWorkload has no older flows, which would have to be looked at first.
func plainWorkload(uid string) Workload {
	w := fullWorkload(uid)
	w.Device.OlderFlows = nil
	return w
}

func (st *serverTest) setPlain(uid string) {
	st.Helper()
	f, err := dup(device(st.T))
	if err != nil {
		st.Fatal(err)
	}
	if err := st.server.Set(plainWorkload(uid), Files{Device: f}); err != nil {
		st.Fatal(err)
	}
}

// isOpen reports whether somebody has the other end of a packet socket.
func isOpen(f *os.File) bool {
	open := false
	_ = withFDs([]*os.File{f}, nil, func(fds []int) error {
		pfd := []unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}}
		_, err := unix.Poll(pfd, 0)
		open = err == nil && pfd[0].Revents&(unix.POLLHUP|unix.POLLIN) == 0
		return nil
	})
	return open
}

// wantConnected checks that what one writes the other reads.
func wantConnected(t *testing.T, a, b *os.File) {
	t.Helper()
	if _, err := a.Write([]byte("packet")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 16)
	if n, err := b.Read(got); err != nil || string(got[:n]) != "packet" {
		t.Fatalf("read %q, %v", got[:n], err)
	}
}

func (st *serverTest) wantReader(why, uid string, proc *exec.Cmd) {
	st.Helper()
	want := 0
	if proc != nil {
		want = proc.Process.Pid
	}
	eventually(st.T, why, func() bool { return st.server.State(uid).Reader == want })
}

// oneReader is a server with a pod that a proxy of ztun reads.
func oneReader(t *testing.T) (st *serverTest, a ours) {
	st = newServerTest(t)
	st.setPlain("u")
	a = st.greetAs(st.process(), 1, false)
	if r, _ := a.gets(kindAdd, "u", ""); r.part != 1 || r.predecessor {
		t.Errorf("add = %+v", r)
	}
	a.want(kindSnapshotSent, "", "")
	st.wantServed("u", true)
	return st, a
}

// successor connects, and has had its snapshot.
func (st *serverTest) successor(started uint64) ours {
	st.Helper()
	b := st.greetAs(st.process(), started, false)
	b.want(kindKeep, "u", "")
	b.want(kindSnapshotSent, "", "")
	return b
}

func TestHandoverToALaterProxy(t *testing.T) {
	st, a := oneReader(t)
	b := st.successor(2)
	_, yield := a.gets(kindYield, "u", "")
	r, add := b.gets(kindAdd, "u", "")
	if !r.predecessor || r.part != 2 {
		t.Errorf("add = %+v", r)
	}
	wantConnected(t, add.Predecessor, yield.Device)
	st.wantReader("the later one reads", "u", b.proc)
	st.wantServed("u", true)
	add.Predecessor.Close()
	eventually(t, "the agent keeps no end", func() bool { return !isOpen(yield.Device) })

	// A third, whose predecessor has one itself.
	c := st.successor(3)
	_, yield2 := b.gets(kindYield, "u", "")
	_, add2 := c.gets(kindAdd, "u", "")
	wantConnected(t, add2.Predecessor, yield2.Device)
	st.wantReader("the latest reads", "u", c.proc)
	kill(c.proc)
	st.wantReader("the second reads again", "u", b.proc)
	kill(b.proc)
	st.wantReader("the first reads again", "u", a.proc)
	kill(a.proc)
	st.wantReader("nobody is left", "u", nil)
}

// TestHandoverNeedsBothSides: nothing of it is said to others, nor before the
// snapshot, nor to an earlier one.
func TestHandoverNeedsBothSides(t *testing.T) {
	st, a := oneReader(t)
	stock := st.greet(st.process())
	stock.want(kindKeep, "u", "")
	stock.want(kindSnapshotSent, "", "")
	early := st.greetAs(st.process(), 0, false)
	early.want(kindKeep, "u", "")
	early.want(kindSnapshotSent, "", "")
	late := st.greetAs(st.process(), 9, false)
	late.want(kindKeep, "u", "")
	if msg, _, err := late.receive(); err != nil { // Unanswered: its snapshot is not had.
		t.Fatal(err)
	} else if r, _ := decodeRequest(msg); r.kind != kindSnapshotSent {
		t.Fatalf("got %v", r.kind)
	}
	st.server.mu.Lock()
	if heir := st.server.heirLocked(st.server.pods["u"]); heir != nil {
		t.Errorf("heir before its snapshot: %+v", heir.proc.hello)
	}
	st.server.mu.Unlock()
	if pods := st.server.State("u"); pods.Reader != a.proc.Process.Pid {
		t.Errorf("state = %+v", pods)
	}
	late.answer("")
	a.gets(kindYield, "u", "")
	late.gets(kindAdd, "u", "")

	// A stock reader keeps what it has.
	st2 := newServerTest(t)
	st2.setPlain("u")
	s := st2.greet(st2.process())
	s.want(kindAdd, "u", "")
	s.want(kindSnapshotSent, "", "")
	st2.successor(5)
	st2.wantNothing(s)
}

// TestLeavingProxyYieldsToAnEarlierOne too, and gets no more pods.
func TestLeavingProxyYieldsToAnEarlierOne(t *testing.T) {
	st, a := oneReader(t)
	_ = a.conn.Close()
	eventually(t, "disconnected", func() bool { return st.server.Proxies() == 0 })
	a = st.greetAs(a.proc, 1, true)
	a.want(kindKeep, "u", "")
	a.want(kindSnapshotSent, "", "")
	st.setPlain("v")
	if s := st.server.State("v"); s.Reader != 0 {
		t.Errorf("a leaving proxy was given a pod: %+v", s)
	}
	b := st.greetAs(st.process(), 0, false)
	seen := map[string]kind{}
	for range 2 {
		msg, files, err := b.receive()
		if err != nil {
			t.Fatal(err)
		}
		closeAll(files)
		r, _ := decodeRequest(msg)
		seen[r.workload.UID] = r.kind
		b.answer("")
	}
	if seen["u"] != kindKeep || seen["v"] != kindAdd {
		t.Errorf("told %v", seen)
	}
	b.want(kindSnapshotSent, "", "")
	a.gets(kindYield, "u", "")
	b.gets(kindAdd, "u", "")
	st.wantReader("the other reads", "u", b.proc)
}

// TestHandoverWaitsForOlderFlows: which are left must be known.
func TestHandoverWaitsForOlderFlows(t *testing.T) {
	st, a := oneReader(t)
	if ok, err := st.server.Update(fullWorkload("u")); !ok || err != nil {
		t.Fatalf("Update = %v, %v", ok, err)
	}
	b := st.successor(2)
	a.gets(kindYield, "u", "")
	eventually(t, "stale", func() bool { return st.server.State("u").Stale })
	st.wantNothing(b.peer)
	if ok, err := st.server.Update(plainWorkload("u")); !ok || err != nil {
		t.Fatalf("Update = %v, %v", ok, err)
	}
	if r, _ := b.gets(kindAdd, "u", ""); len(r.workload.Device.OlderFlows) != 0 || !r.predecessor {
		t.Errorf("add = %+v", r)
	}
}

// TestHandoverThatGoesWrong leaves exactly one reader at each step.
func TestHandoverThatGoesWrong(t *testing.T) {
	t.Run("the reader refuses", func(t *testing.T) {
		st, a := oneReader(t)
		st.successor(2)
		_, yield := a.gets(kindYield, "u", "no")
		eventually(t, "the socket is closed", func() bool { return !isOpen(yield.Device) })
		st.wantReader("it reads on", "u", a.proc)
		a.gets(kindYield, "u", "") // Asked again.
	})
	t.Run("the reader ends instead of an answer", func(t *testing.T) {
		st, a := oneReader(t)
		b := st.successor(2)
		if _, files, err := a.receive(); err != nil || len(files) != 1 {
			t.Fatalf("%d files, %v", len(files), err)
		}
		kill(a.proc)
		_ = a.conn.Close()
		if r, _ := b.gets(kindAdd, "u", ""); r.predecessor {
			t.Error("a predecessor that has ended")
		}
		st.wantReader("the later one reads", "u", b.proc)
	})
	t.Run("the reader disconnects instead of an answer", func(t *testing.T) {
		st, a := oneReader(t)
		b := st.successor(2)
		_, files, err := a.receive()
		if err != nil || len(files) != 1 {
			t.Fatalf("%d files, %v", len(files), err)
		}
		_ = a.conn.Close()
		eventually(t, "the socket is closed", func() bool { return !isOpen(files[0]) })
		closeAll(files)
		st.wantReader("it reads on", "u", a.proc)
		st.wantNothing(b.peer)
		a = st.greetAs(a.proc, 1, false)
		a.gets(kindAdd, "u", "")
		a.want(kindSnapshotSent, "", "")
		a.gets(kindYield, "u", "")
		b.gets(kindAdd, "u", "")
	})
	t.Run("the successor refuses", func(t *testing.T) {
		st, a := oneReader(t)
		b := st.successor(2)
		_, yield := a.gets(kindYield, "u", "")
		_, add := b.gets(kindAdd, "u", "no room")
		add.Close() // As a client does.
		eventually(t, "the socket is closed", func() bool { return !isOpen(yield.Device) })
		st.wantReader("the first reads again", "u", a.proc)
		a.gets(kindYield, "u", "") // Tried again.
		b.gets(kindAdd, "u", "")
		st.wantReader("the second reads", "u", b.proc)
	})
	t.Run("the successor ends before its add", func(t *testing.T) {
		st, a := oneReader(t)
		b := st.successor(2)
		msg, files, err := a.receive()
		if r, _ := decodeRequest(msg); err != nil || r.kind != kindYield {
			t.Fatalf("%v, %v", r.kind, err)
		}
		kill(b.proc)
		_ = b.conn.Close()
		eventually(t, "it is gone", func() bool { return st.server.Proxies() == 1 })
		a.answer("")
		eventually(t, "the socket is closed", func() bool { return !isOpen(files[0]) })
		closeAll(files)
		st.wantReader("the first reads again", "u", a.proc)
		st.wantServed("u", true)
	})
	t.Run("the successor disconnects instead of an answer", func(t *testing.T) {
		st, a := oneReader(t)
		b := st.successor(2)
		_, yield := a.gets(kindYield, "u", "")
		if _, files, err := b.receive(); err != nil || len(files) != 2 {
			t.Fatalf("%d files, %v", len(files), err)
		} else {
			closeAll(files)
		}
		_ = b.conn.Close()
		eventually(t, "it is gone", func() bool { return st.server.Proxies() == 1 })
		if !isOpen(yield.Device) {
			t.Error("both would read")
		}
		b = st.greetAs(b.proc, 2, false)
		_, add := b.gets(kindAdd, "u", "")
		wantConnected(t, add.Predecessor, yield.Device)
		b.want(kindSnapshotSent, "", "")
		st.wantReader("the second reads", "u", b.proc)
	})
	t.Run("the pod is deleted between", func(t *testing.T) {
		st, a := oneReader(t)
		b := st.successor(2)
		_, files, err := a.receive()
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- st.server.Delete(context.Background(), "u") }()
		eventually(t, "deleted", func() bool { return !st.server.State("u").Set })
		a.answer("")
		a.want(kindDel, "u", "")
		b.want(kindDel, "u", "")
		if err := <-done; err != nil {
			t.Error(err)
		}
		if isOpen(files[0]) {
			t.Error("an end of the socket is left")
		}
		closeAll(files)
	})
	t.Run("the agent ends between", func(t *testing.T) {
		st, a := oneReader(t)
		b := st.successor(2)
		_, yield := a.gets(kindYield, "u", "")
		st.server.shutDownForTest()
		_ = b.conn.Close() // The add may be on its way, with the other end.
		eventually(t, "the first reads again", func() bool { return !isOpen(yield.Device) })
	})
}

// shutDownForTest closes what a process that ends would close.
func (s *Server) shutDownForTest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		_ = c.conn.Close()
	}
	for _, p := range s.pods {
		p.dropEnd()
	}
}

// TestNextAgentGetsTheDevice from whom has it, and can let another take it over.
func TestNextAgentGetsTheDevice(t *testing.T) {
	st := newServerTest(t)
	w := plainWorkload("u")
	w.Device.ID, w.Device.Offload = "", false
	if err := st.server.Set(w, Files{}); err != nil {
		t.Fatal(err)
	}
	answer := func(p ours, h holding, files ...*os.File) {
		t.Helper()
		msg, _, err := p.receive()
		if err != nil {
			t.Fatal(err)
		}
		if r, err := decodeRequest(msg); err != nil || r.kind != kindKeep || !r.lend {
			t.Fatalf("got %+v, %v, want a keep that asks", r, err)
		}
		if msg, err = encodeResponse(response{holding: h}); err != nil {
			t.Fatal(err)
		}
		p.send(msg, files...)
	}
	first, second := st.process(), st.process()
	a := st.greetAs(first, 1, true)
	answer(a, holding{yielded: true})
	a.want(kindSnapshotSent, "", "")
	if s := st.server.State("u"); s.Device || s.Reader != 0 {
		t.Errorf("state = %+v", s)
	}
	dev, icmp := device(t), device(t)
	b := st.greetAs(second, 2, false)
	answer(b, holding{reads: true, deviceID: "one", offload: true, icmp: 1}, dev, icmp)
	// The agent before may have described it otherwise.
	if r, _ := b.gets(kindAdd, "u", ""); r.workload.Device.ID != "one" {
		t.Errorf("add = %+v", r.workload.Device)
	}
	b.want(kindSnapshotSent, "", "")
	st.wantReader("who reads", "u", second)
	eventually(t, "served", func() bool { s := st.server.State("u"); return s.Device && s.Served })
	// What the worker says of it changes nothing.
	if err := st.server.Set(w, Files{}); err != nil {
		t.Fatal(err)
	}
	if ok, err := st.server.Update(w); !ok || err != nil {
		t.Errorf("Update = %v, %v", ok, err)
	}
	if r, _ := b.gets(kindAdd, "u", ""); r.workload.Device.ID != "one" || !r.workload.Device.Offload {
		t.Errorf("add = %+v", r.workload.Device)
	}
	c := st.successor(3)
	b.gets(kindYield, "u", "")
	r, add := c.gets(kindAdd, "u", "")
	if inode(t, add.Device) != inode(t, dev) || len(add.ICMP) != 1 || inode(t, add.ICMP[0]) != inode(t, icmp) || !r.workload.Device.Offload {
		t.Errorf("add = %+v of other files", r)
	}
	kill(c.proc)
	st.wantReader("the second reads again", "u", second)
	kill(second)
	st.wantReader("the first reads again", "u", first)
}

// yielder is a pod that yields and lends.
type yielder struct {
	startedPod
	s *yieldStarter
}

type yieldStarter struct {
	starter
	packets *os.File
	during  func() // A Yield; nil: nothing.
}

func (s *yieldStarter) Start(w Workload, files Files) (Proxy, error) {
	p, err := s.starter.Start(w, files)
	if err != nil {
		return nil, err
	}
	return yielder{p.(startedPod), s}, nil
}

func (y yielder) Yield(packets *os.File) error {
	y.s.mu.Lock()
	defer y.s.mu.Unlock()
	if y.s.during != nil {
		y.s.during()
	}
	y.s.packets = packets
	return nil
}

func (y yielder) Predecessor() *os.File {
	f, err := dup(y.files.Predecessor)
	if err != nil {
		return nil
	}
	return f
}

func (y yielder) Lend() (Files, bool, error) {
	y.s.mu.Lock()
	defer y.s.mu.Unlock()
	if y.s.packets != nil {
		return Files{}, true, nil
	}
	f, err := Files{Device: y.files.Device, ICMP: y.files.ICMP}.dup()
	return f, false, err
}

func newYieldTest(t *testing.T) (*clientTest, *yieldStarter) {
	l, path := listen(t)
	s := &yieldStarter{}
	ct := &clientTest{T: t, listener: l, starter: &s.starter}
	ct.client = NewClient(ClientConfig{Socket: path, Starter: s, Yields: true})
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
	return ct, s
}

// hello waits for the client.
func (ct *clientTest) hello() (peer, hello) {
	ct.Helper()
	_ = ct.listener.SetDeadline(time.Now().Add(patience))
	conn, err := ct.listener.AcceptUnix()
	if err != nil {
		ct.Fatal(err)
	}
	ct.Cleanup(func() { _ = conn.Close() })
	p := peer{ct.T, conn}
	msg, _, err := p.receive()
	if err != nil {
		ct.Fatal(err)
	}
	h, err := decodeHello(msg)
	if err != nil {
		ct.Fatal(err)
	}
	return p, h
}

// lends asks for a pod and returns what comes.
func (p peer) lends(uid string) (holding, []*os.File) {
	p.t.Helper()
	p.request(request{kind: kindKeep, workload: Workload{UID: uid}, lend: true})
	msg, files, err := p.receive()
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { closeAll(files) })
	r, err := decodeResponse(msg)
	if err != nil || r.text != "" || r.holding.files() != len(files) {
		p.t.Fatalf("%+v, %v, with %d files", r, err, len(files))
	}
	return r.holding, files
}

func TestClientYieldsLendsAndLeaves(t *testing.T) {
	ct, s := newYieldTest(t)
	p, h := ct.hello()
	if !h.ztun || h.started == 0 || h.leaving || h.part != 0 {
		t.Errorf("hello = %+v", h)
	}
	dev, icmp := device(t), device(t)
	r := addWith("u", 1)
	r.part = 3
	p.request(r, dev, icmp)
	p.wantOK("add")
	if got, files := p.lends("u"); !got.reads || got.deviceID != "one" || !got.offload ||
		inode(t, files[0]) != inode(t, dev) || inode(t, files[1]) != inode(t, icmp) {
		t.Errorf("lent %+v", got)
	}
	if got, _ := p.lends("nobody"); got != (holding{}) {
		t.Errorf("lent %+v of nobody", got)
	}
	packets := device(t)
	p.request(request{kind: kindYield, workload: Workload{UID: "u"}}, packets)
	p.wantOK("yield")
	s.mu.Lock()
	got := inode(t, s.packets)
	s.mu.Unlock()
	if got != inode(t, packets) {
		t.Error("another socket")
	}
	if got, _ := p.lends("u"); got != (holding{yielded: true}) {
		t.Errorf("lent %+v after the yield", got)
	}
	before := openFiles(t)
	p.request(request{kind: kindYield, workload: Workload{UID: "nobody"}}, packets)
	p.wantOK("yield of an unknown uid")
	eventually(t, "no descriptor is left", func() bool { return openFiles(t) == before })

	_ = p.conn.Close()
	p, h2 := ct.hello()
	if h2.part != 3 || h2.started != h.started {
		t.Errorf("hello = %+v", h2)
	}
	ct.client.Leave()
	p.wantClosed("only a hello says so")
	p, h2 = ct.hello()
	if !h2.leaving {
		t.Errorf("hello = %+v", h2)
	}
	p.request(addOf("v"), device(t))
	if text := p.wantAck("add"); text == "" {
		t.Error("a pod was taken at the end")
	}
	p.request(request{kind: kindKeep, workload: Workload{UID: "u"}})
	p.wantOK("keep")
	ct.snapshot(p)
	ct.wantRunning("while it leaves", "u")
}

// TestClientAnswersBeforeItLeaves: else the agent would take the yield back.
func TestClientAnswersBeforeItLeaves(t *testing.T) {
	ct, s := newYieldTest(t)
	p, _ := ct.hello()
	p.request(addOf("u"), device(t))
	p.wantOK("add")
	s.mu.Lock()
	s.during = func() { ct.client.Leave() }
	s.mu.Unlock()
	p.request(request{kind: kindYield, workload: Workload{UID: "u"}}, device(t))
	p.wantOK("yield")
	p.wantClosed("then it leaves")
	if _, h := ct.hello(); !h.leaving {
		t.Errorf("hello = %+v", h)
	}
}

// TestClientLeavesNothingOfARefusedPod: the agent lets another read the device.
func TestClientLeavesNothingOfARefusedPod(t *testing.T) {
	ct, s := newYieldTest(t)
	p, _ := ct.hello()
	before := openFiles(t)
	s.setFail(net.ErrClosed)
	r := addOf("u")
	r.predecessor = true
	p.request(r, device(t), device(t))
	_ = p.wantAck("add")
	eventually(t, "only the test's own are left", func() bool { return openFiles(t) <= before+2 })
	s.setFail(nil)
	p.request(r, device(t), device(t))
	p.wantOK("the agent's own retry")
	ct.wantRunning("started", "u")
}

// TestClientKeepsThePredecessor over a change of the pod: it must not take the
// device for left.
func TestClientKeepsThePredecessor(t *testing.T) {
	ct, s := newYieldTest(t)
	p, _ := ct.hello()
	r := addOf("u")
	r.predecessor = true
	socket := device(t)
	p.request(r, device(t), socket)
	p.wantOK("add")
	changed := addOf("u")
	changed.workload.Device.BypassInbound = false
	p.request(changed, device(t))
	p.wantOK("changed")
	f := s.filesOf("u")
	if f.Predecessor == nil || inode(t, f.Predecessor) != inode(t, socket) {
		t.Errorf("files = %+v", f)
	}
	if starts, stops := s.counts(); starts != 2 || stops != 1 {
		t.Errorf("%d starts and %d stops", starts, stops)
	}
}
