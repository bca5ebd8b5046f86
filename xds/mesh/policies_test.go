package mesh

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/securityapi"
)

func policy(namespace, name string, scope securityapi.Scope) *securityapi.Authorization {
	return &securityapi.Authorization{Namespace: namespace, Name: name, Scope: scope, Action: securityapi.Action_DENY, Rules: []*securityapi.Rule{{}}}
}

// broken gives the policy a port that cannot be.
func broken(p *securityapi.Authorization) *securityapi.Authorization {
	p.Rules = []*securityapi.Rule{{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{{DestinationPorts: []uint32{1 << 20}}}}}}}
	return p
}

func dryRun(p *securityapi.Authorization) *securityapi.Authorization {
	p.DryRun = true
	return p
}

func named(keys ...string) workloadOption {
	return func(w *pbWorkload) { w.AuthorizationPolicies = keys }
}

func (w world) wantPolicies(why, apply, missing string) {
	w.t.Helper()
	s := w.Snapshot()
	got, gone := s.Policies(s.Workload("cluster1//Pod/ns/a"))
	var keys []string
	for _, p := range got {
		keys = append(keys, p.Key)
	}
	slices.Sort(keys)
	if strings.Join(keys, " ") != apply || strings.Join(gone, " ") != missing {
		w.t.Errorf("%s: Policies = %v, missing %v; want %s, missing %s", why, keys, gone, apply, missing)
	}
}

const (
	global   = securityapi.Scope_GLOBAL
	inside   = securityapi.Scope_NAMESPACE
	selected = securityapi.Scope_WORKLOAD_SELECTOR
)

func TestPoliciesByScope(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(pod("ns", "a", "10.0.0.1", named("ns/sel", "other/sel")))
	w.wantPolicies("named, not delivered", "", "ns/sel other/sel")
	w.policies(
		policy("root", "g", global), policy("ns", "n", inside), policy("other", "n", inside),
		policy("ns", "sel", selected), policy("ns", "unnamed", selected),
	)
	w.wantPolicies("delivered, but for one", "ns/n ns/sel root/g", "other/sel")
	w.policies(policy("other", "sel", selected))
	w.wantPolicies("all delivered", "ns/n ns/sel other/sel root/g", "")
	w.policies(policy("ns", "n", selected), policy("root", "g", inside))
	w.wantPolicies("a change of scope leaves the old one", "ns/sel other/sel", "")
	w.policies(policy("ns", "n", inside))
	w.Authorizations().Apply(nil, []string{"ns/n", "ns/sel", "unknown/x"})
	w.wantPolicies("removed", "other/sel", "ns/sel")
	w.Authorizations().Apply(nil, []string{"other/sel", "other/n", "root/g", "ns/unnamed"})
	if s := w.Snapshot(); s.policies.len()+s.scoped.len() != 0 {
		t.Errorf("%d entries are left in the indexes", s.policies.len()+s.scoped.len())
	}
}

func TestRejectedPolicyNeverWeakens(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(pod("ns", "a", "10.0.0.1"))
	w.policies(policy("ns", "n", inside))
	version := w.Snapshot().PolicyVersion
	rejected := w.policies(broken(policy("ns", "n", selected)), policy("root", "g", global))
	if len(rejected) != 1 || rejected[0].Name != "ns/n" || !strings.Contains(rejected[0].Err.Error(), "destination_ports[0]") {
		t.Errorf("rejected = %v, want ns/n and its field", rejected)
	}
	if w.Snapshot().PolicyVersion == version {
		t.Error("the policy version did not change")
	}
	w.wantPolicies("the old one is kept", "ns/n root/g", "")

	w.policies(broken(policy("root", "g2", global)), broken(policy("ns", "n2", inside)), broken(policy("other", "n2", inside)))
	w.wantPolicies("without an old one it is missing where it would apply", "ns/n root/g", "ns/n2 root/g2")
	s := w.Snapshot()
	apply, missing := s.Policies(s.Workload("cluster1//Pod/ns/a"))
	in := authz.Input{Src: netip.MustParseAddrPort("10.0.0.9:1"), Dst: netip.MustParseAddrPort("10.0.0.1:80")}
	if v := authz.Check(in, apply[:0], missing); v.Allowed || v.Reason != authz.NotDelivered {
		t.Errorf("Check = %v, want denied because not delivered", v)
	}
	w.policies(dryRun(broken(policy("root", "g3", global))))
	w.wantPolicies("a dry run would not be enforced anyway", "ns/n root/g", "ns/n2 root/g2")
	w.policies(policy("root", "g2", global), broken(policy("ns", "n2", inside)))
	w.wantPolicies("mended", "ns/n root/g root/g2", "ns/n2")
	w.Authorizations().Apply(nil, []string{"ns/n2"})
	w.wantPolicies("removed", "ns/n root/g root/g2", "")
	w.policies(broken(policy("ns", "n2", inside)))
	w.policies(broken(policy("ns", "n2", selected)))
	w.wantPolicies("the scope is the last one told", "ns/n root/g root/g2", "")

	for _, r := range []xds.Resource{{Name: "ns/junk", Body: []byte{0xff}}, encode(t, policy("", "n", inside))} {
		if rejected := w.Authorizations().Apply([]xds.Resource{r}, nil); len(rejected) != 1 {
			t.Errorf("%s: rejected = %v, want one", r.Name, rejected)
		}
	}
}
