package agent

import (
	"context"
	"errors"
	"os"

	"github.com/ztun/ztun/tun/podnet"
)

// namespace returns that of what is to be detached, which giveBack takes; nil:
// there is nothing to be undone.
func (w *worker) namespace(ended bool) (*os.File, error) {
	ns := w.drop()
	w.mu.Lock()
	if ns == nil {
		ns, w.found = w.found, nil
	}
	p := w.last
	w.mu.Unlock()
	if ended && ns != nil {
		_ = ns.Close()
		ns = nil
	}
	if ended || ns != nil {
		return ns, nil
	}
	ns, err := openNetns(p)
	lost := errors.Is(err, ErrNotFound) || errors.Is(err, podnet.ErrGone)
	switch {
	case lost && !w.touched:
		return nil, nil
	case lost:
		w.mu.Lock()
		w.lost = w.wanted == nil
		w.announceLocked()
		w.mu.Unlock()
	}
	return ns, err
}

// giveBack takes the namespace for the next try, if there is one.
func (w *worker) giveBack(ns *os.File, done bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if done || w.wanted != nil || w.found != nil {
		_ = ns.Close()
		return
	}
	w.found = ns
}

// detach takes the pod out of the mesh: first the proxies let go of it, then
// its sockets, then the rules. done: the worker is no longer needed.
func (w *worker) detach(ctx context.Context) (done bool, err error) {
	w.mu.Lock()
	state, ended := w.state, w.ended
	w.mu.Unlock()
	ns, err := w.namespace(ended)
	if err != nil {
		return false, err
	}
	reset := func(ctx context.Context) error { return w.agent.server.Delete(ctx, w.uid) }
	if ns != nil {
		defer func() { w.giveBack(ns, done) }()
		if state == nil {
			state = &podnet.State{} // Attached, perhaps, by an agent that died before it could say so.
		}
		if err := podnet.Detach(ctx, ns, *state, reset); err != nil && !errors.Is(err, podnet.ErrGone) {
			return false, err
		}
	}
	if err := reset(ctx); err != nil {
		return false, err
	}
	if err := w.agent.store.remove(w.uid); err != nil {
		return false, err
	}
	a := w.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state, w.current = nil, Pod{}
	if w.wanted != nil {
		w.phase = Attaching // Wanted again meanwhile.
		w.kick()
		return false, nil
	}
	delete(a.workers, w.uid)
	w.announceLocked()
	w.log.Info("pod is out of the mesh")
	return true, nil
}
