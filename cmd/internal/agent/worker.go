package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/podnet"
)

const (
	retryMin = 200 * time.Millisecond
	retryMax = 15 * time.Second
	// reopenEvery is how often a device that a proxy holds alone is looked at,
	// besides each time that a proxy comes or goes.
	reopenEvery = 5 * time.Second
	// workTimeout bounds one piece of work in a namespace. Detach may have to
	// wait for sockets.
	workTimeout = 30 * time.Second
)

// A worker brings one pod to where it is wanted, and keeps it there. run is
// the only goroutine that touches the namespace, but for Watch.
type worker struct {
	agent *Agent
	uid   string
	log   *slog.Logger
	wake  chan struct{} // One slot.

	// Owned by run.
	attached *attachment
	current  Pod          // What attached was made for, or the state of an earlier agent.
	node     []netip.Addr // The node's addresses that proxies were told of.
	failures int
	touched  bool // An agent may have attached the pod.

	// mu guards the fields below.
	mu     sync.Mutex
	wanted *Pod // nil: out of the mesh.
	ended  bool // What is not wanted has ended: its namespace is left alone.
	lost   bool // What is not wanted cannot be detached: nobody knows where it is.
	// found is the namespace of what is not wanted, open between tries to detach it;
	// nil: it is where last says.
	found   *os.File
	last    Pod // As last wanted, for the status.
	state   *podnet.State
	phase   Phase
	seen    zds.State     // How it stood with the proxies when look was last called; Err is seenErr.
	seenErr string        //
	changed chan struct{} // Closed and replaced when something below Status has changed.
	err     string
	live    *podnet.Attachment // That of attached.
	repairs uint64             // Of earlier attachments.
}

// attachment is a pod that is captured.
type attachment struct {
	*podnet.Attachment
	ns      *os.File
	stop    context.CancelFunc // Ends Watch.
	watched sync.WaitGroup
}

func newWorker(a *Agent, p Pod, st *podnet.State) *worker {
	w := &worker{
		agent: a, uid: p.UID, log: a.log.With("pod", p.String(), "uid", p.UID),
		wake: make(chan struct{}, 1), wanted: &p, last: p, state: st, phase: Attaching, changed: make(chan struct{}),
	}
	if st != nil {
		w.current = p
	}
	return w
}

func (w *worker) kick() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// changes is closed at the next change of the pod's status.
func (w *worker) changes() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *worker) announceLocked() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// look wakes run, and those who wait for the pod, if it stands otherwise with the
// proxies. What they do to other pods is nothing to it.
func (w *worker) look() {
	st, text := w.agent.server.State(w.uid), ""
	if st.Err != nil {
		st.Err, text = nil, st.Err.Error()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if st == w.seen && text == w.seenErr {
		return
	}
	w.seen, w.seenErr = st, text
	w.announceLocked()
	w.kick()
}

// phaseNow is the pod's, by what the worker and the server know.
func (w *worker) phaseNow() Phase {
	served := w.agent.server.State(w.uid).Served
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.phase == Attached && served {
		return Served
	}
	return w.phase
}

// want sets the goal: nil is out of the mesh.
func (w *worker) want(p *Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wanted, w.lost = p, false
	switch {
	case p == nil:
		w.phase = Detaching
	case w.phase == Detaching || !p.equal(&w.last):
		// Who waits, waits for what is wanted now.
		w.phase = Attaching
	}
	if p != nil {
		w.last, w.ended = *p, false
		w.keepLocked(nil)
	}
	w.announceLocked()
	w.kick()
}

// keep takes the namespace that what is not wanted is to be detached in.
func (w *worker) keep(ns *os.File) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wanted != nil {
		_ = ns.Close()
		return
	}
	w.lost = false
	w.keepLocked(ns)
	w.kick()
}

func (w *worker) keepLocked(ns *os.File) {
	if w.found != nil {
		_ = w.found.Close()
	}
	w.found = ns
}

// isLost says whether the last try to detach did not find the namespace.
func (w *worker) isLost() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lost
}

// netns is the path that the pod's namespace was said to be at.
func (w *worker) netns() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last.Netns
}

// setEnded makes the next detaching leave the namespace alone, unless the pod
// is wanted again.
func (w *worker) setEnded() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
}

func (w *worker) unwanted() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wanted == nil
}

// status puts together what the worker, podnet and the server know.
func (w *worker) status() Status {
	st := w.agent.server.State(w.uid)
	w.mu.Lock()
	live := w.live
	w.mu.Unlock()
	repairs := repairsOf(live) // May wait for work in the namespace.
	w.mu.Lock()
	defer w.mu.Unlock()
	s := Status{Pod: w.last, Phase: w.phase, Held: st.Device, Repairs: w.repairs + repairs, Error: w.err}
	if w.state != nil {
		s.Addresses, s.MTU = w.state.Addrs, w.state.MTU
	}
	if s.Phase == Attached {
		if st.Served {
			s.Phase = Served
		}
		if s.Error == "" && st.Err != nil {
			s.Error = st.Err.Error()
		}
	}
	return s
}

// addresses are the pod's own: those that it is said to have, else those found.
func (w *worker) addresses() []netip.Addr {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.last.Addresses) == 0 && w.state != nil {
		return w.state.Addrs
	}
	return w.last.Addresses
}

func repairsOf(a *podnet.Attachment) (n uint64) {
	if a != nil {
		for _, count := range a.Stats().Repairs {
			n += count
		}
	}
	return n
}

// run works until ctx ends or the pod is out of the mesh.
func (w *worker) run(ctx context.Context) {
	defer func() {
		if ns := w.drop(); ns != nil {
			_ = ns.Close()
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.keepLocked(nil)
	}()
	for {
		wait := w.step(ctx)
		if ctx.Err() != nil || wait < 0 {
			return
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-w.wake:
		case <-t.C:
		}
		t.Stop()
	}
}

// step does what is to be done now. It returns when to look again at the
// latest; less than zero: never, the pod is gone.
func (w *worker) step(ctx context.Context) time.Duration {
	w.mu.Lock()
	wanted := w.wanted
	w.mu.Unlock()
	var done bool
	slots := w.agent.attaching
	if wanted == nil {
		slots = w.agent.detaching
	}
	err := w.turn(ctx, slots, func(ctx context.Context) (err error) {
		if wanted == nil {
			done, err = w.detach(ctx)
			return err
		}
		return w.attach(ctx, *wanted)
	})
	if done {
		return -1
	}
	said := w.note(err)
	if err == nil {
		w.failures = 0
		return reopenEvery
	}
	if ctx.Err() == nil && !said {
		w.log.Warn("pod is not where it is wanted; trying on", "error", err)
	}
	w.failures = min(w.failures+1, 10)
	return min(retryMin<<(w.failures-1), retryMax)
}

// turn runs work when few others do, for a bounded time.
func (w *worker) turn(ctx context.Context, slots chan struct{}, work func(context.Context) error) error {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-slots }()
	ctx, cancel := context.WithTimeout(ctx, workTimeout)
	defer cancel()
	return work(ctx)
}

// note makes the outcome of a step visible. It reports whether that of the last
// one was the same.
func (w *worker) note(err error) (same bool) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if same = w.err == text; !same {
		w.err = text
		w.announceLocked()
	}
	return same
}

// attach brings the pod, in whatever state it is, to be captured as p says and
// known to the proxies.
func (w *worker) attach(ctx context.Context, p Pod) error {
	st := w.agent.server.State(w.uid)
	same := w.attached != nil && w.current.equal(&p)
	if same && st.Set && !st.Stale && (st.Device || !w.free()) {
		w.setAttached(p)
		return w.tellNode(p)
	}
	ns := w.drop()
	if ns != nil && w.current.Netns != p.Netns && !isNetns(ns, p.Netns) {
		// The pod has another namespace; the first is gone or going.
		_ = ns.Close()
		ns = nil
		w.setState(nil)
	}
	node := w.agent.nodeAddresses()
	a, err := w.capture(ctx, ns, p)
	if err != nil {
		return err
	}
	if err := w.offer(ctx, a, p, w.current); err != nil {
		_ = a.Close()
		_ = a.ns.Close()
		return err
	}
	w.attached, w.current, w.node = a, p, node
	w.mu.Lock()
	w.live = a.Attachment
	w.mu.Unlock()
	w.setAttached(p)
	watchCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	a.stop = stop
	a.watched.Go(func() { w.watch(watchCtx, a) })
	return nil
}

// setAttached says that the pod is captured as p says, if that is still wanted.
func (w *worker) setAttached(p Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wanted != nil && w.wanted.equal(&p) && w.phase != Attached {
		w.phase = Attached
		w.announceLocked()
	}
}

// tellNode tells of other addresses of the node than before.
func (w *worker) tellNode(p Pod) error {
	node := w.agent.nodeAddresses()
	if slices.Equal(w.node, node) {
		return nil
	}
	updated, err := w.update(w.attached, p)
	if updated { // Else once the proxy that has the device has lent it.
		w.node = node
	}
	return err
}

// free reports whether a device that an earlier agent gave away can be had
// again. The proxy that had it may have died before it knew this agent, so no
// departure tells: the kernel is asked.
func (w *worker) free() bool {
	free, err := w.attached.Free()
	if err != nil {
		w.log.Warn("asking whether the pod's device has a reader", "error", err)
	}
	return free
}

// drop lets go of the attachment, if there is one; the pod stays captured. It
// returns the namespace, which is the caller's.
func (w *worker) drop() *os.File {
	a := w.attached
	if a == nil {
		return nil
	}
	w.attached = nil
	a.stop()
	a.watched.Wait()
	w.mu.Lock()
	w.repairs += repairsOf(w.live)
	w.live = nil
	w.mu.Unlock()
	_ = a.Close()
	return a.ns
}

func (w *worker) setState(st *podnet.State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state = st
}

// openNetns opens the namespace where the pod is said to have it.
func openNetns(p Pod) (*os.File, error) {
	if p.Netns == NotFound {
		return nil, fmt.Errorf("agent: pod %s: %w", p.String(), ErrNotFound)
	}
	return podnet.OpenNetns(p.Netns)
}

// isNetns says whether path is another way to ns, or no way to any namespace yet.
func isNetns(ns *os.File, path string) bool {
	if path == NotFound {
		return true
	}
	have, err := ns.Stat()
	if err != nil {
		return false
	}
	want, err := os.Stat(path)
	return err == nil && os.SameFile(have, want)
}

// capture attaches, or attaches again: that repairs, takes other flags on, and
// finds which older flows are left. It owns ns, which is opened if nil.
func (w *worker) capture(ctx context.Context, ns *os.File, p Pod) (_ *attachment, err error) {
	if ns == nil {
		if ns, err = openNetns(p); err != nil {
			return nil, err
		}
	}
	w.touched = true
	defer func() {
		if err != nil {
			_ = ns.Close()
		}
	}()
	w.mu.Lock()
	prev := w.state
	w.mu.Unlock()
	a := &attachment{ns: ns}
	cfg := podnet.Config{
		CaptureDNS: p.DNSCapture, BypassInbound: p.BypassInbound, VirtualInterfaces: p.VirtualInterfaces,
		OnChange: func(c podnet.Change) { w.onChange(a, p, c) },
		Logger:   w.log,
	}
	if prev != nil {
		a.Attachment, err = podnet.Resume(ctx, ns, cfg, *prev)
	} else if err = w.agent.store.save(saved{Pod: p}); err == nil {
		a.Attachment, err = podnet.Attach(ctx, ns, cfg, nil)
	}
	if errors.Is(err, tun.ErrBusy) {
		return nil, fmt.Errorf("a process reads the device that this agent knows nothing of: %w", err)
	}
	if err != nil {
		return nil, err
	}
	state := a.State()
	w.setState(&state)
	if err = w.agent.store.save(saved{Pod: p, State: &state}); err != nil {
		_ = a.Close()
		if a.File != nil {
			_ = a.File.Close()
		}
		return nil, err
	}
	return a, nil
}

// offer tells the server of what capture made. told is what proxies were told
// before.
func (w *worker) offer(ctx context.Context, a *attachment, p, told Pod) error {
	if n := len(a.Older()); n > zds.MaxOlderFlows {
		w.log.Warn("more connections are older than capture than can be told to the proxy; the rest will be reset",
			"flows", n, "told", zds.MaxOlderFlows)
	}
	if file := a.File; file != nil {
		a.File = nil
		return w.set(a, p, file, a.Offload)
	}
	updated, err := w.update(a, p)
	if updated || err != nil {
		return err
	}
	// A proxy that an earlier agent gave the device to has the only
	// descriptor. It knows the pod, as it was told then.
	told.Netns = p.Netns // Which no proxy was told.
	if told.UID != "" && !told.equal(&p) {
		if !w.agent.server.State(w.uid).Kept {
			return errors.New("the proxy that has the device has yet to come and lend it")
		}
		if err := w.agent.server.Delete(ctx, w.uid); err != nil {
			return err
		}
		return errors.New("the proxy has to let go of the device before the pod can change")
	}
	state := a.State()
	return w.agent.server.Set(p.workload(p.device("", &state, w.agent.nodeAddresses())), zds.Files{})
}

// set gives the server a device that was just opened, and owns it. ICMP sockets
// are opened with it.
func (w *worker) set(a *attachment, p Pod, file *os.File, offload bool) error {
	state := a.State()
	d := p.device(newDeviceID(), &state, w.agent.nodeAddresses())
	d.Offload = offload
	return w.agent.server.Set(p.workload(d), zds.Files{Device: file, ICMP: w.openICMP(a)})
}

// openICMP returns what can be had: without, the pod's apps learn of an
// unreachable host as late as of one that is silent.
func (w *worker) openICMP(a *attachment) []*os.File {
	files, err := a.OpenICMP()
	switch {
	case errors.Is(err, unix.EPERM):
		w.agent.icmpOnce.Do(func() {
			w.agent.log.Warn("no ICMP sockets in pods: the agent lacks CAP_NET_RAW; unreachable hosts will look silent", "error", err)
		})
	case err != nil:
		w.log.Warn("no ICMP sockets in the pod; unreachable hosts will look silent", "error", err)
	}
	return files
}

// update tells of the pod whose device the server has already.
func (w *worker) update(a *attachment, p Pod) (bool, error) {
	state := a.State()
	return w.agent.server.Update(p.workload(p.device("", &state, w.agent.nodeAddresses())))
}

// watch keeps the pod's plumbing as it must be.
func (w *worker) watch(ctx context.Context, a *attachment) {
	for ctx.Err() == nil {
		err := a.Watch(ctx)
		if ctx.Err() != nil {
			return
		}
		w.log.Warn("watching the pod's namespace; trying on", "error", err)
		t := time.NewTimer(retryMax)
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// onChange runs on Watch's goroutine.
func (w *worker) onChange(a *attachment, p Pod, c podnet.Change) {
	state := a.State()
	w.setState(&state)
	err := w.agent.store.save(saved{Pod: p, State: &state})
	if c.File != nil {
		err = errors.Join(err, w.set(a, p, c.File, c.Offload))
	} else {
		_, e := w.update(a, p)
		err = errors.Join(err, e)
	}
	if err != nil {
		w.log.Error("change in the pod's namespace", "error", err)
	}
}
