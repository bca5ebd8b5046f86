package authz

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/gaissmai/bart"
)

// indexAbove is the length above which a list gets an index beside it: short
// lists are faster to walk.
const indexAbove = 8

// A match is one Match with every attribute compiled. Attributes AND, values
// of one attribute OR. A match without any attribute never matches.
type match struct {
	empty bool

	namespaces, notNamespaces           strs
	principals, notPrincipals           strs
	sourceIPs, notSourceIPs             prefixes
	destinationIPs, notDestinationIPs   prefixes
	destinationPorts, notDestPorts      ports
	serviceAccounts, notServiceAccounts accounts
}

// matches walks the attributes from the cheapest to the dearest. Without a peer
// identity a positive identity attribute never matches, so a negative one
// always does; only namespaces compare with "".
func (m *match) matches(in *Input) bool {
	if m.empty {
		return false
	}
	if !m.destinationPorts.allow(in.Dst.Port()) || m.notDestPorts.has(in.Dst.Port()) {
		return false
	}
	if !m.sourceIPs.allow(in.Src.Addr()) || m.notSourceIPs.has(in.Src.Addr()) ||
		!m.destinationIPs.allow(in.Dst.Addr()) || m.notDestinationIPs.has(in.Dst.Addr()) {
		return false
	}
	return m.matchesPeer(in)
}

func (m *match) matchesPeer(in *Input) bool {
	known := !in.Peer.IsZero()
	var namespace string
	if known {
		namespace = in.Peer.Namespace()
	}
	if !m.namespaces.allow(namespace) || m.notNamespaces.has(namespace) {
		return false
	}
	if !m.serviceAccounts.unset() || !m.notServiceAccounts.unset() {
		var a account
		if known {
			a = account{namespace, in.Peer.ServiceAccount()}
		}
		if !m.serviceAccounts.unset() && !(known && m.serviceAccounts.has(a)) {
			return false
		}
		if known && m.notServiceAccounts.has(a) {
			return false
		}
	}
	if !m.principals.unset() || !m.notPrincipals.unset() {
		var principal string
		if known {
			principal = in.Peer.Principal()
		}
		if !m.principals.unset() && !(known && m.principals.has(principal)) {
			return false
		}
		if known && m.notPrincipals.has(principal) {
			return false
		}
	}
	return true
}

type strKind uint8

const (
	exact strKind = iota
	prefix
	suffix
	presence
)

type strMatch struct {
	kind strKind
	text string
}

func (s strMatch) has(text string) bool {
	switch s.kind {
	case exact:
		return text == s.text
	case prefix:
		return strings.HasPrefix(text, s.text)
	case suffix:
		return strings.HasSuffix(text, s.text)
	default:
		return text != ""
	}
}

// strs is a list of string matches. index, when there are many, holds the
// exact ones, and patterns the rest.
type strs struct {
	list     []strMatch
	index    map[string]struct{}
	patterns []strMatch
}

func newStrs(list []strMatch) strs {
	s := strs{list: list}
	if len(list) <= indexAbove {
		return s
	}
	s.index = make(map[string]struct{}, len(list))
	for _, m := range list {
		if m.kind == exact {
			s.index[m.text] = struct{}{}
		} else {
			s.patterns = append(s.patterns, m)
		}
	}
	return s
}

func (s *strs) unset() bool { return len(s.list) == 0 }

func (s *strs) allow(text string) bool { return len(s.list) == 0 || s.has(text) }

func (s *strs) has(text string) bool {
	list := s.list
	if s.index != nil {
		if _, ok := s.index[text]; ok {
			return true
		}
		list = s.patterns
	}
	for i := range list {
		if list[i].has(text) {
			return true
		}
	}
	return false
}

type prefixes struct {
	list  []netip.Prefix
	index *bart.Lite
}

func newPrefixes(list []netip.Prefix) prefixes {
	p := prefixes{list: list}
	if len(list) <= indexAbove {
		return p
	}
	p.index = new(bart.Lite)
	for _, pfx := range list {
		p.index.Insert(pfx)
	}
	return p
}

func (p *prefixes) allow(a netip.Addr) bool { return len(p.list) == 0 || p.has(a) }

func (p *prefixes) has(a netip.Addr) bool {
	if p.index != nil {
		return p.index.Lookup(a)
	}
	for _, pfx := range p.list {
		if pfx.Contains(a) {
			return true
		}
	}
	return false
}

type ports struct {
	list  []uint16 // As sent.
	index []uint16 // Sorted, when there are many.
}

func newPorts(list []uint16) ports {
	p := ports{list: list}
	if len(list) > indexAbove {
		p.index = slices.Sorted(slices.Values(list))
	}
	return p
}

func (p *ports) allow(port uint16) bool { return len(p.list) == 0 || p.has(port) }

func (p *ports) has(port uint16) bool {
	if p.index != nil {
		_, ok := slices.BinarySearch(p.index, port)
		return ok
	}
	return slices.Contains(p.list, port)
}

type account struct{ namespace, name string }

type accounts struct {
	list  []account
	index map[account]struct{}
}

func newAccounts(list []account) accounts {
	a := accounts{list: list}
	if len(list) <= indexAbove {
		return a
	}
	a.index = make(map[account]struct{}, len(list))
	for _, x := range list {
		a.index[x] = struct{}{}
	}
	return a
}

func (a *accounts) unset() bool { return len(a.list) == 0 }

func (a *accounts) has(x account) bool {
	if a.index != nil {
		_, ok := a.index[x]
		return ok
	}
	return slices.Contains(a.list, x)
}
