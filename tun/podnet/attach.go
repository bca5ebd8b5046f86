package podnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/ztun/ztun/tun"
	"golang.org/x/sys/unix"
)

// cleanupTimeout bounds what must be done although ctx ended.
const cleanupTimeout = 10 * time.Second

// nsfsMagic is the file system that namespaces live in (linux/magic.h).
const nsfsMagic = 0x6e736673

// OpenNetns opens a namespace by path (/proc/PID/ns/net, /run/netns/NAME). The error matches ErrGone if there is none.
func OpenNetns(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil, fmt.Errorf("%w: %s", ErrGone, path)
	}
	if err != nil {
		return nil, fmt.Errorf("podnet: open namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != nsfsMagic {
		// The file that a namespace was mounted on stays behind when the mount goes.
		_ = f.Close()
		return nil, fmt.Errorf("%w: %s is not mounted", ErrGone, path)
	}
	return f, nil
}

// Attachment is one pod on its device.
type Attachment struct {
	// File is the packet descriptor, blocking, of which the caller is the owner. Nil after a Resume while somebody reads the device.
	File *os.File
	// Offload says that super-segments and partial checksums cross File. False without File.
	Offload bool

	// Set by Attach, read-only after.
	cfg Config
	log *slog.Logger

	// mu guards the fields below, and is held through each pass over the namespace.
	mu     sync.Mutex
	kernel *kernel // nil once closed
	state  State
	lost   bool // the namespace was changed by an Attachment whose state is not known
	stats  Stats
}

// Attach captures the pod. prev is what an earlier Attachment of this namespace left, or nil where there was none or Detach
// has ended it. Attaching twice, or again with
// another Config, ends in the same state as doing it once. The error matches tun.ErrBusy if somebody reads the device
// already, and is a *CollisionError if the namespace has rules or routes in the way; in both cases nothing was changed.
// On any other error what was done is undone, unless something was attached before.
//
// A namespace in which something is attached already, without prev to say since when, has no older flows: every segment of a flow that the
// proxy does not know gets a reset.
func Attach(ctx context.Context, ns *os.File, cfg Config, prev *State) (*Attachment, error) {
	return attach(ctx, ns, cfg, prev, false)
}

// Resume is Attach for an agent that was started again: a device that a proxy reads stays with it, and File is nil.
func Resume(ctx context.Context, ns *os.File, cfg Config, prev State) (*Attachment, error) {
	return attach(ctx, ns, cfg, &prev, true)
}

func attach(ctx context.Context, ns *os.File, cfg Config, prev *State, mayBeBusy bool) (_ *Attachment, err error) {
	if ns == nil {
		return nil, ErrGone
	}
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	k, err := openKernel(ns)
	if err != nil {
		return nil, err
	}
	a := &Attachment{cfg: cfg, log: cfg.Logger, kernel: k, stats: Stats{Repairs: map[string]uint64{}}}
	defer func() {
		if err != nil {
			k.close()
		}
	}()
	w, err := k.observe(ctx)
	if err != nil {
		return nil, err
	}
	if what := w.collision(&a.cfg); what != "" {
		return nil, &CollisionError{What: what}
	}
	dev, exists := w.link(cfg.Device)
	known := prev != nil && prev.of(k)
	a.lost = exists && !known
	wasTouched := w.touched(&cfg)
	a.state = State{Version: stateVersion, Device: cfg.Device, Boot: k.boot, Netns: k.cookie}
	if known {
		a.state.Sysctls, a.state.Older = slices.Clone(prev.Sysctls), prev.Older
	}
	a.state.CaptureDNS, a.state.BypassInbound = cfg.CaptureDNS, cfg.BypassInbound
	a.state.VirtualInterfaces = slices.Clone(cfg.VirtualInterfaces)

	if exists {
		err = k.inside(func() error { a.File, a.Offload, err = tun.Open(dev.Name); return err })
		if err != nil && !(mayBeBusy && errors.Is(err, tun.ErrBusy)) {
			return nil, err
		}
	}
	if err = a.establish(ctx); err == nil {
		err = a.findOlder(ctx, known, wasTouched)
	}
	if err != nil {
		a.undo(ctx, wasTouched)
		return nil, err
	}
	return a, nil
}

// establish brings the namespace to its plan and reads it back.
func (a *Attachment) establish(ctx context.Context) error {
	for pass := 1; ; pass++ {
		if _, err := a.pass(ctx); err != nil {
			return err
		}
		err := a.verify(ctx)
		var drift *DriftError
		// Others may change it meanwhile, and addresses come late.
		if err == nil || !errors.As(err, &drift) || pass == 3 {
			return err
		}
	}
}

// findOlder lists flows only in a fresh namespace: a list made later would hold proxied flows, which would then be
// forwarded in plain text.
func (a *Attachment) findOlder(ctx context.Context, known, wasTouched bool) error {
	w, err := a.kernel.observe(ctx)
	if err != nil {
		return err
	}
	sockets, err := a.kernel.flows(ctx, w)
	if err != nil {
		return err
	}
	switch {
	case known:
		a.state.Older = stillThere(a.state.Older, sockets)
	case wasTouched:
		a.state.Older = nil
	default:
		a.state.Older = olderFlows(sockets)
	}
	return nil
}

// undo takes back what a failed Attach did, unless it was not the first: then capture stays.
func (a *Attachment) undo(ctx context.Context, wasTouched bool) {
	if a.File != nil {
		_ = a.File.Close()
		a.File = nil
	}
	if wasTouched {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	w, err := a.kernel.observe(ctx)
	if err == nil {
		err = a.kernel.strip(ctx, &a.cfg, w)
	}
	if err == nil {
		err = a.kernel.onSysctls(ctx, func(s sysctls) error { return restore(s, &a.state) })
	}
	if err != nil {
		a.log.Error("podnet: undo of a failed attach", "error", err)
	}
}

func (c *Config) complete() error {
	if c.Device == "" {
		c.Device = DefaultDevice
	}
	if c.Recheck <= 0 {
		c.Recheck = 10 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.VirtualInterfaces = slices.Compact(slices.Sorted(slices.Values(c.VirtualInterfaces)))
	return c.Validate()
}

// maxVirtualInterfaces bounds Config.VirtualInterfaces.
const maxVirtualInterfaces = 32

// Validate reports every problem of the Config.
func (c *Config) Validate() error {
	var errs []error
	if c.Device != "" && !validName(c.Device) {
		errs = append(errs, fmt.Errorf("podnet: device name %q is not possible", c.Device))
	}
	if n := len(c.VirtualInterfaces); n > maxVirtualInterfaces {
		errs = append(errs, fmt.Errorf("podnet: %d virtual interfaces are more than %d", n, maxVirtualInterfaces))
	}
	for _, name := range c.VirtualInterfaces {
		if !validName(name) || name == loopback || name == c.Device {
			errs = append(errs, fmt.Errorf("podnet: virtual interface %q is not possible", name))
		}
	}
	return errors.Join(errs...)
}

// of tells whether the state is one of this very namespace.
func (st *State) of(k *kernel) bool {
	return st.Version == stateVersion && (st.Boot == "" || k.boot == "" || st.Boot == k.boot) &&
		(st.Netns == 0 || k.cookie == 0 || st.Netns == k.cookie)
}

// Addrs are the pod's addresses, link-local IPv6 and loopback left out, in the order of the kernel.
func (a *Attachment) Addrs() []netip.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.state.Addrs)
}

// MTU is the smallest MTU of the pod's interfaces: the largest packet that leaves the pod whole.
func (a *Attachment) MTU() uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.MTU
}

// Older are the TCP flows that are older than capture and were still there when the Attachment was made.
func (a *Attachment) Older() []Flow {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.state.Older)
}

// State is what a later Attach, Resume or Detach needs. It changes while Watch runs; store it after each OnChange.
func (a *Attachment) State() State {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.clone()
}

// Close lets go of the namespace, after Watch has returned. It changes nothing in it, and does not close File.
func (a *Attachment) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kernel != nil {
		a.kernel.close()
		a.kernel = nil
	}
	return nil
}
