// Package agent is the privileged half of a node: it attaches a TUN device to
// each pod that is wanted in the mesh, keeps the pod's rules and routes as
// they must be, and hands the device to the node's proxy over ZDS.
//
// # Who holds a device
//
// A TUN device has one queue, and one open file of it at a time; every
// descriptor is a duplicate of that one. The agent keeps one for as long as it
// runs, though it never reads, and the proxy gets another: when a proxy dies the
// next one gets the same open device, and nobody else can slip in between. When
// the agent starts again while a proxy runs, it cannot open the device (it is
// busy) and tells the proxy to keep it, and to send a descriptor of it; where the
// proxy is not ztun's it can open it when that one ends. Without either, nobody
// has the device open and the pod's TCP goes nowhere.
//
// With each device that it opens the agent opens the pod's ICMP sockets, and
// hands them to whoever gets that device. They are not worth asking for alone:
// without them the pod is served as well, but for truthful errors.
//
// A device has one reader at a time: zds.Server sees to that, and lets a later
// proxy take it over from an earlier one without a cut.
//
// # Usage
//
// It does not know Kubernetes. Whoever does calls Set and Delete:
//
//	a, err := agent.New(agent.Config{StateDir: "/var/run/ztun", Socket: "/var/run/ztunnel/ztunnel.sock", Log: log})
//	go a.Run(ctx)
//	a.Set(agent.Pod{UID: "...", Netns: "/var/run/netns/..."})
//
// All methods may be called from any goroutine.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/ztun/ztun/cmd/internal/socket"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun/podnet"
)

// NotFound as the Netns of a pod says that it has a network namespace and nobody
// knows which: that of a running pod whose earlier agent did not leave a path that
// lasts. Such a pod stays as it is until Set or Detach says where it is.
const NotFound = "not found"

// ErrNotFound says that the namespace of a pod that is to be detached is not to be
// found where it was said to be. What was done to the pod is not undone.
var ErrNotFound = errors.New("its network namespace is not found")

// A Pod is a pod that is wanted in the mesh.
type Pod struct {
	UID            string `json:"uid"`
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	// Netns is the path of the pod's network namespace, or NotFound. It need not
	// stay valid: the agent holds the namespace open while it runs.
	Netns string `json:"netns"`
	// Addresses are the pod's own. Empty: those found on its interfaces.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// BypassInbound leaves plaintext that comes to the pod alone.
	BypassInbound bool `json:"bypassInbound,omitempty"`
	// DNSCapture hands the pod's UDP to port 53 to the proxy.
	DNSCapture bool `json:"dnsCapture,omitempty"`
	// VirtualInterfaces are those of the pod's interfaces whose traffic comes
	// from others than the pod's processes (virtual machines, containers in
	// it), and is captured as outbound.
	VirtualInterfaces []string `json:"virtualInterfaces,omitempty"`
	// ProbePorts are the TCP ports that the kubelet probes.
	ProbePorts []uint16 `json:"probePorts,omitempty"`
}

// Config is what an Agent needs. The zero value of a field is the default
// named on it.
type Config struct {
	// StateDir keeps what was done to each pod, so that a restarted agent
	// resumes. Required; made with mode 0700.
	StateDir string
	// Socket is where proxies connect. Required.
	Socket string
	// SocketUID and SocketGID own the socket, which has mode 0600. Zero: the
	// agent's own.
	SocketUID, SocketGID int
	// NodeAddresses are the node's own, from which the kubelet probes, until
	// SetNodeAddresses says otherwise.
	NodeAddresses []netip.Addr
	// Standin reads the devices that no proxy reads. Nil: nobody does.
	Standin zds.Standin
	// Log takes what the agent has to say. Nil: nothing is logged.
	Log *slog.Logger
}

// Status is what an Agent knows of one pod.
type Status struct {
	Pod       Pod          `json:"pod"`
	Phase     Phase        `json:"phase"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	MTU       uint32       `json:"mtu,omitempty"`
	// Held says that the agent has the device open itself; otherwise a proxy
	// that an earlier agent gave it to holds it.
	Held bool `json:"held"`
	// Repairs counts what had to be put back in the pod.
	Repairs uint64 `json:"repairs,omitempty"`
	// Error is why the pod is not further.
	Error string `json:"error,omitempty"`
}

// Phase is how far a pod has come.
type Phase string

const (
	// Attaching: the pod's plumbing is not in place, or an earlier agent made
	// it and this one has yet to look.
	Attaching Phase = "attaching"
	// Attached: captured, but no proxy has the device. TCP goes nowhere.
	Attached Phase = "attached"
	// Served: a proxy has taken the device.
	Served Phase = "served"
	// Detaching: being undone.
	Detaching Phase = "detaching"
)

// maxPods bounds the pods of one node.
const maxPods = 4096

// An Agent attaches pods and serves their devices to proxies.
type Agent struct {
	// Set by New, read-only after.
	cfg      Config
	log      *slog.Logger
	server   *zds.Server
	store    *store
	listener *net.UnixListener
	// Slots for work in namespaces, which is heavy. Detaching may wait long for
	// sockets, and must not keep others from being attached.
	attaching, detaching chan struct{}
	icmpOnce             sync.Once // Warns that there will be no ICMP sockets.

	nodeAddrs atomic.Pointer[[]netip.Addr] // Written by SetNodeAddresses.

	// mu guards the fields below.
	mu      sync.Mutex
	ctx     context.Context // Of Run; nil before.
	workers map[string]*worker
	wg      sync.WaitGroup
}

// New opens the state of an earlier agent and the socket. Run starts the work.
func New(cfg Config) (*Agent, error) {
	if cfg.StateDir == "" || cfg.Socket == "" {
		return nil, errors.New("agent: config: StateDir and Socket are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	st, err := openStore(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	saved, err := st.load()
	if err != nil {
		// The rest goes on: a file that cannot be read must not stop the node.
		cfg.Log.Error("state of an earlier agent", "error", err)
	}
	l, err := socket.Listen("unixpacket", cfg.Socket, cfg.SocketUID, cfg.SocketGID)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, store: st, listener: l,
		attaching: make(chan struct{}, 4), detaching: make(chan struct{}, 4),
		workers: map[string]*worker{},
	}
	a.server = zds.NewServer(zds.ServerConfig{Log: cfg.Log, Standin: cfg.Standin, Check: a.checkLent})
	a.nodeAddrs.Store(&cfg.NodeAddresses)
	for _, s := range saved {
		w := newWorker(a, s.Pod, s.State)
		w.touched = true
		a.workers[s.Pod.UID] = w
		if s.State == nil {
			continue
		}
		// Before any proxy connects: one that runs the pod must not be told
		// that it is gone.
		d := s.Pod.device("", s.State, cfg.NodeAddresses)
		if err := a.server.Set(s.Pod.workload(d), zds.Files{}); err != nil {
			cfg.Log.Error("state of an earlier agent", "pod", s.Pod.String(), "error", err)
		}
	}
	return a, nil
}

// Run serves proxies and works on pods until ctx ends. It leaves every pod as
// it is: captured, so that nothing leaves it in plain text. An Agent runs once.
func (a *Agent) Run(ctx context.Context) error {
	a.mu.Lock()
	if a.ctx != nil {
		a.mu.Unlock()
		return errors.New("agent: runs already")
	}
	ctx, cancel := context.WithCancel(ctx)
	a.ctx = ctx
	for _, w := range a.workers {
		a.startLocked(w)
	}
	a.mu.Unlock()
	a.wg.Go(func() { a.wakeOnChange(ctx) })
	err := a.server.Serve(ctx, a.listener)
	cancel()
	a.wg.Wait()
	return err
}

// wakeOnChange makes workers look at what the proxies did to their pods.
func (a *Agent) wakeOnChange(ctx context.Context) {
	for {
		changed := a.server.Changed()
		for _, w := range a.all() {
			w.look()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (a *Agent) startLocked(w *worker) {
	ctx := a.ctx
	a.wg.Go(func() { w.run(ctx) })
}

// all are the workers as they are now.
func (a *Agent) all() []*worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Values(a.workers))
}

// Set wants p in the mesh, as it says now. It does not wait.
func (a *Agent) Set(p Pod) error {
	if err := p.validate(); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if w := a.workers[p.UID]; w != nil {
		w.want(&p)
		return nil
	}
	w, err := a.addLocked(p)
	if err == nil && a.ctx != nil {
		a.startLocked(w)
	}
	return err
}

// addLocked makes the worker of a pod that has none. The caller starts it.
func (a *Agent) addLocked(p Pod) (*worker, error) {
	if len(a.workers) >= maxPods {
		return nil, fmt.Errorf("agent: more than %d pods", maxPods)
	}
	w := newWorker(a, p, nil)
	a.workers[p.UID] = w
	return w, nil
}

// Detach is Delete of a pod whose namespace was found at p.Netns, also of one that
// an agent attached whose state is lost. p.Netns need not stay valid.
func (a *Agent) Detach(ctx context.Context, p Pod) error {
	if err := p.validate(); err != nil {
		return err
	}
	ns, err := podnet.OpenNetns(p.Netns)
	if err != nil {
		return fmt.Errorf("agent: detach %s: %w", p.UID, err)
	}
	a.mu.Lock()
	w := a.workers[p.UID]
	isNew := w == nil
	if isNew {
		if w, err = a.addLocked(p); err != nil {
			a.mu.Unlock()
			_ = ns.Close()
			return err
		}
	}
	w.want(nil)
	w.keep(ns)
	if isNew && a.ctx != nil {
		a.startLocked(w)
	}
	a.mu.Unlock()
	return a.Delete(ctx, p.UID)
}

// Delete wants the pod out of the mesh, and waits until its plumbing is gone
// or ctx ends. An unknown uid is no error. The error matches ErrNotFound as soon as
// that is what is in the way. After an error the agent goes on trying.
func (a *Agent) Delete(ctx context.Context, uid string) error {
	a.mu.Lock()
	w := a.workers[uid]
	if w == nil {
		a.mu.Unlock()
		return nil
	}
	w.want(nil)
	for {
		changed := w.changes()
		gone, again, lost := a.workers[uid] != w, !w.unwanted(), w.isLost()
		a.mu.Unlock()
		switch {
		case gone:
			return nil
		case again:
			return fmt.Errorf("agent: detach %s: the pod is wanted again", uid)
		case lost:
			return fmt.Errorf("agent: detach %s: %s: %w", uid, w.netns(), ErrNotFound)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if text := w.status().Error; text != "" {
				return fmt.Errorf("agent: detach %s: %s", uid, text)
			}
			return fmt.Errorf("agent: detach %s: %w", uid, context.Cause(ctx))
		}
		a.mu.Lock()
	}
}

// Forget is Delete for a pod that has ended: its namespace, which is gone or
// going, is not touched, and stays captured for as long as it exists. Before
// Run it is done at once.
func (a *Agent) Forget(ctx context.Context, uid string) error {
	a.mu.Lock()
	w := a.workers[uid]
	if w == nil {
		a.mu.Unlock()
		return nil
	}
	if a.ctx == nil {
		defer a.mu.Unlock()
		if err := errors.Join(a.server.Delete(ctx, uid), a.store.remove(uid)); err != nil {
			return err
		}
		delete(a.workers, uid)
		return nil
	}
	a.mu.Unlock()
	w.setEnded()
	return a.Delete(ctx, uid)
}

// Wait returns once the pod has reached Served, or with the reason why it has
// not when ctx ends.
func (a *Agent) Wait(ctx context.Context, uid string) error {
	for {
		w := a.worker(uid)
		if w == nil {
			return fmt.Errorf("agent: pod %s is not wanted", uid)
		}
		changed := w.changes()
		if w.phaseNow() == Served {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			st := w.status()
			if st.Error == "" {
				return fmt.Errorf("agent: pod %s is %s: %w", uid, st.Phase, context.Cause(ctx))
			}
			return fmt.Errorf("agent: pod %s is %s: %s: %w", uid, st.Phase, st.Error, context.Cause(ctx))
		}
	}
}

// Phase is how far the pod has come; "" if it is not wanted, nor was. It waits
// for nothing.
func (a *Agent) Phase(uid string) Phase {
	w := a.worker(uid)
	if w == nil {
		return ""
	}
	return w.phaseNow()
}

// Await returns the pod's Phase once it is another than from, or when ctx ends.
func (a *Agent) Await(ctx context.Context, uid string, from Phase) Phase {
	for {
		w := a.worker(uid)
		if w == nil {
			return ""
		}
		changed := w.changes()
		if now := w.phaseNow(); now != from {
			return now
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return from
		}
	}
}

func (a *Agent) worker(uid string) *worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.workers[uid]
}

// Status tells of every pod, in the order of their UIDs.
func (a *Agent) Status() []Status {
	all := a.all()
	out := make([]Status, 0, len(all))
	for _, w := range all {
		out = append(out, w.status())
	}
	slices.SortFunc(out, func(x, y Status) int { return strings.Compare(x.Pod.UID, y.Pod.UID) })
	return out
}

// checkLent says what is wrong with what a proxy lends.
func (a *Agent) checkLent(uid string, files zds.Files) error {
	w := a.worker(uid)
	if w == nil {
		return fmt.Errorf("agent: no pod %s", uid)
	}
	w.mu.Lock()
	st := w.state
	w.mu.Unlock()
	if st == nil {
		return fmt.Errorf("agent: pod %s is not attached", uid)
	}
	return st.CheckFiles(files.Device, files.ICMP)
}

// SetNodeAddresses says which addresses are the node's own now.
func (a *Agent) SetNodeAddresses(addrs []netip.Addr) {
	addrs = slices.Clone(addrs)
	a.nodeAddrs.Store(&addrs)
	for _, w := range a.all() {
		w.kick()
	}
}

// nodeAddresses must not be changed by who reads them.
func (a *Agent) nodeAddresses() []netip.Addr { return *a.nodeAddrs.Load() }

// Addresses are a pod's, as far as they are known; none if it is not wanted. It
// waits for nothing, as Status may.
func (a *Agent) Addresses(uid string) []netip.Addr {
	w := a.worker(uid)
	if w == nil {
		return nil
	}
	return w.addresses()
}

// Clean removes the socket, by which nobody finds the agent any more, and the
// directory of the state if no pod is left in it. What is not there is no error.
func (a *Agent) Clean() error {
	err := os.Remove(a.cfg.Socket)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("agent: clean up: %w", err)
	}
	if len(a.all()) > 0 {
		return err
	}
	return errors.Join(err, a.store.clean())
}

// Proxies is how many proxies are connected.
func (a *Agent) Proxies() int { return a.server.Proxies() }
