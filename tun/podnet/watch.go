package podnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/ztun/ztun/tun"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// Kinds of repairs, as Stats counts them.
const (
	repairRule   = "rule"
	repairRoute  = "route"
	repairSysctl = "sysctl"
	repairLink   = "link"
	repairDevice = "device"
)

// A pod that fights over its rules is answered this often.
const (
	passEvery = 50 * time.Millisecond
	passBurst = 20
	// retryFailed is when a pass that failed is tried again without an event.
	retryFailed = time.Second
)

// errClosed is what the methods of a closed Attachment return.
var errClosed = fmt.Errorf("podnet: attachment: %w", os.ErrClosed)

// passed is what one pass over the namespace did.
type passed struct {
	repairs map[string]int
	// file is the new device's, if it had to be made.
	file    *os.File
	offload bool
	// changed says that the State differs from before.
	changed bool
}

func (r *passed) count(kind string, n int) {
	if n > 0 {
		r.repairs[kind] += n
	}
}

// pass compares the namespace with its plan and mends the difference. The caller of the first one holds the only reference
// to a; later ones hold mu.
func (a *Attachment) pass(ctx context.Context) (*passed, error) {
	r := &passed{repairs: map[string]int{}}
	saved := len(a.state.Sysctls)
	w, err := a.kernel.observe(ctx)
	if err != nil {
		return r, err
	}
	if _, ok := w.link(a.cfg.Device); !ok {
		if err := a.makeDevice(r, w); err != nil {
			return r, err
		}
		if w, err = a.kernel.observe(ctx); err != nil {
			return r, err
		}
	}
	var p *plan
	err = a.kernel.onSysctls(ctx, func(s sysctls) error {
		keepForwarding(s, &a.state)
		if a.lost {
			p := &plan{}
			p.classify(&a.cfg, w)
			a.state.guess(s, settingsFor(s, &a.cfg, w, p))
		}
		w.forwards = a.state.forwards(s, w, &a.cfg)
		if p, err = planFor(&a.cfg, w); err != nil {
			return err
		}
		n, err := putSettings(s, &a.state, settingsFor(s, &a.cfg, w, p))
		r.count(repairSysctl, n)
		return err
	})
	if err != nil {
		return r, err
	}
	if dev, ok := w.link(a.cfg.Device); ok {
		stray := w.addrsOf(dev)
		if linkDiffers(dev, p) || len(stray) > 0 {
			r.count(repairLink, 1)
			if err := a.kernel.putLink(dev, p, stray); err != nil {
				return r, err
			}
		}
	}
	d := p.diff(w)
	r.count(repairRule, len(d.addRules)+len(d.deleteRules))
	r.count(repairRoute, len(d.putRoutes)+len(d.deleteRoutes))
	if err := a.kernel.apply(ctx, d); err != nil {
		return r, err
	}
	r.changed = a.state.MTU != p.mtu || !slices.Equal(a.state.Addrs, p.addrs) || len(a.state.Sysctls) != saved
	a.state.Addrs, a.state.MTU = p.addrs, p.mtu
	a.stats.Foreign = len(w.foreignRules())
	return r, nil
}

func (a *Attachment) makeDevice(r *passed, w *world) error {
	p := &plan{}
	p.classify(&a.cfg, w)
	p.addresses(&a.cfg, w)
	err := a.kernel.inside(func() (err error) {
		r.file, r.offload, err = tun.Create(a.cfg.Device, uint32(deviceMTU(p)))
		return err
	})
	if err != nil {
		return err
	}
	r.count(repairDevice, 1)
	if a.File == nil {
		a.File, a.Offload = r.file, r.offload
	}
	return nil
}

// Verify reads everything back. The error is a *DriftError if anything differs.
func (a *Attachment) Verify(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kernel == nil {
		return errClosed
	}
	return a.verify(ctx)
}

func (a *Attachment) verify(ctx context.Context) error {
	w, err := a.kernel.observe(ctx)
	if err != nil {
		return err
	}
	dev, ok := w.link(a.cfg.Device)
	if !ok {
		return &DriftError{Differences: []string{"missing: link " + a.cfg.Device}}
	}
	var differences []string
	err = a.kernel.onSysctls(ctx, func(s sysctls) error {
		w.forwards = a.state.forwards(s, w, &a.cfg)
		p, err := planFor(&a.cfg, w)
		if err != nil {
			return err
		}
		if stray := w.addrsOf(dev); linkDiffers(dev, p) || len(stray) > 0 {
			differences = append(differences, fmt.Sprintf("link %s: MTU %d, queue %d, up %v, %d addresses", dev.Name, dev.MTU, dev.TxQueue, dev.Up, len(stray)))
		}
		for _, d := range differing(s, settingsFor(s, &a.cfg, w, p)) {
			have, _ := s.read(d.Path)
			differences = append(differences, fmt.Sprintf("sysctl %s is %q, not %q", d.Path, have, d.Value))
		}
		differences = append(differences, p.diff(w).describe()...)
		return nil
	})
	if err != nil {
		return err
	}
	for _, r := range w.foreignRules() {
		differences = append(differences, fmt.Sprintf("foreign: %v", r))
	}
	if len(differences) > 0 {
		return &DriftError{Differences: differences}
	}
	return nil
}

// Stats returns the counts so far.
func (a *Attachment) Stats() Stats {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.stats
	s.Repairs = maps.Clone(s.Repairs)
	return s
}

// Watch repairs whatever changes, until ctx ends (its cause is returned) or the namespace cannot be watched any more.
func (a *Attachment) Watch(ctx context.Context) error {
	a.mu.Lock()
	if a.kernel == nil {
		a.mu.Unlock()
		return errClosed
	}
	events, err := a.kernel.subscribe()
	a.mu.Unlock()
	if err != nil {
		return err
	}
	defer func() { _ = events.file.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = events.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	limit := rate.NewLimiter(rate.Every(passEvery), passBurst)
	for {
		if err := limit.Wait(ctx); err != nil {
			return context.Cause(ctx)
		}
		next := a.cfg.Recheck
		if !a.repair(ctx) {
			next = min(next, retryFailed)
		}
		if err := events.wait(ctx, next); err != nil {
			return err
		}
	}
}

// repair is one pass of Watch. It tells whether all is well.
func (a *Attachment) repair(ctx context.Context) bool {
	a.mu.Lock()
	if a.kernel == nil {
		a.mu.Unlock()
		return false
	}
	r, err := a.pass(ctx)
	a.stats.Checks++
	for kind, n := range r.repairs {
		a.stats.Repairs[kind] += uint64(n)
	}
	if err != nil && ctx.Err() == nil {
		a.stats.Failures++
	}
	change := Change{File: r.file, Offload: r.offload, Addrs: slices.Clone(a.state.Addrs), MTU: a.state.MTU}
	foreign := a.stats.Foreign
	a.mu.Unlock()

	if len(r.repairs) > 0 {
		a.log.Warn("podnet: namespace was changed and repaired", "repairs", r.repairs, "foreign_rules", foreign)
	}
	if err != nil && ctx.Err() == nil {
		a.log.Error("podnet: repair", "error", err)
	}
	if r.file != nil && a.cfg.OnChange == nil {
		_ = r.file.Close()
	}
	if a.cfg.OnChange != nil && (r.changed || r.file != nil) {
		a.cfg.OnChange(change)
	}
	return err == nil
}

// events tells of changes in the namespace, without saying which.
type events struct{ file *os.File }

// Multicast groups of rtnetlink (linux/rtnetlink.h).
var eventGroups = []int{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
}

func (k *kernel) subscribe() (*events, error) {
	fd := -1
	err := k.inside(func() (err error) {
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		for _, g := range eventGroups {
			if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, fmt.Errorf("podnet: watch namespace: %w", err)
	}
	return &events{file: os.NewFile(uintptr(fd), "rtnetlink")}, nil
}

// wait returns at the next event, after it has taken all that are there, or after a time, or when ctx ends.
func (e *events) wait(ctx context.Context, most time.Duration) error {
	if err := e.file.SetReadDeadline(time.Now().Add(most)); err != nil {
		return err
	}
	if ctx.Err() != nil { // its AfterFunc may have come before the deadline above
		return context.Cause(ctx)
	}
	rc, err := e.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	some := false
	buf := make([]byte, 1<<16)
	err = rc.Read(func(fd uintptr) bool {
		for range 10_000 {
			_, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				return some
			case err != nil && !errors.Is(err, unix.ENOBUFS): // ENOBUFS: events were lost
				failed = err
				return true
			}
			some = true
		}
		return true
	})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case failed != nil:
		return fmt.Errorf("podnet: watch namespace: %w", failed)
	case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("podnet: watch namespace: %w", err)
	}
	return nil
}
