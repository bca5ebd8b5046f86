package netstack

import (
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
)

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// gVisor makes a processor for each CPU, for each stack.
func TestStackHasOneProcessor(t *testing.T) {
	running := func() int {
		b := make([]byte, 4<<20)
		return strings.Count(string(b[:runtime.Stack(b, true)]), "tcp.(*processor).start(")
	}
	newRig(t, StackConfig{}) // two stacks
	eventually(t, "one processor for each stack", func() bool { return running() == 2*processors })
}

func TestStackHasTheFamiliesOfItsPod(t *testing.T) {
	for _, c := range []struct {
		name   string
		cfg    StackConfig
		v4, v6 bool
	}{
		{"both", StackConfig{Addrs: []netip.Addr{pod, pod6}}, true, true},
		{"IPv4", StackConfig{Addrs: []netip.Addr{pod}}, true, false},
		{"IPv6", StackConfig{Addrs: []netip.Addr{pod6}}, false, true},
		{"virtual machine", StackConfig{Addrs: []netip.Addr{pod}, VirtualInterfaces: true}, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, _ := tuntest.Pair(t, tun.Options{MTU: 1500})
			e, err := New(Config{Readers: 1})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(e.Close)
			h := &hooks{t: t}
			s, err := e.Add(a, c.cfg, h.serve)
			if err != nil {
				t.Fatal(err)
			}
			v4, v6 := s.gv.CheckNetworkProtocol(header.IPv4ProtocolNumber), s.gv.CheckNetworkProtocol(header.IPv6ProtocolNumber)
			if v4 != c.v4 || v6 != c.v6 {
				t.Errorf("IPv4 %v, IPv6 %v, want %v, %v", v4, v6, c.v4, c.v6)
			}
		})
	}
}
