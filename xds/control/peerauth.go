package control

import (
	"slices"
	"strings"

	securityv1 "istio.io/api/security/v1beta1"

	"github.com/ztun/ztun/xds/securityapi"
)

// Underscores are illegal in names of Kubernetes objects, so these meet no
// AuthorizationPolicy's name.
const (
	staticStrict    = "istio_converted_static_strict"
	convertedPrefix = "converted_peer_authentication_"
)

const (
	modeUnset  = securityv1.PeerAuthentication_MutualTLS_UNSET
	modeStrict = securityv1.PeerAuthentication_MutualTLS_STRICT
)

// convertPeerAuthentications turns mTLS modes into policies that deny peers
// without an identity. A pod's mode is that of the most specific
// PeerAuthentication that sets one: selector, namespace, mesh; the oldest of
// several. DISABLE means PERMISSIVE here.
func (b *builder) convertPeerAuthentications() {
	if len(b.set.peerAuths) == 0 {
		return
	}
	b.world.addAuthorization(&securityapi.Authorization{
		Name: staticStrict, Namespace: b.mesh.RootNamespace,
		Scope: securityapi.Scope_WORKLOAD_SELECTOR, Action: securityapi.Action_DENY,
		Rules: []*securityapi.Rule{{Clauses: []*securityapi.Clause{plaintextClause()}}},
	})
	wide := make(map[string]*peerAuthentication) // by namespace
	var narrow []*peerAuthentication             // oldest first
	for _, pa := range oldestFirst(b.set.peerAuths) {
		at := path{"spec"}
		for port := range sorted(pa.spec.GetPortLevelMtls()) {
			if port == 0 || port > 65535 {
				pa.errorf(at.of("portLevelMtls"), "%d is no port: 1 to 65535", port)
			}
		}
		if len(pa.spec.GetSelector().GetMatchLabels()) > 0 {
			if pa.ns == b.mesh.RootNamespace {
				pa.warnf(at.of("selector"), "has no effect: a selector in the root namespace is not served")
				continue
			}
			narrow = append(narrow, pa)
			continue
		}
		if len(pa.spec.GetPortLevelMtls()) > 0 {
			pa.errorf(at.of("portLevelMtls"), "needs a selector")
		}
		if first := wide[pa.ns]; first != nil {
			pa.warnf(nil, "has no effect: the one at %s is older, or has the earlier name", first.where())
			continue
		}
		wide[pa.ns] = pa
	}
	parent := func(ns string) bool {
		strict := wide[b.mesh.RootNamespace].mode() == modeStrict
		if mode := wide[ns].mode(); mode != modeUnset {
			strict = mode == modeStrict
		}
		return strict
	}
	for _, pa := range narrow {
		if a := pa.convert(parent(pa.ns)); a != nil {
			b.world.addAuthorization(a)
		}
	}
	b.attachPeerAuthentications(narrow, parent)
}

// attachPeerAuthentications gives each pod the key of the policy it needs:
// the static one, its own ports' one, or none.
func (b *builder) attachPeerAuthentications(narrow []*peerAuthentication, parent func(ns string) bool) {
	attached := make(map[*builtPod]*peerAuthentication)
	for _, pa := range narrow {
		for _, p := range b.selected(&pa.object, pa.spec.GetSelector().GetMatchLabels()) {
			if first := attached[p]; first != nil {
				pa.warnf(path{"spec", "selector"}, "has no effect on pod %s: the one at %s is older, or has the earlier name", p.key(), first.where())
				continue
			}
			attached[p] = pa
		}
	}
	static := b.mesh.RootNamespace + "/" + staticStrict
	for _, p := range b.pods {
		strict := parent(p.ns)
		pa := attached[p]
		if pa != nil {
			strict = pa.strict(strict)
			if len(pa.exceptions(strict)) > 0 {
				p.policies = append(p.policies, pa.ns+"/"+convertedPrefix+pa.name())
				continue
			}
		}
		if strict {
			p.policies = append(p.policies, static)
		}
	}
}

// mode is the mode for all ports; a nil receiver sets none.
func (pa *peerAuthentication) mode() securityv1.PeerAuthentication_MutualTLS_Mode {
	if pa == nil {
		return modeUnset
	}
	return pa.spec.GetMtls().GetMode()
}

// strict says whether the ports that are not named are strict.
func (pa *peerAuthentication) strict(parent bool) bool {
	if m := pa.mode(); m != modeUnset {
		return m == modeStrict
	}
	return parent
}

// exceptions are the ports whose mode differs from the others', in order.
func (pa *peerAuthentication) exceptions(strict bool) []uint32 {
	var ports []uint32
	for port, mtls := range sorted(pa.spec.GetPortLevelMtls()) {
		if m := mtls.GetMode(); m != modeUnset && (m == modeStrict) != strict {
			ports = append(ports, port)
		}
	}
	return ports
}

// convert is the policy for the ports that differ, nil when there are none.
func (pa *peerAuthentication) convert(parentStrict bool) *securityapi.Authorization {
	strict := pa.strict(parentStrict)
	ports := pa.exceptions(strict)
	if len(ports) == 0 {
		return nil
	}
	a := &securityapi.Authorization{
		Name: convertedPrefix + pa.name(), Namespace: pa.ns,
		Scope: securityapi.Scope_WORKLOAD_SELECTOR, Action: securityapi.Action_DENY,
	}
	if !strict {
		for _, port := range ports {
			m := &securityapi.Match{DestinationPorts: []uint32{port}, NotPrincipals: anyPrincipal()}
			a.Rules = append(a.Rules, &securityapi.Rule{Clauses: []*securityapi.Clause{{Matches: []*securityapi.Match{m}}}})
		}
		return a
	}
	var clauses []*securityapi.Clause
	for _, port := range ports {
		clauses = append(clauses, &securityapi.Clause{Matches: []*securityapi.Match{{NotDestinationPorts: []uint32{port}}}})
	}
	if pa.mode() == modeStrict {
		clauses = append([]*securityapi.Clause{plaintextClause()}, clauses...)
	} else {
		clauses = append(clauses, plaintextClause())
	}
	a.Rules = []*securityapi.Rule{{Clauses: clauses}}
	return a
}

// plaintextClause matches peers without an identity.
func plaintextClause() *securityapi.Clause {
	return &securityapi.Clause{Matches: []*securityapi.Match{{NotPrincipals: anyPrincipal()}}}
}

func anyPrincipal() []*securityapi.StringMatch {
	return []*securityapi.StringMatch{{MatchType: &securityapi.StringMatch_Presence{Presence: &securityapi.Presence{}}}}
}

func oldestFirst(pas []*peerAuthentication) []*peerAuthentication {
	out := slices.Clone(pas)
	slices.SortStableFunc(out, func(a, b *peerAuthentication) int {
		if c := a.meta.CreationTimestamp.Compare(b.meta.CreationTimestamp.Time); c != 0 {
			return c
		}
		return strings.Compare(a.key(), b.key())
	})
	return out
}
