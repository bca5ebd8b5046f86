// Package authz compiles L4 authorization policies and checks connections
// against them. It is pure: no clock, no state, no I/O.
//
//	p, err := authz.Compile("default/deny-9999", proto)
//	v := authz.Check(authz.Input{Src: src, Dst: dst, Peer: id}, policies, missing)
//	if !v.Allowed { ... v.Policy, v.Reason ... }
//
// A Policy is immutable and may be used by any number of goroutines. Which
// policies apply to a workload is not decided here, see mesh.Snapshot.Policies.
//
// Nothing weakens a policy silently: an entry that cannot be read (a bad IP, a
// port above 65535, a string match without a kind) makes Compile refuse the
// whole resource.
package authz
