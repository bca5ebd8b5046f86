package podnet

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// message is the body that a request would carry.
func message(fill func(*nl.NetlinkRequest)) []byte {
	req := nl.NewNetlinkRequest(0, 0)
	fill(req)
	return req.Serialize()[unix.SizeofNlMsghdr:]
}

var sampleRules = []rule{
	{Family: unix.AF_INET, Priority: 10, Iif: "ztun0", Action: nl.FR_ACT_TO_TBL, Table: 255, Protocol: ourProtocol},
	{Family: unix.AF_INET, Priority: 20, Iif: "eth0", Dst: netip.MustParsePrefix("10.1.0.2/32"), IPProto: 6, Action: nl.FR_ACT_TO_TBL, Table: captureTable, Protocol: ourProtocol},
	{Family: unix.AF_INET6, Priority: 18, Iif: "eth0", Src: netip.MustParsePrefix("fd01::2/128"), Action: nl.FR_ACT_BLACKHOLE, Protocol: ourProtocol},
	{Family: unix.AF_INET, Priority: 105, Iif: "lo", Oif: "eth0", IPProto: 17, DPort: 53, Action: nl.FR_ACT_TO_TBL, Table: boundTable, Protocol: ourProtocol},
}

var sampleRoutes = []route{
	{Family: unix.AF_INET, Table: captureTable, Dst: netip.MustParsePrefix("10.1.0.0/24"), Type: unix.RTN_UNICAST, Oif: 3, Src: netip.MustParseAddr("10.1.0.2"), Metric: captureMetric, Scope: unix.RT_SCOPE_LINK, Protocol: ourProtocol},
	{Family: unix.AF_INET6, Table: captureTable, Dst: netip.MustParsePrefix("::/0"), Type: unix.RTN_UNREACHABLE, Metric: backstopMetric, Protocol: ourProtocol},
	{Family: unix.AF_INET, Table: boundTable, Dst: netip.MustParsePrefix("0.0.0.0/0"), Type: unix.RTN_LOCAL, Oif: 2, Metric: 7, Scope: unix.RT_SCOPE_HOST, Protocol: ourProtocol},
	{Family: unix.AF_INET6, Table: 254, Dst: netip.MustParsePrefix("fd00::/8"), Type: unix.RTN_UNICAST, Oif: 2, Gw: netip.MustParseAddr("fd01::1"), Metric: 1024, Protocol: unix.RTPROT_BOOT},
}

func FuzzParseRule(f *testing.F) {
	for _, r := range sampleRules {
		f.Add(message(r.encode))
	}
	f.Fuzz(func(t *testing.T, m []byte) {
		r, err := parseRule(m)
		if err != nil || r.Other {
			return
		}
		_ = r.String()
		if r.Family != unix.AF_INET && r.Family != unix.AF_INET6 || strings.Contains(r.Iif+r.Oif, "\x00") {
			return
		}
		if again, err := parseRule(message(r.encode)); err != nil || again != r {
			t.Errorf("parse(encode(%+v)) = %+v, %v", r, again, err)
		}
	})
}

func FuzzParseRoute(f *testing.F) {
	for _, r := range sampleRoutes {
		f.Add(message(r.encode))
	}
	// ip route add 10.0.0.0/8 nexthop via 10.1.0.1 dev #2: one next hop.
	hop := append([]byte{16, 0, 0, 0, 2, 0, 0, 0}, 8, 0, unix.RTA_GATEWAY, 0, 10, 1, 0, 1)
	f.Add(append(message(route{Family: unix.AF_INET, Dst: netip.MustParsePrefix("10.0.0.0/8")}.encode), append([]byte{20, 0, unix.RTA_MULTIPATH, 0}, hop...)...))
	f.Fuzz(func(t *testing.T, m []byte) {
		r, err := parseRoute(m)
		if err != nil {
			return
		}
		_ = r.String()
		sane := r.Dst.Addr().BitLen() == anyPrefix(r.Family).Addr().BitLen() && (r.Family == unix.AF_INET || r.Family == unix.AF_INET6)
		if !sane || r.Dead || r.Oif < 0 || r.Dst.Bits() == 0 && r.Dst != anyPrefix(r.Family) {
			return
		}
		if again, err := parseRoute(message(r.encode)); err != nil || again != r {
			t.Errorf("parse(encode(%+v)) = %+v, %v", r, again, err)
		}
	})
}

func FuzzParseSocket(f *testing.F) {
	b := make([]byte, diagMsgLen)
	b[0], b[1] = unix.AF_INET, 1
	copy(b[4:], []byte{0x1f, 0x90, 0xc3, 0x50, 10, 1, 0, 2})
	f.Add(b)
	b = append([]byte(nil), b...)
	b[0] = unix.AF_INET6
	f.Add(b)
	f.Fuzz(func(t *testing.T, m []byte) {
		s, err := parseSocket(m)
		if err != nil {
			return
		}
		if !s.Local.IsValid() || !s.Remote.IsValid() {
			t.Errorf("socket without addresses: %+v", s)
		}
	})
}

func TestParseMultipathTakesTheFirstHop(t *testing.T) {
	hop := append([]byte{16, 0, 0, 0, 2, 0, 0, 0}, 8, 0, unix.RTA_GATEWAY, 0, 10, 1, 0, 1)
	m := append(message(route{Family: unix.AF_INET, Type: unix.RTN_UNICAST, Dst: netip.MustParsePrefix("10.0.0.0/8")}.encode), append([]byte{20, 0, unix.RTA_MULTIPATH, 0}, hop...)...)
	r, err := parseRoute(m)
	if err != nil || r.Oif != 2 || r.Gw != netip.MustParseAddr("10.1.0.1") {
		t.Errorf("parseRoute = %+v, %v", r, err)
	}
	if _, err := parseRoute(m[:len(m)-9]); !errors.Is(err, errShort) {
		t.Errorf("parseRoute of half a message = %v", err)
	}
}

func TestConfigValidate(t *testing.T) {
	for _, c := range []struct {
		cfg  Config
		want []string
	}{
		{Config{}, nil},
		{Config{Device: "ztun1", VirtualInterfaces: []string{"br0", "k6t-eth0"}}, nil},
		{Config{Device: "a/b", VirtualInterfaces: []string{"lo", "..", "a name"}}, []string{`"a/b"`, `"lo"`, `".."`, `"a name"`}},
		{Config{Device: "ztun0", VirtualInterfaces: []string{"ztun0"}}, []string{`"ztun0"`}},
		{Config{Device: "an-interface-name-too-long"}, []string{"too-long"}},
		{Config{VirtualInterfaces: make([]string, 40)}, []string{"40 virtual interfaces"}},
	} {
		err := c.cfg.Validate()
		if (err != nil) != (len(c.want) > 0) {
			t.Errorf("Validate(%+v) = %v", c.cfg, err)
		}
		for _, w := range c.want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("Validate(%+v) = %v, want it to name %s", c.cfg, err, w)
			}
		}
	}
}

// The choice of a source where several addresses would do, as inet_select_addr of the kernel makes it.
func TestSource4(t *testing.T) {
	a := func(link int, cidr string, scope uint8, secondary bool) address {
		return address{Link: link, Prefix: netip.MustParsePrefix(cidr), Scope: scope, Secondary: secondary}
	}
	w := &world{addrs: []address{
		a(1, "127.0.0.1/8", unix.RT_SCOPE_HOST, false),
		a(2, "10.0.0.2/24", 0, false), a(2, "10.0.0.3/24", 0, true), a(2, "10.5.0.2/16", 0, false),
		a(3, "169.254.1.1/32", unix.RT_SCOPE_LINK, false),
	}}
	for _, c := range []struct {
		name string
		r    route
		want string
	}{
		{"first of the interface", route{Oif: 2}, "10.0.0.2"},
		{"that of the gateway's subnet", route{Oif: 2, Gw: netip.MustParseAddr("10.5.0.1")}, "10.5.0.2"},
		{"first, for a gateway elsewhere", route{Oif: 2, Gw: netip.MustParseAddr("169.254.1.1")}, "10.0.0.2"},
		{"link scope for a link's route", route{Oif: 3, Scope: unix.RT_SCOPE_LINK}, "169.254.1.1"},
		{"not link scope for a wider one", route{Oif: 3}, "10.0.0.2"},
		{"of another interface", route{Oif: 9}, "10.0.0.2"},
	} {
		c.r.Family, c.r.Type = unix.AF_INET, unix.RTN_UNICAST
		if got := w.sourceOf(c.r); got != netip.MustParseAddr(c.want) {
			t.Errorf("%s: sourceOf(%v) = %v, want %s", c.name, c.r, got, c.want)
		}
	}
}

func BenchmarkPass(b *testing.B) {
	e := newBenchEnv(b)
	for b.Loop() {
		if _, err := e.pass(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
