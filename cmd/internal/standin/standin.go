// Package standin reads the devices of pods while no proxy does, so that the
// kubelet does not restart pods whose proxy is away.
//
// It forwards at L3, by writing packets back as they were read, the TCP
// connections that a question said are the kubelet's probes, from their SYN to
// their end, in both directions. Everything else is dropped without an answer:
// without a proxy a pod has no TCP.
//
//	s := standin.New(isProbe, log)
//	defer s.Close()
//	s.Start(uid, workload, device)
//	// a proxy comes:
//	s.Stop(uid) // nobody reads the device from here on
//
// It knows nothing of a connection that began before Start, and what is under
// way at Stop is forgotten. A probe that is cut by either fails once, and the
// kubelet acts only at the failureThreshold of the probe, 3 by default: taking up
// connections in the middle is not worth what could be forwarded by mistake. From
// one proxy to the next no probe is cut (netstack/handover.go). All methods may be
// called from any goroutine.
package standin

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun"
)

const (
	// maxQuestions bounds the SYNs of all pods that wait for an answer, and
	// maxAsked those of one.
	maxQuestions = 256
	maxAsked     = 32
	// maxSYN is the longest SYN that is held, in bytes.
	maxSYN = 1500
	// turnPackets is how many packets of a device are read before others have
	// their turn, and Stop.
	turnPackets = 32
	// sweepEvery is how often connections are looked for that are over.
	sweepEvery = 10 * time.Second
)

// Stats counts over the life of a Standin.
type Stats struct {
	Devices   int    // That are read now.
	Asked     uint64 // SYNs that isProbe was asked about.
	Probes    uint64 // Those that it said are a probe.
	Forwarded uint64 // Packets.
	Dropped   uint64 // Packets.
}

// A Standin reads any number of devices with one thread, and asks on another.
type Standin struct {
	// Set by New, read-only after.
	isProbe   func(src, dst netip.AddrPort) bool
	log       *slog.Logger
	questions chan question
	done      sync.WaitGroup

	// mu guards the fields below. It is held while a device is read: whoever holds
	// it knows that none is.
	mu      sync.Mutex
	epfd    int // -1 before the first Start.
	evfd    int // Written by Close.
	closed  bool
	last    int32
	devices map[int32]*device // By the number that epoll knows them by.
	byUID   map[string]*device
	stats   Stats
	buf     [tun.MaxPacket]byte
	vector  tun.Vector
	writer  tun.Writer
}

// A device is one pod's.
type device struct {
	id    int32
	uid   string
	name  string
	dev   *tun.Device
	table *table
	lost  bool
}

// question is a SYN that is held.
type question struct {
	device *device
	key    key
	packet []byte
	header tun.Header
}

var _ zds.Standin = (*Standin)(nil)

// New makes a Standin. isProbe says whether a connection that a node's address
// opens is a probe; it is asked once a SYN, one at a time, and may block.
func New(isProbe func(src, dst netip.AddrPort) bool, log *slog.Logger) *Standin {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Standin{
		isProbe: isProbe, log: log, questions: make(chan question, maxQuestions),
		epfd: -1, evfd: -1, devices: map[int32]*device{}, byUID: map[string]*device{},
	}
	s.vector.Set(0, s.buf[:])
	return s
}

// Start reads a pod's device until Stop. It owns the file, a duplicate, and
// returns at once. A pod that is read already is started anew.
func (s *Standin) Start(uid string, w zds.Workload, file *os.File) {
	s.Stop(uid)
	if err := s.start(uid, w, file); err != nil {
		_ = file.Close()
		s.log.Error("nobody reads the device of a pod; its probes will fail", "pod", w.Namespace+"/"+w.Name, "uid", uid, "error", err)
	}
}

func (s *Standin) start(uid string, w zds.Workload, file *os.File) error {
	if w.Device == nil {
		return errors.New("standin: the pod has no device")
	}
	dev, err := tun.New(file, tun.Options{MTU: w.Device.MTU, Offload: w.Device.Offload})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.runLocked(); err != nil {
		return err
	}
	s.last++
	d := &device{
		id: s.last, uid: uid, name: w.Namespace + "/" + w.Name, dev: dev,
		table: newTable(w.Device.Addresses, w.Device.NodeAddresses),
	}
	if err := s.watchLocked(dev.FD(), d.id); err != nil {
		return err
	}
	s.devices[d.id], s.byUID[uid] = d, d
	return nil
}

// Stop returns once the device is not read any more, whatever lies in it: that
// is the next reader's. An unknown uid is no error.
func (s *Standin) Stop(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.byUID[uid]; d != nil {
		s.stopLocked(d)
	}
}

func (s *Standin) stopLocked(d *device) {
	s.unwatchLocked(d)
	delete(s.devices, d.id)
	delete(s.byUID, d.uid)
	_ = d.dev.Close()
}

// unwatchLocked leaves the device. The open file is others' too: closing our
// descriptor alone would leave it in the set.
func (s *Standin) unwatchLocked(d *device) {
	if !d.lost {
		_ = unix.EpollCtl(s.epfd, unix.EPOLL_CTL_DEL, d.dev.FD(), nil)
	}
	d.lost = true
}

// Close stops reading every device and returns once everything has ended.
func (s *Standin) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.done.Wait()
		return
	}
	s.closed = true
	for _, d := range s.devices {
		s.stopLocked(d)
	}
	close(s.questions)
	if s.evfd >= 0 {
		s.signalLocked()
	}
	s.mu.Unlock()
	s.done.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.epfd >= 0 {
		_ = unix.Close(s.epfd)
		_ = unix.Close(s.evfd)
		s.epfd, s.evfd = -1, -1
	}
}

// Stats returns the counts as they are now.
func (s *Standin) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Devices = len(s.devices)
	return st
}

// ask answers questions until Close.
func (s *Standin) ask() {
	defer s.done.Done()
	for q := range s.questions {
		yes := s.isProbe(q.key.node, q.key.pod)
		s.answered(q, yes)
	}
}

// answered forwards a SYN that was held, if it is a probe and its device is
// still ours.
func (s *Standin) answered(q question, yes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := q.device
	if s.devices[d.id] != d || d.lost {
		return
	}
	s.stats.Asked++
	if !d.table.answered(q.key, yes, time.Now()) {
		s.stats.Dropped++
		return
	}
	s.stats.Probes++
	s.writeLocked(d, q.header, q.packet)
}
