package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// A scene is all that a network namespace's processes can see of how it is set
// up, a line each: interfaces, addresses, rules, routes of all tables, sysctls.
type scene map[string]bool

// scene reads that of a running pod.
func (p *place) scene(o *corev1.Pod) (s scene) {
	p.t.Helper()
	// What is taken away meanwhile may vanish between its name and its content.
	p.wait("a look at the network of "+o.Name, func() error {
		s = scene{}
		return inside("/proc/"+p.process(o)+"/ns/net", s.read)
	})
	return s
}

// inside runs f on a thread in a network namespace. The thread ends after it.
func inside(file string, f func() error) error {
	ns, err := os.Open(file)
	if err != nil {
		return err
	}
	defer ns.Close()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends a thread that is left so
		err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

func (s scene) read() error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		a := l.Attrs()
		s[fmt.Sprintf("link %d %s %s mtu %d %v", a.Index, a.Name, l.Type(), a.MTU, a.Flags)] = true
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			s[fmt.Sprintf("address %v flags %#x scope %d", a, a.Flags, a.Scope)] = true
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			return err
		}
		for _, r := range rules {
			s[fmt.Sprintf("rule %d %v", family, r)] = true
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			s[fmt.Sprintf("route %d %v", family, r)] = true
		}
	}
	for _, dir := range []string{"ipv4", "ipv6", "core"} {
		if err := s.sysctls("/proc/sys/net/" + dir); err != nil {
			return err
		}
	}
	return nil
}

// sysctls reads what /proc shows a thread of its own network namespace.
func (s scene) sysctls(dir string) error {
	return filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if value, err := os.ReadFile(file); err == nil { // Some can only be written.
			s[file+" = "+strings.TrimSpace(string(value))] = true
		}
		return nil
	})
}

// without lists what s has and o has not.
func (s scene) without(o scene) (lines []string) {
	for line := range s {
		if !o[line] {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return lines
}

// sameAs is nil if both are equal, else what is there too much and what is missing.
func (s scene) sameAs(before scene) error {
	more, less := s.without(before), before.without(s)
	if len(more) == 0 && len(less) == 0 {
		return nil
	}
	return fmt.Errorf("too much: %q; missing: %q", more, less)
}
