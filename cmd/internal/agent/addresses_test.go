package agent

import (
	"net/netip"
	"slices"
	"testing"
)

func TestAddressesAreThoseSaidOrFound(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	if got := n.agent.Addresses("u"); got != nil {
		t.Errorf("addresses of nobody: %v", got)
	}
	p := podIn(ns, "u")
	p.Addresses = nil
	n.set(p)
	eventually(t, "those of its interface are known", func() bool {
		got := n.agent.Addresses("u")
		return slices.Contains(got, netip.MustParseAddr("10.0.0.2")) && slices.Contains(got, netip.MustParseAddr("fd00::2"))
	})
	p.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.2")}
	n.set(p)
	if got := n.agent.Addresses("u"); !slices.Equal(got, p.Addresses) {
		t.Errorf("addresses %v, want %v", got, p.Addresses)
	}
	n.delete("u")
	if got := n.agent.Addresses("u"); got != nil {
		t.Errorf("addresses of a pod that is gone: %v", got)
	}
}

// TestNodeAddressesFollow is about a bridge that a node's first pod brings.
func TestNodeAddressesFollow(t *testing.T) {
	n, ns := newNode(t), podNS(t)
	n.set(podIn(ns, "u"))
	proxy := n.startProxy()
	n.wait("u")
	want := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("192.168.0.1")}
	n.agent.SetNodeAddresses(want)
	eventually(t, "the proxy knows the other addresses", func() bool {
		w, ok := proxy.workload("u")
		return ok && slices.Equal(w.Device.NodeAddresses, want)
	})
}
