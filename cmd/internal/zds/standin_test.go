package zds

import (
	"context"
	"os"
	"sync"
	"testing"
)

// standin notes what it reads, and lets go of it when it may.
type standin struct {
	mu     sync.Mutex
	reads  map[string]Files
	told   map[string]Workload
	events []string
	hold   chan struct{} // Stop waits for it, unless nil.
}

func (s *standin) Start(uid string, w Workload, device *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reads == nil {
		s.reads, s.told = map[string]Files{}, map[string]Workload{}
	}
	if s.reads[uid].Device != nil {
		panic("two at once")
	}
	s.reads[uid], s.told[uid] = Files{Device: device}, w
	s.events = append(s.events, "start "+uid)
}

func (s *standin) Stop(uid string) {
	s.mu.Lock()
	hold := s.hold
	s.mu.Unlock()
	if hold != nil {
		<-hold
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads[uid].Close()
	delete(s.reads, uid)
	s.events = append(s.events, "stop "+uid)
}

// inode is that of the device read for uid; 0: none.
func (s *standin) inode(t *testing.T, uid string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.reads[uid].Device; f != nil {
		return inode(t, f)
	}
	return 0
}

func (st *serverTest) wantStandin(why string, s *standin, uid string, want uint64) {
	st.Helper()
	eventually(st.T, why, func() bool { return s.inode(st.T, uid) == want })
}

func TestStandinReadsWhileNoProxyDoes(t *testing.T) {
	s := &standin{}
	st := newServerTest(t, s)
	ino := st.set("u")
	st.wantStandin("no proxy came yet", s, "u", ino)
	other := st.set("u") // Its device was made again.
	st.wantStandin("another device", s, "u", other)
	w := fullWorkload("u")
	w.Device.ProbePorts = []uint16{4711}
	if ok, err := st.server.Update(w); !ok || err != nil {
		t.Fatalf("Update = %v, %v", ok, err)
	}
	eventually(t, "told of the ports", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.reads["u"].Device != nil && s.told["u"].Equal(w)
	})

	proc := st.process()
	p := st.greet(proc)
	if got := p.want(kindAdd, "u", ""); got != other {
		t.Errorf("the proxy got inode %d, want %d", got, other)
	}
	if got := s.inode(t, "u"); got != 0 {
		t.Error("two read the device")
	}
	p.want(kindSnapshotSent, "", "")
	_ = p.conn.Close() // It may read on.
	eventually(t, "disconnected", func() bool { return st.server.Proxies() == 0 })
	st.set("v")
	eventually(t, "a pod that no proxy has", func() bool { return s.inode(t, "v") != 0 })
	if got := s.inode(t, "u"); got != 0 {
		t.Error("the standin reads what a proxy may be reading")
	}
	kill(proc)
	st.wantStandin("the proxy has ended", s, "u", other)
}

func TestStandinStopsBeforeAProxyGetsTheDevice(t *testing.T) {
	s := &standin{hold: make(chan struct{})}
	st := newServerTest(t, s)
	ino := st.set("u")
	st.wantStandin("no proxy", s, "u", ino)
	p := st.greet(st.process())
	eventually(t, "the pod is awaited", func() bool {
		st.server.mu.Lock()
		defer st.server.mu.Unlock()
		return len(st.server.conns[0].awaits) == 1
	})
	close(s.hold)
	p.want(kindAdd, "u", "")
	s.mu.Lock()
	events := len(s.events)
	s.mu.Unlock()
	if events != 2 {
		t.Errorf("events before the proxy was told: %v", s.events)
	}
	p.want(kindSnapshotSent, "", "")
}

func TestStandinStopsAtDelete(t *testing.T) {
	s := &standin{hold: make(chan struct{})}
	st := newServerTest(t, s)
	before := openFiles(t)
	ino := st.set("u")
	st.wantStandin("no proxy", s, "u", ino)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := st.server.Delete(ctx, "u"); err == nil {
		t.Error("Delete returned before the standin had stopped")
	}
	done := make(chan error, 1)
	go func() { done <- st.server.Delete(context.Background(), "u") }()
	close(s.hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := s.inode(t, "u"); got != 0 {
		t.Error("Delete returned while the device was read")
	}
	eventually(t, "no descriptor is left", func() bool { return openFiles(t) <= before+1 }) // set's own.
}
