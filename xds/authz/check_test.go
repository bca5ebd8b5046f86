package authz

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/securityapi"
)

type (
	pb       = securityapi.Authorization
	pbRule   = securityapi.Rule
	pbClause = securityapi.Clause
	pbMatch  = securityapi.Match
)

func isExact(s string) *securityapi.StringMatch {
	return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Exact{Exact: s}}
}

func isPrefix(s string) *securityapi.StringMatch {
	return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Prefix{Prefix: s}}
}

func isSuffix(s string) *securityapi.StringMatch {
	return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Suffix{Suffix: s}}
}

func isPresent() *securityapi.StringMatch {
	return &securityapi.StringMatch{MatchType: &securityapi.StringMatch_Presence{Presence: &securityapi.Presence{}}}
}

func list[T any](v ...T) []T { return v }

func cidr(s string) *securityapi.Address {
	p := netip.MustParsePrefix(s)
	return &securityapi.Address{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())}
}

func account2(namespace, name string) *securityapi.ServiceAccountMatch {
	return &securityapi.ServiceAccountMatch{Namespace: namespace, ServiceAccount: name}
}

// one makes a rule of one clause of these matches.
func one(m ...*pbMatch) *pbRule { return &pbRule{Clauses: list(&pbClause{Matches: m})} }

func mustCompile(t testing.TB, key string, a *pb) *Policy {
	t.Helper()
	p, err := Compile(key, a)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var (
	src       = netip.MustParseAddrPort("10.0.0.1:40000")
	dst       = netip.MustParseAddrPort("10.0.0.2:8080")
	alice     = identity.MustParse("spiffe://cluster.local/ns/default/sa/alice")
	plaintext = Input{Src: src, Dst: dst}
	tls       = Input{Src: src, Dst: dst, Peer: alice}
)

func TestMatches(t *testing.T) {
	tests := []struct {
		name       string
		rules      []*pbRule
		tls, plain bool
	}{
		{"no rules", nil, false, false},
		{"rule without clauses", list(&pbRule{}), true, true},
		{"clause without matches", list(&pbRule{Clauses: list(&pbClause{})}), true, true},
		{"empty match", list(one(&pbMatch{})), false, false},
		{"clause of empty matches only", list(one(&pbMatch{}, &pbMatch{})), false, false},
		{"match with an extension only", list(one(&pbMatch{Extensions: list(&securityapi.Extension{Name: "x"})})), false, false},
		{"empty match AND nothing: the fail-open trap of istiod", list(&pbRule{Clauses: list(
			&pbClause{Matches: list(&pbMatch{Principals: list(isPresent())})},
			&pbClause{Matches: list(&pbMatch{})},
		)}), false, false},

		{"rules OR", list(one(&pbMatch{DestinationPorts: list(uint32(1))}), one(&pbMatch{DestinationPorts: list(uint32(8080))})), true, true},
		{"clauses AND, both", list(&pbRule{Clauses: list(
			&pbClause{Matches: list(&pbMatch{DestinationPorts: list(uint32(8080))})},
			&pbClause{Matches: list(&pbMatch{SourceIps: list(cidr("10.0.0.0/24"))})},
		)}), true, true},
		{"clauses AND, one", list(&pbRule{Clauses: list(
			&pbClause{Matches: list(&pbMatch{DestinationPorts: list(uint32(8080))})},
			&pbClause{Matches: list(&pbMatch{SourceIps: list(cidr("10.0.1.0/24"))})},
		)}), false, false},
		{"matches OR", list(one(&pbMatch{}, &pbMatch{DestinationPorts: list(uint32(8080))})), true, true},
		{"attributes AND", list(one(&pbMatch{DestinationPorts: list(uint32(8080)), SourceIps: list(cidr("192.0.2.0/24"))})), false, false},
		{"values OR", list(one(&pbMatch{DestinationPorts: list(uint32(1), uint32(8080))})), true, true},

		{"principal exact", list(one(&pbMatch{Principals: list(isExact("cluster.local/ns/default/sa/alice"))})), true, false},
		{"principal exact, other case", list(one(&pbMatch{Principals: list(isExact("cluster.local/ns/default/sa/Alice"))})), false, false},
		{"principal with the scheme", list(one(&pbMatch{Principals: list(isExact("spiffe://cluster.local/ns/default/sa/alice"))})), false, false},
		{"principal prefix", list(one(&pbMatch{Principals: list(isPrefix("cluster.local/"))})), true, false},
		{"principal suffix", list(one(&pbMatch{Principals: list(isSuffix("/alice"))})), true, false},
		{"principal presence", list(one(&pbMatch{Principals: list(isPresent())})), true, false},
		{"principal exact empty", list(one(&pbMatch{Principals: list(isExact(""))})), false, false},
		{"principal prefix empty", list(one(&pbMatch{Principals: list(isPrefix(""))})), true, false},
		{"not principal, other", list(one(&pbMatch{NotPrincipals: list(isExact("x"))})), true, true},
		{"not principal, same", list(one(&pbMatch{NotPrincipals: list(isSuffix("alice"))})), false, true},
		{"not principal presence: STRICT", list(one(&pbMatch{NotPrincipals: list(isPresent())})), false, true},

		{"namespace", list(one(&pbMatch{Namespaces: list(isExact("default"))})), true, false},
		{"namespace prefix", list(one(&pbMatch{Namespaces: list(isPrefix("def"))})), true, false},
		{"namespace exact empty", list(one(&pbMatch{Namespaces: list(isExact(""))})), false, true},
		{"namespace prefix empty", list(one(&pbMatch{Namespaces: list(isPrefix(""))})), true, true},
		{"namespace presence", list(one(&pbMatch{Namespaces: list(isPresent())})), true, false},
		{"not namespace", list(one(&pbMatch{NotNamespaces: list(isExact("default"))})), false, true},
		{"not namespace presence", list(one(&pbMatch{NotNamespaces: list(isPresent())})), false, true},

		{"service account", list(one(&pbMatch{ServiceAccounts: list(account2("default", "alice"))})), true, false},
		{"service account, other namespace", list(one(&pbMatch{ServiceAccounts: list(account2("other", "alice"))})), false, false},
		{"service account of nobody", list(one(&pbMatch{ServiceAccounts: list(account2("", ""))})), false, false},
		{"not service account", list(one(&pbMatch{NotServiceAccounts: list(account2("default", "alice"))})), false, true},
		{"not service account of nobody", list(one(&pbMatch{NotServiceAccounts: list(account2("", ""))})), true, true},

		{"source ip", list(one(&pbMatch{SourceIps: list(cidr("10.0.0.1/32"))})), true, true},
		{"source ip with host bits", list(one(&pbMatch{SourceIps: list(cidr("10.0.0.77/24"))})), true, true},
		{"source ip, IPv4-mapped prefix", list(one(&pbMatch{SourceIps: list(cidr("::ffff:10.0.0.0/120"))})), true, true},
		{"source ip, IPv6 all", list(one(&pbMatch{SourceIps: list(cidr("::/0"))})), false, false},
		{"not source ip", list(one(&pbMatch{NotSourceIps: list(cidr("10.0.0.0/8"))})), false, false},
		{"not source ip, other", list(one(&pbMatch{NotSourceIps: list(cidr("11.0.0.0/8"))})), true, true},
		{"destination ip", list(one(&pbMatch{DestinationIps: list(cidr("10.0.0.2/32"))})), true, true},
		{"not destination ip", list(one(&pbMatch{NotDestinationIps: list(cidr("10.0.0.2/32"))})), false, false},
		{"port", list(one(&pbMatch{DestinationPorts: list(uint32(8080))})), true, true},
		{"not port", list(one(&pbMatch{NotDestinationPorts: list(uint32(8080))})), false, false},
		{"not port, other", list(one(&pbMatch{NotDestinationPorts: list(uint32(9090))})), true, true},

		{"STRICT but for one port", list(&pbRule{Clauses: list(
			&pbClause{Matches: list(&pbMatch{NotPrincipals: list(isPresent())})},
			&pbClause{Matches: list(&pbMatch{NotDestinationPorts: list(uint32(8080))})},
		)}), false, false},
		{"STRICT for one port", list(one(&pbMatch{DestinationPorts: list(uint32(8080)), NotPrincipals: list(isPresent())})), false, true},
	}
	for _, tt := range tests {
		p := mustCompile(t, "ns/p", &pb{Rules: tt.rules})
		for _, in := range []struct {
			name string
			Input
			want bool
		}{{"TLS", tls, tt.tls}, {"plaintext", plaintext, tt.plain}} {
			if got := p.Matches(&in.Input); got != in.want {
				t.Errorf("%s: %s peer: Matches = %v, want %v", tt.name, in.name, got, in.want)
			}
		}
	}
}

func TestMatchesLongLists(t *testing.T) {
	var ips []*securityapi.Address
	var names []*securityapi.StringMatch
	var ports []uint32
	var accounts []*securityapi.ServiceAccountMatch
	for i := range 100 {
		ips = append(ips, cidr(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}).String()+"/16"))
		names = append(names, isExact(strings.Repeat("x", i+1)))
		ports = append(ports, uint32(9000-i))
		accounts = append(accounts, account2("ns", strings.Repeat("x", i)))
	}
	names = append(names, isSuffix("/alice"))
	accounts = append(accounts, account2("default", "alice"))
	ports = append(ports, 8080)
	m := &pbMatch{SourceIps: ips, Principals: names, DestinationPorts: ports, ServiceAccounts: accounts}
	p := mustCompile(t, "ns/p", &pb{Rules: list(one(m))})
	for _, tt := range []struct {
		name string
		in   Input
		want bool
	}{
		{"all match", tls, true},
		{"source outside", Input{netip.MustParseAddrPort("10.100.0.1:1"), dst, alice}, false},
		{"port outside", Input{src, netip.MustParseAddrPort("10.0.0.2:1"), alice}, false},
		{"other principal", Input{src, dst, identity.MustParse("spiffe://td/ns/default/sa/bob")}, false},
		{"plaintext", plaintext, false},
	} {
		if got := p.Matches(&tt.in); got != tt.want {
			t.Errorf("%s: Matches = %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestCheckOrder(t *testing.T) {
	yes := list(&pbRule{})
	policy := func(key string, action securityapi.Action, dryRun bool, rules []*pbRule) *Policy {
		return mustCompile(t, key, &pb{Action: action, DryRun: dryRun, Rules: rules})
	}
	const allow, deny = securityapi.Action_ALLOW, securityapi.Action_DENY
	var (
		allowYes = policy("ns/allow", allow, false, yes)
		allowNo  = policy("ns/allow-nothing", allow, false, nil)
		denyYes  = policy("ns/deny", deny, false, yes)
		denyNo   = policy("ns/deny-nothing", deny, false, nil)
		dryDeny  = policy("ns/dry-deny", deny, true, yes)
		dryAllow = policy("ns/dry-allow", allow, true, yes)
		dryNone  = policy("ns/dry-none", allow, true, nil)
	)
	tests := []struct {
		name     string
		policies []*Policy
		missing  []string
		want     Verdict
		text     string
	}{
		{"nothing", nil, nil, Verdict{Allowed: true, Reason: NoAllowPolicies}, "no allow policies"},
		{"deny", list(allowYes, denyYes), nil, Verdict{Reason: DenyMatched, Policy: "ns/deny"}, "explicitly denied by: ns/deny"},
		{"deny that does not match", list(denyNo), nil, Verdict{Allowed: true, Reason: NoAllowPolicies}, "no allow policies"},
		{"allow", list(denyNo, allowNo, allowYes), nil, Verdict{Allowed: true, Reason: AllowMatched, Policy: "ns/allow"}, "allowed by: ns/allow"},
		{"allow that does not match", list(allowNo), nil, Verdict{Reason: NoneAllowed}, "allow policies exist but none allowed"},
		{"missing", list(allowYes), list("ns/later", "ns/x"), Verdict{Reason: NotDelivered, Policy: "ns/later"}, "policy not delivered: ns/later"},
		{"deny before missing", list(denyYes), list("ns/later"), Verdict{Reason: DenyMatched, Policy: "ns/deny"}, "explicitly denied by: ns/deny"},
		{"dry-run deny", list(dryDeny), nil, Verdict{Allowed: true, Reason: NoAllowPolicies,
			DryRun: list(DryRun{"ns/dry-deny", Deny})}, "no allow policies"},
		{"dry-run allow alone", list(dryAllow), nil, Verdict{Allowed: true, Reason: NoAllowPolicies,
			DryRun: list(DryRun{"ns/dry-allow", Allow})}, "no allow policies"},
		{"dry-run allow alone, no match", list(dryDeny, dryNone), nil, Verdict{Allowed: true, Reason: NoAllowPolicies,
			DryRun: list(DryRun{"ns/dry-deny", Deny}, DryRun{"", Allow})}, "no allow policies"},
		{"dry-run allow beside an enforced one", list(dryNone, allowYes), nil, Verdict{Allowed: true, Reason: AllowMatched, Policy: "ns/allow"}, "allowed by: ns/allow"},
		{"dry-run allow does not allow", list(dryAllow, allowNo), nil, Verdict{Reason: NoneAllowed,
			DryRun: list(DryRun{"ns/dry-allow", Allow})}, "allow policies exist but none allowed"},
	}
	for _, tt := range tests {
		for range 2 { // The order of the policies does not matter.
			slices.Reverse(tt.policies)
			got := Check(tls, tt.policies, tt.missing)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("%s: -want +got\n%s", tt.name, diff)
			}
			if got.String() != tt.text {
				t.Errorf("%s: String = %q, want %q", tt.name, got.String(), tt.text)
			}
		}
	}
	var texts []string
	for _, d := range Check(tls, list(dryDeny, dryNone), nil).DryRun {
		texts = append(texts, d.String())
	}
	if want := list("dry-run: deny policy match", "dry-run: no allow policies match"); !slices.Equal(texts, want) {
		t.Errorf("dry-run texts = %q, want %q", texts, want)
	}
}

func TestCheckCanonicalisesMappedAddresses(t *testing.T) {
	p := mustCompile(t, "ns/p", &pb{Action: securityapi.Action_DENY, Rules: list(one(&pbMatch{
		SourceIps: list(cidr("10.0.0.1/32")), DestinationIps: list(cidr("10.0.0.2/32")),
	}))})
	in := Input{Src: netip.MustParseAddrPort("[::ffff:10.0.0.1]:1"), Dst: netip.MustParseAddrPort("[::ffff:10.0.0.2]:2")}
	if v := Check(in, list(p), nil); v.Allowed {
		t.Errorf("Check(%v) = %v, want denied", in, v)
	}
}

func TestCompileRefusesTheWholePolicy(t *testing.T) {
	tests := []struct {
		name string
		in   *pb
		want string
	}{
		{"IP of 5 bytes", &pb{Rules: list(one(&pbMatch{SourceIps: list(&securityapi.Address{Address: make([]byte, 5)})}))}, "rule 0, clause 0, match 0: source_ips[0]: address is neither"},
		{"IP of no bytes", &pb{Rules: list(one(&pbMatch{NotDestinationIps: list(cidr("10.0.0.0/8"), &securityapi.Address{})}))}, "not_destination_ips[1]"},
		{"length", &pb{Rules: list(one(&pbMatch{DestinationIps: list(&securityapi.Address{Address: make([]byte, 4), Length: 33})}))}, "destination_ips[0]: prefix length"},
		{"port", &pb{Rules: list(one(&pbMatch{DestinationPorts: list(uint32(65536))}))}, "destination_ports[0]: port above"},
		{"not port", &pb{Rules: list(one(&pbMatch{NotDestinationPorts: list(uint32(1), uint32(1<<20))}))}, "not_destination_ports[1]: port above"},
		{"string match", &pb{Rules: list(one(&pbMatch{}, &pbMatch{Principals: list(&securityapi.StringMatch{})}))}, "match 1: principals[0]: string match without a kind"},
		{"scope", &pb{Scope: 7}, "unknown scope 7"},
		{"action", &pb{Action: 9}, "unknown action 9"},
	}
	for _, tt := range tests {
		for _, action := range list(securityapi.Action_ALLOW, securityapi.Action_DENY) {
			if tt.name != "action" {
				tt.in.Action = action
			}
			_, err := Compile("ns/bad", tt.in)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "ns/bad") {
				t.Errorf("%s: Compile = %v, want an error with %q and the key", tt.name, err, tt.want)
			}
		}
	}
}
