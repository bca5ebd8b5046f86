package netstack

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

func TestPortIsTakenOnceForEachDestination(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.kernel, r.onPod, func(h *hooks) { h.tcp = acceptEcho })
	for _, port := range []uint16{80, 81} {
		c, err := dialOn(t, r.proxy, client, netip.AddrPortFrom(pod, port), patience)
		if err != nil {
			t.Fatalf("dial port %d: %v", port, err)
		}
		c.Write([]byte{byte(port)})
		b := make([]byte, 1)
		if _, err := c.Read(b); err != nil || b[0] != byte(port) {
			t.Errorf("port %d answers %d, %v", port, b[0], err)
		}
	}
	if _, err := dialOn(t, r.proxy, client, netip.AddrPortFrom(pod, 80), patience); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("the same connection again: %v, want EADDRINUSE", err)
	}
}

func TestDialFindsAFreePort(t *testing.T) {
	older := Tuple{Local: netip.AddrPortFrom(pod, firstPort+501), Remote: service}
	r := newRig(t, StackConfig{Older: []Tuple{older}})
	on(r.kernel, r.onPod, func(h *hooks) { h.tcp = acceptEcho })
	c, err := dialOn(t, r.proxy, netip.AddrPortFrom(pod, 0), service, patience)
	if err != nil {
		t.Fatal(err)
	}
	const each = 500
	do(r.proxy.Loop(), func() int {
		s, live := r.proxy, c.end.(*Flow)
		free := func(port int) bool { return port%each == 0 }
		for port := firstPort; port <= lastPort; port++ {
			if !free(port) && port != int(older.Local.Port()) {
				s.flows[tupleOf(service, netip.AddrPortFrom(pod, uint16(port)))] = live
			}
		}
		for range 100 {
			own, err := s.freePort(netip.AddrPortFrom(pod, 0), service)
			if err != nil || !free(int(own.Port())) {
				t.Errorf("port %d, %v", own.Port(), err)
			}
		}
		for port := firstPort; port <= lastPort; port++ {
			s.flows[tupleOf(service, netip.AddrPortFrom(pod, uint16(port)))] = live
		}
		if own, err := s.freePort(netip.AddrPortFrom(pod, 0), service); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("port %d, %v of none, want EADDRINUSE", own.Port(), err)
		}
		for key, f := range s.flows {
			if f == live && key != live.key {
				delete(s.flows, key)
			}
		}
		return 0
	})
}

// Once in 50,000 times a random port was the last one's, and the SYN came to a
// peer that had not seen the RST yet: connection refused.
func TestPortIsNotUsedAgainSoon(t *testing.T) {
	r := newRig(t, StackConfig{})
	do(r.proxy.Loop(), func() int {
		used := map[uint16]int{}
		for i := range 20_000 {
			own, err := r.proxy.freePort(netip.AddrPortFrom(pod, 0), service)
			if err != nil || own.Port() < firstPort {
				t.Errorf("port %d, %v", own.Port(), err)
				return 0
			}
			if last, ok := used[own.Port()]; ok && i-last < 50 {
				t.Errorf("port %d is used again after %d dials", own.Port(), i-last)
				return 0
			}
			used[own.Port()] = i
		}
		if len(used) < 5000 {
			t.Errorf("%d ports of 20,000 dials", len(used))
		}
		return 0
	})
}

// The peer of a network leg may still send to a connection in TIME_WAIT.
func TestPortInTimeWaitIsNotFree(t *testing.T) {
	r := newRig(t, StackConfig{})
	on(r.kernel, r.onPod, func(h *hooks) { h.tcp = acceptEcho })
	c, err := dialOn(t, r.proxy, netip.AddrPortFrom(pod, 0), service, patience)
	if err != nil {
		t.Fatal(err)
	}
	own := c.end.(*Flow).Local()
	c.CloseWrite()
	if n, err := c.Read(make([]byte, 1)); n != 0 {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	eventually(t, "TIME_WAIT", func() bool {
		return do(c.loop, func() bool { return c.end.(*Flow).ep.EndpointState() == tcp.StateTimeWait })
	})
	if _, err := dialOn(t, r.proxy, own, service, patience); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("dial from %v: %v, want EADDRINUSE", own, err)
	}
}
