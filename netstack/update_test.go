package netstack

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ztun/ztun/tun"
)

var (
	pod2    = netip.MustParseAddr("10.0.0.9")
	client6 = netip.MustParseAddrPort("[fd00::7]:4711")
)

// A pod that gets another address, or settings, keeps its connections.
func TestUpdateKeepsFlows(t *testing.T) {
	r := newRig(t, StackConfig{Addrs: []netip.Addr{pod}})
	app, proxy := r.establish(netip.AddrPortFrom(pod, 0), service)
	if err := r.proxy.Update(Update{Addrs: []netip.Addr{pod, pod2}}); err != nil {
		t.Fatal(err)
	}
	late, lateProxy := r.establish(netip.AddrPortFrom(pod2, 0), service)
	for _, c := range []struct{ from, to *call }{{app, proxy}, {late, lateProxy}, {lateProxy, late}, {proxy, app}} {
		if _, err := c.from.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := c.to.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Fatalf("read %d bytes, %v", n, err)
		}
	}
}

// wantTunnels tries the TunnelPort of addresses in turn, each from a client of its
// family: of open ones a SYN-ACK is what comes next, of the others nothing.
func (r *rawRig) wantTunnels(open, closed []netip.Addr) {
	r.t.Helper()
	for i, a := range append(closed, open...) {
		from := map[bool]netip.AddrPort{true: client, false: client6}[a.Is4()]
		to := netip.AddrPortFrom(a, TunnelPort)
		r.write(tun.Header{}, segment(from, to, flagSYN, 1, 0, nil))
		if i < len(closed) {
			continue
		}
		b, _ := r.read()
		// What is closed would have answered before.
		if src := parsePacket(b, len(b)).tuple.source(); src != to || flagsOf(b) != flagSYN|flagACK {
			r.t.Errorf("after a SYN to %v: flags %#x from %v, want its SYN-ACK", to, flagsOf(b), src)
		}
		r.write(tun.Header{}, segment(from, to, flagRST, 2, 0, nil))
	}
}

func TestUpdateOfAddresses(t *testing.T) {
	r := newRawRig(t, StackConfig{Addrs: []netip.Addr{pod}, Families: []netip.Addr{pod6}})
	r.wantTunnels([]netip.Addr{pod}, []netip.Addr{pod6, pod2})
	if err := r.stack.Update(Update{Addrs: []netip.Addr{pod6, pod2}}); err != nil {
		t.Fatal(err)
	}
	r.wantTunnels([]netip.Addr{pod6, pod2}, []netip.Addr{pod})
	if len(r.stack.listeners) != 2 {
		t.Errorf("%d listeners", len(r.stack.listeners))
	}
}

func TestUpdateOfSettings(t *testing.T) {
	r := newRawRig(t, StackConfig{Addrs: []netip.Addr{pod}})
	server := netip.AddrPortFrom(pod, 80)
	asked := make(chan bool, 8)
	on(r.stack, r.handler, func(h *hooks) { h.tcp = func(q *Request) { asked <- q.Inbound(); q.Refuse(RefuseSilent) } })
	syn := func() []byte { return segment(client, server, flagSYN, 1, 0, nil) }
	if r.passes(syn()) || !<-asked {
		t.Error("plaintext passes a pod that is captured")
	}
	if err := r.stack.Update(Update{Addrs: []netip.Addr{pod}, BypassInbound: true}); err != nil {
		t.Fatal(err)
	}
	if !r.passes(syn()) {
		t.Error("plaintext does not pass a pod that bypasses capture")
	}
	probes := 0
	isProbe := func(_, _ netip.AddrPort, _ func(bool)) bool { probes++; return false }
	if err := r.stack.Update(Update{Addrs: []netip.Addr{pod}, IsProbe: isProbe}); err != nil {
		t.Fatal(err)
	}
	if !r.passes(segment(client, server, flagACK, 2, 2, []byte("x"))) {
		t.Error("a connection that began past the proxy is cut")
	}
	other := netip.AddrPortFrom(client.Addr(), 4712)
	if r.passes(segment(other, server, flagSYN, 1, 0, nil)) || !<-asked || do(r.stack.Loop(), func() int { return probes }) != 1 {
		t.Error("a new one is not captured")
	}
}

func TestUpdateThatCannotBe(t *testing.T) {
	r := newRawRig(t, StackConfig{Addrs: []netip.Addr{pod}})
	for _, u := range []Update{{Addrs: []netip.Addr{pod, pod6}}, {Addrs: []netip.Addr{pod}, VirtualInterfaces: true}} {
		if err := r.stack.Update(u); !errors.Is(err, ErrFamily) {
			t.Errorf("Update(%+v) = %v, want ErrFamily", u, err)
		}
	}
	if err := r.stack.Update(Update{}); err == nil {
		t.Error("a pod without addresses")
	}
	r.wantTunnels([]netip.Addr{pod}, []netip.Addr{pod6})
	if len(r.stack.listeners) != 1 {
		t.Errorf("an update that could not be left %d listeners", len(r.stack.listeners))
	}
	r.stack.Close()
	if err := r.stack.Update(Update{Addrs: []netip.Addr{pod}}); !errors.Is(err, ErrClosed) {
		t.Errorf("Update of a closed stack = %v", err)
	}
}
