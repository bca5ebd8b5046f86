package fuzz

import (
	"net/netip"
	"strings"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/securityapi"
)

// A connection is what a policy may ask about; peer is "" in plain text.
type connection struct {
	src, dst netip.AddrPort
	peer     string // spiffe://...
}

// usablePolicy: an entry that cannot be read fails the whole policy (package
// authz; ztunnel drops the entry).
func usablePolicy(a *securityapi.Authorization) bool {
	ok := a.GetScope() >= 0 && a.GetScope() <= 2 && a.GetAction() >= 0 && a.GetAction() <= 1
	for _, r := range a.GetRules() {
		for _, c := range r.GetClauses() {
			for _, m := range c.GetMatches() {
				ok = ok && usableMatch(m)
			}
		}
	}
	return ok
}

func usableMatch(m *securityapi.Match) bool {
	for _, list := range [][]*securityapi.StringMatch{m.GetNamespaces(), m.GetNotNamespaces(), m.GetPrincipals(), m.GetNotPrincipals()} {
		for _, s := range list {
			if s.GetMatchType() == nil {
				return false
			}
		}
	}
	for _, list := range [][]*securityapi.Address{m.GetSourceIps(), m.GetNotSourceIps(), m.GetDestinationIps(), m.GetNotDestinationIps()} {
		for _, a := range list {
			if n := len(a.GetAddress()); n != 4 && n != 16 || int64(a.GetLength()) > int64(n)*8 {
				return false
			}
		}
	}
	for _, list := range [][]uint32{m.GetDestinationPorts(), m.GetNotDestinationPorts()} {
		for _, p := range list {
			if p > 65535 {
				return false
			}
		}
	}
	return true
}

// allowed is section 7.2 over the policies that apply: a DENY that matches
// denies, no ALLOW at all allows, an ALLOW that matches allows, else denied.
// What is in dry run counts for nothing.
func allowed(policies []*securityapi.Authorization, in connection) bool {
	allows, matched := false, false
	for _, p := range policies {
		switch {
		case p.GetDryRun():
		case p.GetAction() == securityapi.Action_DENY:
			if policyMatches(p, in) {
				return false
			}
		default:
			allows = true
			matched = matched || policyMatches(p, in)
		}
	}
	return matched || !allows
}

// policyMatches: rules OR, clauses AND, matches OR; "no rules: never matches;
// rule with no clauses: matches; clause with no matches: true" (7.3).
func policyMatches(p *securityapi.Authorization, in connection) bool {
	for _, r := range p.GetRules() {
		all := true
		for _, c := range r.GetClauses() {
			any := len(c.GetMatches()) == 0
			for _, m := range c.GetMatches() {
				any = any || matches(m, in)
			}
			all = all && any
		}
		if all {
			return true
		}
	}
	return false
}

// matches: attributes AND, their values OR; "a match with all attributes empty:
// false"; without an identity neither principals nor service accounts match,
// and so what is not to match does not hinder.
func matches(m *securityapi.Match, in connection) bool {
	id, err := identity.Parse(in.peer)
	known := err == nil
	var namespace, principal string
	if known {
		namespace, principal = id.Namespace(), id.Principal()
	}
	var set, no bool
	check := func(n int, positive, hit bool) {
		if n > 0 {
			set = true
			no = no || hit != positive
		}
	}
	strs := func(list []*securityapi.StringMatch, text string, can bool) bool {
		for _, s := range list {
			if can && stringMatches(s, text) {
				return true
			}
		}
		return false
	}
	ips := func(list []*securityapi.Address, ip netip.Addr) bool {
		for _, a := range list {
			addr, _ := netip.AddrFromSlice(a.GetAddress())
			bits := int(a.GetLength())
			if addr.Is4In6() && bits >= 96 {
				addr, bits = addr.Unmap(), bits-96
			}
			if netip.PrefixFrom(addr, bits).Contains(ip) {
				return true
			}
		}
		return false
	}
	ports := func(list []uint32) bool {
		for _, p := range list {
			if p == uint32(in.dst.Port()) {
				return true
			}
		}
		return false
	}
	accounts := func(list []*securityapi.ServiceAccountMatch) bool {
		for _, a := range list {
			if known && a.GetNamespace() == id.Namespace() && a.GetServiceAccount() == id.ServiceAccount() {
				return true
			}
		}
		return false
	}
	check(len(m.GetNamespaces()), true, strs(m.GetNamespaces(), namespace, true))
	check(len(m.GetNotNamespaces()), false, strs(m.GetNotNamespaces(), namespace, true))
	check(len(m.GetPrincipals()), true, strs(m.GetPrincipals(), principal, known))
	check(len(m.GetNotPrincipals()), false, strs(m.GetNotPrincipals(), principal, known))
	check(len(m.GetSourceIps()), true, ips(m.GetSourceIps(), in.src.Addr()))
	check(len(m.GetNotSourceIps()), false, ips(m.GetNotSourceIps(), in.src.Addr()))
	check(len(m.GetDestinationIps()), true, ips(m.GetDestinationIps(), in.dst.Addr()))
	check(len(m.GetNotDestinationIps()), false, ips(m.GetNotDestinationIps(), in.dst.Addr()))
	check(len(m.GetDestinationPorts()), true, ports(m.GetDestinationPorts()))
	check(len(m.GetNotDestinationPorts()), false, ports(m.GetNotDestinationPorts()))
	check(len(m.GetServiceAccounts()), true, accounts(m.GetServiceAccounts()))
	check(len(m.GetNotServiceAccounts()), false, accounts(m.GetNotServiceAccounts()))
	return set && !no
}

func stringMatches(s *securityapi.StringMatch, text string) bool {
	switch v := s.GetMatchType().(type) {
	case *securityapi.StringMatch_Exact:
		return text == v.Exact
	case *securityapi.StringMatch_Prefix:
		return strings.HasPrefix(text, v.Prefix)
	case *securityapi.StringMatch_Suffix:
		return strings.HasSuffix(text, v.Suffix)
	}
	return text != ""
}
