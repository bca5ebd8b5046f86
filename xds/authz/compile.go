package authz

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/ztun/ztun/xds/securityapi"
)

var (
	errAddressLength = errors.New("address is neither 4 nor 16 bytes")
	errPrefixLength  = errors.New("prefix length exceeds the address")
	errNoKind        = errors.New("string match without a kind")
	errPort          = errors.New("port above 65535")
)

// Compile checks and compiles one policy. key is the name of its resource. An
// entry that cannot be read fails the whole policy, since leaving it out could
// turn a DENY into nothing or an ALLOW into everything.
func Compile(key string, a *securityapi.Authorization) (*Policy, error) {
	p := &Policy{
		Key:       key,
		Name:      a.GetName(),
		Namespace: a.GetNamespace(),
		DryRun:    a.GetDryRun(),
	}
	switch a.GetScope() {
	case securityapi.Scope_GLOBAL:
		p.Scope = Global
	case securityapi.Scope_NAMESPACE:
		p.Scope = Namespace
	case securityapi.Scope_WORKLOAD_SELECTOR:
		p.Scope = WorkloadSelector
	default:
		return nil, fmt.Errorf("authz: compile %s: unknown scope %d", key, a.GetScope())
	}
	switch a.GetAction() {
	case securityapi.Action_ALLOW:
		p.Action = Allow
	case securityapi.Action_DENY:
		p.Action = Deny
	default:
		return nil, fmt.Errorf("authz: compile %s: unknown action %d", key, a.GetAction())
	}
	p.rules = make([]rule, len(a.GetRules()))
	for i, r := range a.GetRules() {
		p.rules[i] = make(rule, len(r.GetClauses()))
		for j, c := range r.GetClauses() {
			p.rules[i][j] = make(clause, len(c.GetMatches()))
			for k, m := range c.GetMatches() {
				if err := p.rules[i][j][k].compile(m); err != nil {
					return nil, fmt.Errorf("authz: compile %s: rule %d, clause %d, match %d: %w", key, i, j, k, err)
				}
			}
		}
	}
	return p, nil
}

func (m *match) compile(a *securityapi.Match) error {
	var c compiler
	m.namespaces = c.strs("namespaces", a.GetNamespaces())
	m.notNamespaces = c.strs("not_namespaces", a.GetNotNamespaces())
	m.principals = c.strs("principals", a.GetPrincipals())
	m.notPrincipals = c.strs("not_principals", a.GetNotPrincipals())
	m.sourceIPs = c.prefixes("source_ips", a.GetSourceIps())
	m.notSourceIPs = c.prefixes("not_source_ips", a.GetNotSourceIps())
	m.destinationIPs = c.prefixes("destination_ips", a.GetDestinationIps())
	m.notDestinationIPs = c.prefixes("not_destination_ips", a.GetNotDestinationIps())
	m.destinationPorts = c.ports("destination_ports", a.GetDestinationPorts())
	m.notDestPorts = c.ports("not_destination_ports", a.GetNotDestinationPorts())
	m.serviceAccounts = c.accounts(a.GetServiceAccounts())
	m.notServiceAccounts = c.accounts(a.GetNotServiceAccounts())
	m.empty = c.values == 0
	return c.err
}

// A compiler keeps the first error and counts the values it has seen.
type compiler struct {
	values int
	err    error
}

func (c *compiler) fail(field string, i int, err error) {
	if c.err == nil {
		c.err = fmt.Errorf("%s[%d]: %w", field, i, err)
	}
}

func (c *compiler) strs(field string, in []*securityapi.StringMatch) strs {
	if len(in) == 0 {
		return strs{}
	}
	c.values += len(in)
	out := make([]strMatch, len(in))
	for i, s := range in {
		switch v := s.GetMatchType().(type) {
		case *securityapi.StringMatch_Exact:
			out[i] = strMatch{exact, v.Exact}
		case *securityapi.StringMatch_Prefix:
			out[i] = strMatch{prefix, v.Prefix}
		case *securityapi.StringMatch_Suffix:
			out[i] = strMatch{suffix, v.Suffix}
		case *securityapi.StringMatch_Presence:
			out[i] = strMatch{presence, ""}
		default:
			c.fail(field, i, errNoKind)
		}
	}
	return newStrs(out)
}

func (c *compiler) prefixes(field string, in []*securityapi.Address) prefixes {
	if len(in) == 0 {
		return prefixes{}
	}
	c.values += len(in)
	out := make([]netip.Prefix, len(in))
	for i, a := range in {
		pfx, err := toPrefix(a)
		if err != nil {
			c.fail(field, i, err)
			return prefixes{}
		}
		out[i] = pfx
	}
	return newPrefixes(out)
}

// toPrefix reads a prefix; an IPv4-mapped one becomes the IPv4 prefix it means,
// since the addresses that are checked are canonical too.
func toPrefix(a *securityapi.Address) (netip.Prefix, error) {
	addr, ok := netip.AddrFromSlice(a.GetAddress())
	if !ok {
		return netip.Prefix{}, errAddressLength
	}
	if a.GetLength() > uint32(addr.BitLen()) {
		return netip.Prefix{}, errPrefixLength
	}
	bits := int(a.GetLength())
	if addr.Is4In6() && bits >= 96 {
		addr, bits = addr.Unmap(), bits-96
	}
	// Prefix refuses nothing here: the length was checked, and there is no zone.
	return netip.PrefixFrom(addr, bits).Masked(), nil
}

func (c *compiler) ports(field string, in []uint32) ports {
	if len(in) == 0 {
		return ports{}
	}
	c.values += len(in)
	out := make([]uint16, len(in))
	for i, p := range in {
		if p > math.MaxUint16 {
			c.fail(field, i, errPort)
		}
		out[i] = uint16(p)
	}
	return newPorts(out)
}

func (c *compiler) accounts(in []*securityapi.ServiceAccountMatch) accounts {
	if len(in) == 0 {
		return accounts{}
	}
	c.values += len(in)
	out := make([]account, len(in))
	for i, a := range in {
		out[i] = account{a.GetNamespace(), a.GetServiceAccount()}
	}
	return newAccounts(out)
}
