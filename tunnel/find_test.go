package tunnel

import (
	"net/netip"
	"testing"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
)

var (
	hostAddr = netip.MustParseAddr("10.0.0.2")
	hostID   = identity.MustParse("spiffe://cluster.local/ns/default/sa/b")
)

// host is a workload and a Pod that serves it, and route the way there.
func host() (*mesh.Workload, *Pod, mesh.Route) {
	w := &mesh.Workload{UID: "b", Addrs: []netip.Addr{hostAddr}, Identity: hostID, Reach: mesh.Reach{Protocol: mesh.ProtocolHBONE}}
	w.Network = "n"
	p := &Pod{cfg: Config{Neighbours: NewNeighbours()}, self: &self{workload: w}}
	p.SetAddrs([]netip.Addr{hostAddr})
	return w, p, mesh.Route{
		Kind: mesh.HBONE, Peer: w, Identities: []identity.ID{hostID},
		Dial: netip.AddrPortFrom(hostAddr, TunnelPort), Target: netip.AddrPortFrom(hostAddr, 80),
	}
}

// Only a route that leads straight to a pod of this process finds it.
func TestFind(t *testing.T) {
	for name, change := range map[string]func(*mesh.Route, *Pod){
		"":                 func(*mesh.Route, *Pod) {},
		"plain":            func(r *mesh.Route, _ *Pod) { r.Kind = mesh.TCP },
		"another workload": func(r *mesh.Route, _ *Pod) { w := *r.Peer; w.UID = "c"; r.Peer = &w },
		"its own HBONE":    func(r *mesh.Route, _ *Pod) { w := *r.Peer; w.NativeTunnel = true; r.Peer = &w },
		"another port":     func(r *mesh.Route, _ *Pod) { r.Dial = netip.AddrPortFrom(hostAddr, 15009) },
		"on behalf of somebody": func(r *mesh.Route, _ *Pod) {
			r.Target = netip.MustParseAddrPort("10.0.0.3:80")
		},
		"another address": func(r *mesh.Route, _ *Pod) {
			other := netip.MustParseAddr("10.0.0.3")
			r.Dial, r.Target = netip.AddrPortFrom(other, TunnelPort), netip.AddrPortFrom(other, 80)
		},
		"it has another address now": func(_ *mesh.Route, p *Pod) { p.SetAddrs([]netip.Addr{netip.MustParseAddr("10.0.0.3")}) },

		"it drains":      func(_ *mesh.Route, p *Pod) { p.draining = true; p.publish() },
		"it is closed":   func(_ *mesh.Route, p *Pod) { p.closed = true; p.publish() },
		"it is not told": func(_ *mesh.Route, p *Pod) { p.self = &self{}; p.publish() },
	} {
		_, p, r := host()
		p.publish()
		change(&r, p)
		if got := p.cfg.Neighbours.find(&r); (got != nil) != (name == "") {
			t.Errorf("%q: found %v", name, got != nil)
		}
	}
	_, _, r := host()
	if (*Neighbours)(nil).find(&r) != nil {
		t.Error("found without neighbours")
	}
}

// An heir of the same name is found, also when its predecessor leaves late.
func TestFindTheHeir(t *testing.T) {
	_, old, r := host()
	_, heir, _ := host()
	heir.cfg.Neighbours = old.cfg.Neighbours
	old.publish()
	heir.publish()
	old.closed = true
	old.publish()
	if got := old.cfg.Neighbours.find(&r); got != heir {
		t.Errorf("found %p, want the heir, %p", got, heir)
	}
}

// The host takes a visit only if it is what the source thinks it is.
func TestMeans(t *testing.T) {
	for name, change := range map[string]func(w *mesh.Workload){
		"":                 func(*mesh.Workload) {},
		"another workload": func(w *mesh.Workload) { w.UID = "c" },
		"another network":  func(w *mesh.Workload) { w.Network = "m" },
		"plain":            func(w *mesh.Workload) { w.Protocol = mesh.ProtocolTCP },
		"another address":  func(w *mesh.Workload) { w.Addrs = []netip.Addr{netip.MustParseAddr("10.0.0.3")} },
		"another identity": func(w *mesh.Workload) { w.Identity = identity.MustParse("spiffe://cluster.local/ns/default/sa/c") },
	} {
		_, _, r := host()
		now, _, _ := host()
		change(now)
		v := &visit{route: r, network: "n"}
		if got := v.means(&self{workload: now}); got != (name == "") {
			t.Errorf("%q: means = %v", name, got)
		}
	}
	_, _, r := host()
	if v := (&visit{route: r, network: "n"}); v.means(&self{}) {
		t.Error("means a workload that is not known")
	}
}
