package podnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// world is what was read of a namespace at one time.
type world struct {
	families []uint8
	links    []link
	addrs    []address
	// main, local are those tables; tables are ours, whatever is in them.
	main, local, tables []route
	rules               []rule
	// forwards tells whether the pod forwards by its own will, per family.
	forwards map[uint8]bool
}

// address of an interface.
type address struct {
	Link      int
	Prefix    netip.Prefix // the address itself, with the length of its subnet
	Scope     uint8
	Secondary bool
}

func (a address) family() uint8 { return familyOf(a.Prefix.Addr()) }

func familyOf(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func (w *world) link(name string) (link, bool) {
	for _, l := range w.links {
		if l.Name == name {
			return l, true
		}
	}
	return link{}, false
}

func (w *world) linkAt(index int) (link, bool) {
	for _, l := range w.links {
		if l.Index == index {
			return l, true
		}
	}
	return link{}, false
}

func (w *world) addrsOf(l link) []address {
	var out []address
	for _, a := range w.addrs {
		if a.Link == l.Index {
			out = append(out, a)
		}
	}
	return out
}

// observe reads the namespace. Forwarding is read from sysctls by sysctls.go.
func (k *kernel) observe(ctx context.Context) (*world, error) {
	w := &world{families: k.families(), forwards: map[uint8]bool{}}
	var err error
	if w.links, err = k.listLinks(); err != nil {
		return nil, err
	}
	if w.addrs, err = k.listAddrs(); err != nil {
		return nil, err
	}
	for _, family := range w.families {
		rules, err := k.rules(ctx, family)
		if err != nil {
			return nil, err
		}
		w.rules = append(w.rules, rules...)
		routes, err := k.routes(ctx, family, func(table uint32) bool {
			return table == unix.RT_TABLE_MAIN || table == unix.RT_TABLE_LOCAL || table == captureTable || table == boundTable
		})
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			switch r.Table {
			case unix.RT_TABLE_MAIN:
				w.main = append(w.main, r)
			case unix.RT_TABLE_LOCAL:
				w.local = append(w.local, r)
			default:
				w.tables = append(w.tables, r)
			}
		}
	}
	return w, nil
}

func (k *kernel) listAddrs() ([]address, error) {
	list, err := k.links.AddrList(nil, netlink.FAMILY_ALL)
	for try := 1; errors.Is(err, netlink.ErrDumpInterrupted) && try < dumpTries; try++ {
		list, err = k.links.AddrList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		return nil, fmt.Errorf("podnet: list addresses: %w", err)
	}
	var addrs []address
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		bits, _ := a.Mask.Size()
		addrs = append(addrs, address{
			Link: a.LinkIndex, Prefix: netip.PrefixFrom(ip.Unmap(), bits), Scope: uint8(a.Scope),
			Secondary: a.Flags&unix.IFA_F_SECONDARY != 0,
		})
	}
	return addrs, nil
}

// isLocal tells whether packets to ip stay in the pod.
func (w *world) isLocal(ip netip.Addr) bool {
	if ip.IsLoopback() {
		return true
	}
	for _, a := range w.addrs {
		if a.Prefix.Addr() == ip {
			return true
		}
	}
	for _, r := range w.local {
		if r.Type == unix.RTN_LOCAL && r.Dst.Contains(ip) {
			return true
		}
	}
	return false
}
