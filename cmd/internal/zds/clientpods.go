package zds

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"
)

// add starts w unless it runs as described. It owns files.
func (c *Client) add(w Workload, files Files) error {
	if old, ok := c.running[w.UID]; ok {
		if old.workload.Equal(w) {
			c.forgetPending(w.UID)
			files.Close()
			return nil
		}
		if c.update(old, w) {
			c.forgetPending(w.UID)
			files.Close()
			return nil
		}
		if c.isLeaving() {
			files.Close()
			return errLeaving
		}
		if y, ok := old.proxy.(Yielder); ok && files.Predecessor == nil && files.Device != nil {
			// Else the predecessor would take the device for left.
			files.Predecessor = y.Predecessor()
		}
		c.stop(w.UID) // Before the new one: a device has one reader.
	} else if c.isLeaving() {
		files.Close()
		return errLeaving
	}
	if err := c.start(w, files); err != nil {
		return fmt.Errorf("failure to start proxy: %w", err)
	}
	c.forgetPending(w.UID)
	return nil
}

// update tells the pod's proxy what has changed, and reports whether that does.
func (c *Client) update(old runningPod, w Workload) bool {
	u, ok := old.proxy.(Updater)
	if !ok || !old.workload.sameDevice(w) {
		return false
	}
	log := c.cfg.Log.With("pod", w.Namespace+"/"+w.Name, "uid", w.UID)
	if err := u.Update(w); err != nil {
		log.Warn("pod's connections are cut: it cannot be changed while it is served", "error", err)
		return false
	}
	log.Info("pod has changed")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running[w.UID] = runningPod{workload: w, proxy: old.proxy}
	return true
}

// start starts w, or makes it pending. It owns files.
func (c *Client) start(w Workload, files Files) error {
	log := c.cfg.Log.With("pod", w.Namespace+"/"+w.Name, "uid", w.UID)
	keep, err := files.dup()
	var proxy Proxy
	if err != nil {
		keep = files // Not used up: Start was not called.
	} else {
		proxy, err = c.cfg.Starter.Start(w, files)
	}
	if err != nil && c.cfg.Yields {
		// The agent sends it again, and may meanwhile let another read it: a
		// predecessor does as soon as the socket is closed.
		keep.Close()
		keep = Files{}
	}
	if err != nil {
		level := slog.LevelWarn
		if before := c.pending[w.UID].err; before != nil && before.Error() == err.Error() {
			level = slog.LevelDebug // Said already; it may be tried for hours.
		}
		log.Log(context.Background(), level, "pod could not be started; it is tried again", "error", err)
		c.forgetPending(w.UID)
		c.setPending(w.UID, pendingPod{workload: w, files: keep, err: err})
		return err
	}
	keep.Close()
	log.Info("pod is served")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running[w.UID] = runningPod{workload: w, proxy: proxy}
	c.stats.Started++
	return nil
}

func (c *Client) stop(uid string) {
	p, ok := c.running[uid]
	if !ok {
		return
	}
	p.proxy.Stop()
	c.cfg.Log.Info("pod is no longer served", "pod", p.workload.Namespace+"/"+p.workload.Name, "uid", uid)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.running, uid)
	c.stats.Stopped++
}

func (c *Client) setPending(uid string, p pendingPod) {
	if len(c.pending) == 0 {
		c.retryAt = time.Now().Add(c.retry)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending[uid] = p
}

func (c *Client) forgetPending(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p, ok := c.pending[uid]; ok {
		p.files.Close()
		delete(c.pending, uid)
	}
}

func (c *Client) dropPending() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for uid, p := range c.pending {
		p.files.Close()
		delete(c.pending, uid)
	}
}

// retryPending tries every pending pod once more.
func (c *Client) retryPending() {
	c.retryAt = time.Now().Add(c.retry)
	for _, uid := range slices.Sorted(maps.Keys(c.pending)) {
		p := c.pending[uid]
		if p.files.Device == nil {
			continue // The agent tries.
		}
		files, err := p.files.dup()
		if err != nil {
			continue // Out of descriptors: later.
		}
		// An error leaves it pending again.
		_ = c.add(p.workload, files)
	}
	c.tellReady()
}
