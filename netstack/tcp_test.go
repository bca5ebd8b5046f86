package netstack

import (
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tun/tuntest"
)

func TestTCPChoicesReachBothLegs(t *testing.T) {
	for _, c := range []struct {
		tcp          TCP
		sack         tcpip.TCPSACKEnabled
		recovery     tcpip.TCPRecovery
		pod, network tcpip.CongestionControlOption
	}{
		{TCP{}, true, 0, "reno", "reno"},
		{TCP{RACK: true, Network: "cubic"}, true, tcpip.TCPRACKLossDetection, "reno", "cubic"},
		{TCP{NoSACK: true, Pod: "cubic"}, false, 0, "cubic", "reno"},
	} {
		e, err := New(Config{Readers: 1, TCP: c.tcp})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(e.Close)
		a, b := tuntest.Pair(t, tun.Options{})
		h := &hooks{t: t}
		s, err := e.Add(a, StackConfig{Addrs: []netip.Addr{pod}}, h.serve)
		if err != nil {
			t.Fatal(err)
		}
		r := &rawRig{t: t, stack: s, handler: h, dev: b, buf: make([]byte, tun.MaxPacket)}
		r.vector.Set(0, r.buf)
		var sack tcpip.TCPSACKEnabled
		var recovery tcpip.TCPRecovery
		s.gv.TransportProtocolOption(tcp.ProtocolNumber, &sack)
		s.gv.TransportProtocolOption(tcp.ProtocolNumber, &recovery)
		if sack != c.sack || recovery != c.recovery {
			t.Errorf("%+v: SACK %v, recovery %v", c.tcp, sack, recovery)
		}
		accept, ch := accepting(t, s)
		on(s, h, func(h *hooks) { h.tcp = accept })
		for _, leg := range []struct {
			src, dst netip.AddrPort
			want     tcpip.CongestionControlOption
		}{{podPort, service, c.pod}, {client, netip.AddrPortFrom(pod, 80), c.network}} {
			r.handshakeAs(leg.src, leg.dst, 100)
			end := (<-ch).end.(*Flow)
			got := do(s.Loop(), func() (o tcpip.CongestionControlOption) { end.ep.GetSockOpt(&o); return o })
			if got != leg.want {
				t.Errorf("%+v: %v -> %v has %s, want %s", c.tcp, leg.src, leg.dst, got, leg.want)
			}
		}
	}
}

func TestUnknownCongestionControlIsRefused(t *testing.T) {
	for _, c := range []TCP{{Pod: "vegas"}, {Network: "bbr"}} {
		if e, err := New(Config{Readers: 1, TCP: c}); err == nil {
			e.Close()
			t.Errorf("%+v was taken", c)
		}
	}
}

func TestFlowsTellOfBothEnds(t *testing.T) {
	r := newRig(t, StackConfig{})
	app, proxy := r.establish(podPort, service)
	if _, err := app.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what the app wrote", func() bool {
		list := r.proxy.Flows()
		return len(list) == 1 && list[0].Unread == 5
	})
	f := r.proxy.Flows()[0]
	if f.Local != service || f.Remote != podPort || !f.Pod || f.State != "ESTABLISHED" || f.Buffer < minBuffer || f.Congestion == 0 || f.RTO < 100*time.Millisecond {
		t.Errorf("%+v", f)
	}
	app.Reset()
	if _, err := proxy.Read(make([]byte, 8)); err == nil {
		_, err = proxy.Read(make([]byte, 8))
		if err == nil {
			t.Error("no reset")
		}
	}
	proxy.Close()
	eventually(t, "no flow", func() bool { return len(r.proxy.Flows()) == 0 })
}
