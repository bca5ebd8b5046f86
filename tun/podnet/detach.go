package podnet

import (
	"context"
	"fmt"
	"os"
	"slices"
)

// Detach ends capture, after Watch has returned. It calls resetProxied (which may be nil), by the end of which the proxy
// must refuse new flows and have reset both legs of the old ones; then lets nothing new begin, destroys every TCP
// socket of the pod that is neither loopback's nor listening nor older than capture, and only then takes rules, routes, sysctls and
// device away. It does nothing where nothing is attached or ns is nil (ErrGone).
// A zero State is one that was lost: then no flow passes for older, and sysctls get the kernel's defaults. After an error of resetProxied nothing
// was changed; a *SocketsError leaves capture in force. Detach may wait for sockets as long as ctx lets it.
func Detach(ctx context.Context, ns *os.File, st State, resetProxied func(context.Context) error) error {
	if ns == nil {
		return nil
	}
	k, err := openKernel(ns)
	if err != nil {
		return err
	}
	defer k.close()
	if !st.of(k) && st.Version != 0 {
		return nil // that namespace is gone
	}
	cfg := Config{Device: st.Device}
	if err := cfg.complete(); err != nil {
		return err
	}
	w, err := k.observe(ctx)
	if err != nil {
		return err
	}
	st = st.clone()
	if w.touched(&cfg) {
		if resetProxied != nil {
			if err := resetProxied(ctx); err != nil {
				return fmt.Errorf("podnet: detach: reset proxied flows: %w", err)
			}
		}
		if err := k.endFlows(ctx, w, st.Older); err != nil {
			return err
		}
		if st.Version == 0 {
			if err := k.guessSysctls(ctx, &cfg, &st, w); err != nil {
				return err
			}
		}
		if w, err = k.observe(ctx); err != nil {
			return err
		}
		if err := k.strip(ctx, &cfg, w); err != nil {
			return err
		}
	}
	if err := k.onSysctls(ctx, func(s sysctls) error { return restore(s, &st) }); err != nil {
		return err
	}
	return k.verifyGone(ctx, &cfg)
}

// guessSysctls fills a State that is lost with the kernel's defaults.
func (k *kernel) guessSysctls(ctx context.Context, cfg *Config, st *State, w *world) error {
	return k.onSysctls(ctx, func(s sysctls) error {
		keepForwarding(s, st)
		p := &plan{}
		p.classify(cfg, w)
		st.guess(s, settingsFor(s, cfg, w, p))
		return nil
	})
}

// endFlows destroys the proxied sockets while nothing new can begin: without the rules that lead to the device
// the backstops behind them hold. They come back if it fails.
func (k *kernel) endFlows(ctx context.Context, w *world, older []Flow) (err error) {
	var guarded []rule
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		for _, r := range guarded {
			if e := k.addRule(ctx, r); e != nil {
				err = fmt.Errorf("%w (and %w)", err, e)
			}
		}
	}()
	for _, r := range w.rules {
		leads := r.Protocol == ourProtocol && slices.Contains([]uint32{prioVirtual, prioIn, prioOut}, r.Priority)
		if !leads {
			continue
		}
		if err := k.deleteRule(ctx, r); err != nil {
			return err
		}
		guarded = append(guarded, r)
	}
	return k.destroyFlows(ctx, w, older)
}

// verifyGone reads back that nothing of ours is left.
func (k *kernel) verifyGone(ctx context.Context, cfg *Config) error {
	w, err := k.observe(ctx)
	if err != nil {
		return err
	}
	var left []string
	for _, r := range w.rules {
		if r.Protocol == ourProtocol {
			left = append(left, "surplus: "+r.String())
		}
	}
	for _, r := range w.tables {
		left = append(left, "surplus: "+r.String())
	}
	if dev, ok := w.link(cfg.Device); ok {
		left = append(left, "surplus: link "+dev.Name)
	}
	if len(left) > 0 {
		return &DriftError{Differences: left}
	}
	return nil
}
