package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/time/rate"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

// Config is what an Installer needs. The zero value of a field is the default
// named on it.
type Config struct {
	// Binary is the plugin to install. Required.
	Binary string
	// BinDir and NetDir are the runtime's folders of plugins and of network
	// configurations, as the agent sees them. Required.
	BinDir, NetDir string
	// ConfName is the file in NetDir to edit. Default: the first that is
	// valid, which is what runtimes take; unchained: YYY-ztun-cni.conf.
	ConfName string
	// Unchained writes a configuration of the plugin alone, for a runtime's
	// meta plugin that is told per pod which ones to run.
	Unchained bool
	// Owned leaves the chain of others alone and keeps a copy with our entry in
	// a file of our own, OwnedName, that sorts before it. It stays when a node
	// reboots, so that no pod starts before the agent does.
	Owned     bool
	OwnedName string // 02-ztun-cni.conflist
	// GroupRead makes new files readable by the group.
	GroupRead bool
	// Entry is the plugin's entry; its Type is filled in.
	Entry wire.Conf
	// Log. Nil: nothing is logged.
	Log *slog.Logger

	// Every and Recheck are for tests. 5 s between two installations, 10 s
	// between two looks without a notice of the kernel.
	Every, Recheck time.Duration
}

const (
	defaultOwned     = "02-ztun-cni.conflist"
	defaultUnchained = "YYY-ztun-cni.conf"
	// warnAfter is how many installations have to wait in a row before that is
	// worth a word.
	warnAfter = 5
)

// Results of an installation, as Istio's agent counts them.
const (
	ResultSuccess = "SUCCESS"
	ResultBinary  = "COPY_BINARIES_FAILURE"
	ResultConf    = "CREATE_CNI_CONFIG_FAILURE"
)

// errWaiting says that there is nothing to put the plugin into yet.
var errWaiting = errors.New("no network configuration yet")

// An Installer keeps the plugin installed. Run and Remove must not run at the
// same time.
type Installer struct {
	// Set by NewInstaller, read-only after.
	cfg     Config
	log     *slog.Logger
	limiter *rate.Limiter

	// Owned by Run and Remove.
	binary    *binary
	throttled int

	// mu guards the fields below.
	mu     sync.Mutex
	ready  bool
	err    error
	counts map[string]uint64
}

// NewInstaller checks cfg. Run does the work.
func NewInstaller(cfg Config) (*Installer, error) {
	if cfg.Binary == "" || cfg.BinDir == "" || cfg.NetDir == "" {
		return nil, errors.New("cni: config: Binary, BinDir and NetDir are required")
	}
	if cfg.Owned && cfg.Unchained {
		return nil, errors.New("cni: config: a list of our own is a chain: Owned and Unchained exclude each other")
	}
	if cfg.OwnedName == "" {
		cfg.OwnedName = defaultOwned
	}
	if cfg.Unchained && cfg.ConfName == "" {
		cfg.ConfName = defaultUnchained
	}
	for _, name := range []string{cfg.ConfName, cfg.OwnedName} {
		if name != "" && (name != filepath.Base(name) || !isConf(name)) {
			return nil, fmt.Errorf("cni: config: %q is not the name of a .conf or .conflist file", name)
		}
	}
	if cfg.Owned && filepath.Ext(cfg.OwnedName) != ".conflist" {
		return nil, fmt.Errorf("cni: config: the list of our own is named %q, which is not a .conflist", cfg.OwnedName)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Every == 0 {
		cfg.Every = 5 * time.Second
	}
	if cfg.Recheck == 0 {
		cfg.Recheck = 10 * time.Second
	}
	cfg.Entry.Type, cfg.Entry.WrappedFrom, cfg.Entry.Owned = wire.PluginType, "", cfg.Owned
	return &Installer{
		cfg: cfg, log: cfg.Log, limiter: rate.NewLimiter(rate.Every(cfg.Every), 1),
		binary: newBinary(cfg.Binary, cfg.BinDir), counts: map[string]uint64{},
	}, nil
}

// Ready reports whether plugin and entry were in place when last looked at,
// and are watched.
func (in *Installer) Ready() bool { return in.Err() == nil && in.isReady() }

func (in *Installer) isReady() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.ready
}

// Err is what keeps the Installer from being ready; nil also before its first
// look.
func (in *Installer) Err() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.err
}

// Counts is how many installations there were, by result.
func (in *Installer) Counts() map[string]uint64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return maps.Clone(in.counts)
}

// Run installs, watches and installs again until ctx ends. What it finds wrong
// is in Err and the log; it tries on.
func (in *Installer) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("cni: watch (fs.inotify.max_user_instances may be too low): %w", err)
	}
	defer w.Close()
	recheck := time.NewTicker(in.cfg.Recheck)
	defer recheck.Stop()
	for ctx.Err() == nil {
		// Adding again is no error, and finds a folder that was made anew.
		watchErr := errors.Join(w.Add(in.cfg.BinDir), w.Add(in.cfg.NetDir))
		result, err := in.look(ctx)
		if ctx.Err() != nil {
			break
		}
		if err == nil && watchErr != nil {
			err = fmt.Errorf("cni: watch: %w", watchErr)
		}
		in.note(result, err)
		select {
		case <-ctx.Done():
		case <-recheck.C:
		case err := <-w.Errors:
			in.log.Warn("watching the CNI folders", "error", err) // Events were lost, for one: look again.
		case <-w.Events:
			drain(w.Events)
		}
	}
	in.setReady(false)
	return nil
}

// drain takes what is there: one look is enough for all of it.
func drain(events <-chan fsnotify.Event) {
	for {
		select {
		case <-events:
		default:
			return
		}
	}
}

func (in *Installer) setReady(ready bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ready = ready
}

// note makes the outcome of a look visible. result is empty if nothing had to
// be installed.
func (in *Installer) note(result string, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	same := err != nil && in.err != nil && in.err.Error() == err.Error()
	in.err = err
	in.ready = err == nil
	if result != "" && !same {
		in.counts[result]++
	}
	switch {
	case same:
	case errors.Is(err, errWaiting):
		in.log.Info("the plugin waits to be installed", "reason", err)
	case err != nil:
		in.log.Error("the plugin is not installed: new pods may start without the mesh", "error", err)
	case result != "":
		in.log.Info("the plugin is installed", "binary", in.binary.target, "folder", in.cfg.NetDir)
	}
}

// look compares what is there with what has to be, and installs the difference.
// result is empty if there was none.
func (in *Installer) look(ctx context.Context) (result string, err error) {
	changes, err := in.plan()
	if err != nil {
		return resultOf(err), err
	}
	if len(changes) == 0 && in.binary.current() {
		in.throttled = 0
		return "", nil
	}
	in.setReady(false)
	if err := in.throttle(ctx); err != nil {
		return "", err
	}
	if !in.binary.current() {
		// First, so that no chain names what is not there.
		if err := in.binary.install(); err != nil {
			return ResultBinary, err
		}
	}
	if changes, err = in.plan(); err != nil { // It may have changed while we waited.
		return resultOf(err), err
	}
	for _, c := range changes {
		if err := c.apply(); err != nil {
			return ResultConf, err
		}
	}
	return ResultSuccess, nil
}

func resultOf(err error) string {
	if errors.Is(err, errWaiting) {
		return ""
	}
	return ResultConf
}

// throttle keeps two agents that undo each other's work from doing nothing
// else.
func (in *Installer) throttle(ctx context.Context) error {
	if in.limiter.Allow() {
		return nil
	}
	if in.throttled++; in.throttled == warnAfter {
		in.log.Warn("something on this node keeps removing the plugin: a CNI that wants to be alone has a setting for that (Cilium: cni.exclusive=false)",
			"folder", in.cfg.NetDir)
	}
	return in.limiter.Wait(ctx)
}
