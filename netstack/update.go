package netstack

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// An Update is what a Stack can be told anew while it runs. The fields are those
// of StackConfig.
type Update struct {
	Addrs             []netip.Addr
	BypassInbound     bool
	VirtualInterfaces bool
	IsProbe           func(src, dst netip.AddrPort, answer func(bool)) (asked bool)
}

// ErrFamily says that an Update needs an IP version that the stack was made
// without (StackConfig.Families).
var ErrFamily = errors.New("netstack: the stack was made without that IP version")

// Update serves the pod as u says from now on. Flows live on; those of an address
// that the pod has no more hear nothing. After an error nothing has changed. It
// must not be called on the loop.
func (s *Stack) Update(u Update) error {
	if len(u.Addrs) == 0 {
		return fmt.Errorf("netstack: pod %s has no address", s.cfg.Name)
	}
	err := ErrClosed
	s.onLoop(func() {
		if !s.closed {
			err = s.update(u)
		}
	})
	return err
}

// update runs on the loop.
func (s *Stack) update(u Update) error {
	for _, a := range u.Addrs {
		if !s.gv.CheckNetworkProtocol(networkProtocol(a)) {
			return fmt.Errorf("%w: %v", ErrFamily, a)
		}
	}
	if v4, v6 := s.families(); u.VirtualInterfaces && !(v4 && v6) {
		return fmt.Errorf("%w: virtual interfaces may have either", ErrFamily)
	}
	if err := s.listen(u.Addrs); err != nil {
		return err
	}
	s.listeners = slices.DeleteFunc(s.listeners, func(l *listener) bool {
		gone := !slices.Contains(u.Addrs, l.addr.Addr())
		if gone {
			l.close()
		}
		return gone
	})
	s.addrs = s.addrs[:0]
	for _, a := range u.Addrs {
		s.addrs = append(s.addrs, a.As16())
	}
	s.cfg.Addrs = slices.Clone(u.Addrs)
	s.cfg.BypassInbound, s.cfg.VirtualInterfaces, s.cfg.IsProbe = u.BypassInbound, u.VirtualInterfaces, u.IsProbe
	return nil
}
