package authz

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/securityapi"
)

// FuzzAuthorization decodes, compiles and evaluates hostile bytes, and holds
// the compiled policy against naive, which reads the message itself.
func FuzzAuthorization(f *testing.F) {
	add := func(a *pb, source, destination string, port uint16, id string) {
		b, err := proto.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, []byte(netip.MustParseAddr(source).AsSlice()), []byte(netip.MustParseAddr(destination).AsSlice()), port, id)
	}
	const id = "spiffe://cluster.local/ns/default/sa/alice"
	add(&pb{}, "10.0.0.1", "10.0.0.2", 80, id)
	add(&pb{Rules: list(&pbRule{}, one(), one(&pbMatch{}))}, "::1", "::2", 80, "")
	add(&pb{Action: 1, Rules: list(one(&pbMatch{
		Namespaces: list(isExact("default"), isPrefix("d")), NotNamespaces: list(isSuffix("x")),
		Principals: list(isPresent()), NotPrincipals: list(isExact("a")),
		SourceIps: list(cidr("10.0.0.0/8"), cidr("::ffff:10.0.0.0/104")), NotSourceIps: list(cidr("fc00::/7")),
		DestinationIps: list(cidr("0.0.0.0/0")), NotDestinationIps: list(cidr("192.0.2.0/24")),
		DestinationPorts: list(uint32(80), uint32(81)), NotDestinationPorts: list(uint32(82)),
		ServiceAccounts: list(account2("default", "alice")), NotServiceAccounts: list(account2("", "")),
	}))}, "10.0.0.1", "::ffff:10.0.0.2", 80, id)
	long := &pbMatch{}
	for i := range uint32(12) {
		long.DestinationPorts = append(long.DestinationPorts, i*7)
		long.NotSourceIps = append(long.NotSourceIps, &securityapi.Address{Address: []byte{10, byte(i), 0, 0}, Length: i + 8})
		long.Principals = append(long.Principals, isExact(strings.Repeat("a", int(i))))
	}
	add(&pb{Rules: list(one(long))}, "10.3.0.1", "10.0.0.2", 21, "spiffe://a/ns//sa/")

	f.Fuzz(func(t *testing.T, b, source, destination []byte, port uint16, id string) {
		var a pb
		if proto.Unmarshal(b, &a) != nil {
			return
		}
		p, err := Compile("ns/p", &a)
		if err != nil {
			return
		}
		if _, err := json.Marshal(p); err != nil {
			t.Fatal(err)
		}
		var in Input
		if ip, ok := netip.AddrFromSlice(source); ok {
			in.Src = netip.AddrPortFrom(ip, 1)
		}
		if ip, ok := netip.AddrFromSlice(destination); ok {
			in.Dst = netip.AddrPortFrom(ip, port)
		}
		in.Peer, _ = identity.Parse(id)
		got := Check(in, list(p), nil)
		if want := naive(in, &a); got.Allowed != want {
			t.Errorf("Check(%v) = %v, naive says allowed=%v\n%v", in, got, want, &a)
		}
	})
}

// naive decides about one policy straight from the facts, with text and
// without any index.
func naive(in Input, a *pb) bool {
	if a.GetDryRun() {
		return true
	}
	matched := false
	for _, r := range a.GetRules() {
		all := true
		for _, c := range r.GetClauses() {
			any := len(c.GetMatches()) == 0
			for _, m := range c.GetMatches() {
				any = any || naiveMatch(in, m)
			}
			all = all && any
		}
		matched = matched || all
	}
	return matched != (a.GetAction() == securityapi.Action_DENY)
}

func naiveMatch(in Input, m *pbMatch) bool {
	parts := strings.Split(in.Peer.String(), "/") // spiffe: "" td ns NS sa SA
	known := len(parts) == 7
	var namespace, account string
	if known {
		namespace, account = parts[4], parts[6]
	}
	principal := strings.TrimPrefix(in.Peer.String(), "spiffe://")
	set, ok := false, true
	check := func(n int, negative, hit bool) {
		if n > 0 {
			set = true
			ok = ok && hit != negative
		}
	}
	text := func(list []*securityapi.StringMatch, s string) (hit bool) {
		for _, x := range list {
			switch v := x.GetMatchType().(type) {
			case *securityapi.StringMatch_Exact:
				hit = hit || s == v.Exact
			case *securityapi.StringMatch_Prefix:
				hit = hit || len(s) >= len(v.Prefix) && s[:len(v.Prefix)] == v.Prefix
			case *securityapi.StringMatch_Suffix:
				hit = hit || len(s) >= len(v.Suffix) && s[len(s)-len(v.Suffix):] == v.Suffix
			case *securityapi.StringMatch_Presence:
				hit = hit || s != ""
			}
		}
		return hit
	}
	ips := func(list []*securityapi.Address, ip netip.Addr) (hit bool) {
		for _, x := range list {
			hit = hit || naiveContains(x, ip.Unmap())
		}
		return hit
	}
	ports := func(list []uint32) (hit bool) {
		for _, x := range list {
			hit = hit || x == uint32(in.Dst.Port())
		}
		return hit
	}
	accounts := func(list []*securityapi.ServiceAccountMatch) (hit bool) {
		for _, x := range list {
			hit = hit || known && x.GetNamespace() == namespace && x.GetServiceAccount() == account
		}
		return hit
	}
	check(len(m.GetNamespaces()), false, text(m.GetNamespaces(), namespace))
	check(len(m.GetNotNamespaces()), true, text(m.GetNotNamespaces(), namespace))
	check(len(m.GetPrincipals()), false, known && text(m.GetPrincipals(), principal))
	check(len(m.GetNotPrincipals()), true, known && text(m.GetNotPrincipals(), principal))
	check(len(m.GetSourceIps()), false, ips(m.GetSourceIps(), in.Src.Addr()))
	check(len(m.GetNotSourceIps()), true, ips(m.GetNotSourceIps(), in.Src.Addr()))
	check(len(m.GetDestinationIps()), false, ips(m.GetDestinationIps(), in.Dst.Addr()))
	check(len(m.GetNotDestinationIps()), true, ips(m.GetNotDestinationIps(), in.Dst.Addr()))
	check(len(m.GetDestinationPorts()), false, ports(m.GetDestinationPorts()))
	check(len(m.GetNotDestinationPorts()), true, ports(m.GetNotDestinationPorts()))
	check(len(m.GetServiceAccounts()), false, accounts(m.GetServiceAccounts()))
	check(len(m.GetNotServiceAccounts()), true, accounts(m.GetNotServiceAccounts()))
	return set && ok
}

// naiveContains compares bit by bit. A prefix of IPv4-mapped addresses only is
// one of IPv4 addresses; any other IPv6 prefix holds no IPv4 address.
func naiveContains(a *securityapi.Address, ip netip.Addr) bool {
	if !ip.IsValid() {
		return false
	}
	b, n := a.GetAddress(), int(a.GetLength())
	if len(b) == 16 && n >= 96 && strings.HasPrefix(string(b), "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff") {
		b, n = b[12:], n-96
	}
	raw := ip.AsSlice()
	if len(raw) != len(b) {
		return false
	}
	for i := range n {
		mask := byte(0x80 >> (i % 8))
		if raw[i/8]&mask != b[i/8]&mask {
			return false
		}
	}
	return true
}
