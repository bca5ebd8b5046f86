package podnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// txQueue is the device's queue, in packets of up to 64 KiB. The default of 500 overflows at large windows.
const txQueue = 2000

// diff is what separates a namespace from its plan.
type diff struct {
	addRules, deleteRules   []rule
	putRoutes, deleteRoutes []route
}

func (p *plan) diff(w *world) diff {
	var d diff
	have := map[rule]bool{}
	for _, r := range w.rules {
		have[r.key()] = true
	}
	want := map[rule]bool{}
	for _, r := range p.rules {
		want[r.key()] = true
		if !have[r.key()] {
			d.addRules = append(d.addRules, r)
		}
	}
	for _, r := range w.rules {
		ours := r.Protocol == ourProtocol && !r.Other
		if r.Priority == 0 && r.isLocal() || ours && !want[r.key()] {
			d.deleteRules = append(d.deleteRules, r)
		}
	}
	for _, r := range p.routes {
		if !slices.Contains(w.tables, r) {
			d.putRoutes = append(d.putRoutes, r)
		}
	}
	for _, r := range w.tables {
		replaced := slices.ContainsFunc(d.putRoutes, func(n route) bool { return n.slot() == r.slot() })
		if !slices.Contains(p.routes, r) && !replaced {
			d.deleteRoutes = append(d.deleteRoutes, r)
		}
	}
	return d
}

func (d diff) describe() []string {
	var out []string
	for _, r := range d.addRules {
		out = append(out, fmt.Sprintf("missing: %v", r))
	}
	for _, r := range d.putRoutes {
		out = append(out, fmt.Sprintf("missing: %v", r))
	}
	for _, r := range d.deleteRules {
		out = append(out, fmt.Sprintf("surplus: %v", r))
	}
	for _, r := range d.deleteRoutes {
		out = append(out, fmt.Sprintf("surplus: %v", r))
	}
	return out
}

// apply makes the changes in the order that lets no packet escape and cuts no flow: tables before the rules that use
// them, "lookup local" at its new place before it leaves the old one, and outbound capture only then, since with
// both the pod's kernel would reset the proxy's connections. What is surplus goes last.
func (k *kernel) apply(ctx context.Context, d diff) error {
	for _, r := range d.putRoutes {
		if err := k.putRoute(ctx, r); err != nil {
			return err
		}
	}
	for _, r := range d.addRules {
		if r.Priority < prioOut {
			if err := k.addRule(ctx, r); err != nil {
				return err
			}
		}
	}
	for _, r := range d.deleteRules {
		if r.Priority == 0 {
			if err := k.deleteRule(ctx, r); err != nil {
				return err
			}
		}
	}
	for _, r := range d.addRules {
		if r.Priority >= prioOut {
			if err := k.addRule(ctx, r); err != nil {
				return err
			}
		}
	}
	for _, r := range d.deleteRules {
		if r.Priority != 0 {
			if err := k.deleteRule(ctx, r); err != nil {
				return err
			}
		}
	}
	for _, r := range d.deleteRoutes {
		if err := k.deleteRoute(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// linkDiffers tells whether the device's MTU (IPv6 needs 1280) or queue is not as it should be, or it is down.
func linkDiffers(dev link, p *plan) bool {
	return dev.MTU != deviceMTU(p) || dev.TxQueue != txQueue || !dev.Up
}

func deviceMTU(p *plan) int { return int(max(p.mtu, 1280)) }

// putLink mends the device's attributes, takes stray addresses from it and brings it up.
func (k *kernel) putLink(dev link, p *plan, stray []address) error {
	if dev.MTU != deviceMTU(p) {
		if err := k.links.LinkSetMTU(dev.handle(), deviceMTU(p)); err != nil {
			return fmt.Errorf("podnet: MTU of %s: %w", dev.Name, err)
		}
	}
	if dev.TxQueue != txQueue {
		if err := k.links.LinkSetTxQLen(dev.handle(), txQueue); err != nil {
			return fmt.Errorf("podnet: queue of %s: %w", dev.Name, err)
		}
	}
	for _, a := range stray {
		ip := a.Prefix.Addr()
		del := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(a.Prefix.Bits(), ip.BitLen())}}
		if err := k.links.AddrDel(dev.handle(), del); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("podnet: address %v of %s: %w", ip, dev.Name, err)
		}
	}
	if !dev.Up {
		if err := k.links.LinkSetUp(dev.handle()); err != nil {
			return fmt.Errorf("podnet: %s up: %w", dev.Name, err)
		}
	}
	return nil
}

// localAtZero is the rule as the kernel makes it in a new namespace.
func localAtZero(family uint8) rule {
	return rule{Family: family, Action: nl.FR_ACT_TO_TBL, Table: unix.RT_TABLE_LOCAL, Protocol: unix.RTPROT_KERNEL}
}

// strip takes rules, routes and device away, inbound first to the app, then outbound past the device.
func (k *kernel) strip(ctx context.Context, cfg *Config, w *world) error {
	ours := func(r rule) bool { return r.Protocol == ourProtocol && r.Priority != 0 }
	for _, family := range w.families {
		if !slices.ContainsFunc(w.rules, func(r rule) bool { return r.Family == family && r.Priority == 0 && r.isLocal() }) {
			if err := k.addRule(ctx, localAtZero(family)); err != nil {
				return err
			}
		}
	}
	for _, r := range slices.Backward(w.rules) {
		if ours(r) {
			if err := k.deleteRule(ctx, r); err != nil {
				return err
			}
		}
	}
	for _, r := range w.tables {
		if err := k.deleteRoute(ctx, r); err != nil {
			return err
		}
	}
	if dev, ok := w.link(cfg.Device); ok {
		if err := k.links.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: dev.Index, Name: dev.Name}}); err != nil {
			return fmt.Errorf("podnet: delete %s: %w", dev.Name, err)
		}
	}
	return nil
}
