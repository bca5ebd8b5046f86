package authz

import (
	"fmt"
	"net/netip"

	"github.com/ztun/ztun/tunnel/identity"
)

// Input is one connection as a policy sees it.
type Input struct {
	Src netip.AddrPort // The TCP peer.
	Dst netip.AddrPort // Where the connection goes on to, with the real backend port.
	// Peer is the identity from the peer's certificate; zero for plaintext.
	Peer identity.ID
}

// Reason says why a Verdict is what it is.
type Reason uint8

const (
	// NoAllowPolicies: nothing denies and no ALLOW policy applies. Allowed.
	NoAllowPolicies Reason = iota
	// AllowMatched: Verdict.Policy allows. Allowed.
	AllowMatched
	// DenyMatched: Verdict.Policy denies.
	DenyMatched
	// NotDelivered: Verdict.Policy applies, but the control plane has not sent
	// it, or what it sent could not be used. Denied: not open, not skipped.
	NotDelivered
	// NoneAllowed: ALLOW policies apply and none of them matches. Denied.
	NoneAllowed
)

// String names the reason.
func (r Reason) String() string {
	switch r {
	case NoAllowPolicies:
		return "no allow policies"
	case AllowMatched:
		return "allowed by policy"
	case DenyMatched:
		return "explicitly denied"
	case NotDelivered:
		return "policy not delivered"
	case NoneAllowed:
		return "allow policies exist but none allowed"
	}
	return fmt.Sprintf("Reason(%d)", uint8(r))
}

// A Verdict is the outcome of Check.
type Verdict struct {
	Allowed bool
	Reason  Reason
	// Policy is the key of the policy that decided, if one did.
	Policy string
	// DryRun holds what policies in dry-run mode would have done.
	DryRun []DryRun
}

// String is the text of logs and errors.
func (v Verdict) String() string {
	switch v.Reason {
	case DenyMatched:
		return "explicitly denied by: " + v.Policy
	case NotDelivered:
		return "policy not delivered: " + v.Policy
	case AllowMatched:
		return "allowed by: " + v.Policy
	}
	return v.Reason.String()
}

// A DryRun is the outcome of a policy that is not enforced. An empty Policy
// says that dry-run ALLOW policies apply, no enforced ones do, and none
// matched: the connection would have been denied.
type DryRun struct {
	Policy string
	Action Action
}

// String is the log message for the outcome.
func (d DryRun) String() string {
	switch {
	case d.Policy == "":
		return "dry-run: no allow policies match"
	case d.Action == Deny:
		return "dry-run: deny policy match"
	}
	return "dry-run: allow policy match"
}

// Check decides about one connection. policies are all that apply to the
// destination, in any order; missing are the keys of those that apply but are
// not there. The order: an enforced DENY that matches, a missing policy,
// no enforced ALLOW at all, an enforced ALLOW that matches, else denied.
func Check(in Input, policies []*Policy, missing []string) Verdict {
	in.Src = canonical(in.Src)
	in.Dst = canonical(in.Dst)
	var notes []DryRun
	var allows, dryAllows int
	for _, p := range policies {
		switch {
		case p.Action == Allow && p.DryRun:
			dryAllows++
		case p.Action == Allow:
			allows++
		case p.DryRun:
			if p.Matches(&in) {
				notes = append(notes, DryRun{p.Key, Deny})
			}
		}
	}
	for _, p := range policies {
		if p.Action == Deny && !p.DryRun && p.Matches(&in) {
			return Verdict{Reason: DenyMatched, Policy: p.Key, DryRun: notes}
		}
	}
	if len(missing) > 0 {
		return Verdict{Reason: NotDelivered, Policy: missing[0], DryRun: notes}
	}
	if dryAllows > 0 {
		notes = dryRunAllows(&in, policies, notes, allows == 0)
	}
	if allows == 0 {
		return Verdict{Allowed: true, Reason: NoAllowPolicies, DryRun: notes}
	}
	for _, p := range policies {
		if p.Action == Allow && !p.DryRun && p.Matches(&in) {
			return Verdict{Allowed: true, Reason: AllowMatched, Policy: p.Key, DryRun: notes}
		}
	}
	return Verdict{Reason: NoneAllowed, DryRun: notes}
}

// dryRunAllows appends the dry-run ALLOW policies that match; alone says that
// no enforced ALLOW applies, so that no match at all is worth a note.
func dryRunAllows(in *Input, policies []*Policy, notes []DryRun, alone bool) []DryRun {
	matched := false
	for _, p := range policies {
		if p.Action == Allow && p.DryRun && p.Matches(in) {
			matched = true
			notes = append(notes, DryRun{p.Key, Allow})
		}
	}
	if !matched && alone {
		notes = append(notes, DryRun{Action: Allow})
	}
	return notes
}

// canonical turns an IPv4-mapped IPv6 address into the IPv4 one and drops a zone.
func canonical(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
