package control

import (
	"net/netip"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
	"istio.io/api/annotation"
	securityv1 "istio.io/api/security/v1beta1"

	"github.com/ztun/ztun/xds/securityapi"
)

// convertPolicies emits the policies and attaches those with a selector to the
// pods they select.
func (b *builder) convertPolicies() {
	for _, p := range b.set.policies {
		a := b.authorization(p)
		if a == nil {
			continue
		}
		b.world.addAuthorization(a)
		if a.Scope == securityapi.Scope_WORKLOAD_SELECTOR {
			for _, pod := range b.selected(&p.object, p.spec.GetSelector().GetMatchLabels()) {
				pod.policies = append(pod.policies, p.key())
			}
		}
	}
	b.convertPeerAuthentications()
}

// selected finds the pods that a policy's selector means, and says so when
// there are none, or none that anybody enforces it for.
func (b *builder) selected(o *object, selector map[string]string) []*builtPod {
	at := path{"spec", "selector"}
	o.checkLabels(at.of("matchLabels"), selector)
	var pods []*builtPod
	enforced := false
	for _, p := range b.pods {
		if (p.ns == o.ns || o.ns == b.mesh.RootNamespace) && matches(selector, p.Labels) {
			pods = append(pods, p)
			enforced = enforced || p.enrolled || nativeTunnel(p.Labels)
		}
	}
	switch {
	case len(pods) == 0:
		o.warnf(at, "selects no pod")
	case !enforced:
		o.warnf(at, "selects only pods outside the mesh: nothing enforces it for them")
	}
	return pods
}

// authorization is a policy as proxies know it, nil if they are not told of it.
func (b *builder) authorization(p *authorizationPolicy) *securityapi.Authorization {
	spec, at := p.spec, path{"spec"}
	a := &securityapi.Authorization{Name: p.name(), Namespace: p.ns}
	targeted := spec.GetTargetRef() != nil || len(spec.GetTargetRefs()) > 0
	switch {
	case spec.GetSelector() != nil && targeted:
		p.errorf(at.of("selector"), "selector and targetRefs exclude each other")
	case spec.GetSelector() != nil:
		a.Scope = securityapi.Scope_WORKLOAD_SELECTOR
	case p.ns == b.mesh.RootNamespace:
		a.Scope = securityapi.Scope_GLOBAL
	default:
		a.Scope = securityapi.Scope_NAMESPACE
	}
	if spec.Action == securityv1.AuthorizationPolicy_DENY {
		a.Action = securityapi.Action_DENY
	}

	c := ruleConverter{policy: p, deny: a.Action == securityapi.Action_DENY}
	for i, rule := range spec.Rules {
		if r := c.rule(at.of("rules", i), rule); r != nil {
			a.Rules = append(a.Rules, r)
		}
	}
	switch {
	case targeted:
		p.warnf(at, "has a targetRef, so only a waypoint would enforce it, and there is none")
		return nil
	case spec.Action != securityv1.AuthorizationPolicy_ALLOW && spec.Action != securityv1.AuthorizationPolicy_DENY:
		p.warnf(at.of("action"), "%v is not enforced: only ALLOW and DENY are", spec.Action)
		return nil
	case p.dryRun():
		p.warnf(path{"metadata", "annotations", annotation.IoIstioDryRun.Name}, "dry-run policies are not served")
		return nil
	case c.deny && len(spec.Rules) == 0:
		p.warnf(at, "a DENY without rules denies nothing")
	case c.foundL7 && c.deny && !effective(a.Rules):
		p.warnf(at, "has no effect: after the HTTP attributes are left out, nothing matches")
	}
	return a
}

func (p *authorizationPolicy) dryRun() bool {
	name := annotation.IoIstioDryRun.Name
	v, ok := p.meta.Annotations[name]
	if !ok {
		return false
	}
	dry, err := strconv.ParseBool(v)
	if err != nil {
		p.errorf(path{"metadata", "annotations", name}, "%q is neither true nor false", v)
	}
	return dry
}

// effective says whether any rule can match: one without clauses, or one whose
// every clause has a match that is not empty.
func effective(rules []*securityapi.Rule) bool {
	for _, r := range rules {
		can := true
		for _, c := range r.Clauses {
			some := false
			for _, m := range c.Matches {
				some = some || !isEmptyMatch(m)
			}
			can = can && some
		}
		if can {
			return true
		}
	}
	return false
}

func isEmptyMatch(m *securityapi.Match) bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+
		len(m.SourceIps)+len(m.NotSourceIps)+len(m.DestinationIps)+len(m.NotDestinationIps)+
		len(m.DestinationPorts)+len(m.NotDestinationPorts)+len(m.ServiceAccounts)+len(m.NotServiceAccounts) == 0
}

// ruleConverter turns the rules of one policy into clauses. What needs HTTP
// cannot be enforced at this layer. An ALLOW rule that asks for it is left out
// whole, which allows less than was asked; in a DENY rule the HTTP part alone is
// left out, which denies more; a clause that has nothing else stays, empty, and
// never matches.
type ruleConverter struct {
	policy  *authorizationPolicy
	deny    bool
	foundL7 bool // in any rule so far
	ruleL7  bool // in this rule
}

// rule returns nil for a rule that is left out.
func (c *ruleConverter) rule(at path, r *securityv1.Rule) *securityapi.Rule {
	c.ruleL7 = false
	out := &securityapi.Rule{}
	c.notEmpty(at, "from", "to", "when")
	var to, from []*securityapi.Match
	for i, t := range r.GetTo() {
		to = append(to, c.operation(at.of("to", i, "operation"), t.GetOperation()))
	}
	for i, f := range r.GetFrom() {
		from = append(from, c.source(at.of("from", i, "source"), f.GetSource()))
	}
	for _, matches := range [][]*securityapi.Match{to, from} {
		if len(matches) > 0 {
			out.Clauses = append(out.Clauses, &securityapi.Clause{Matches: matches})
		}
	}
	for i, w := range r.GetWhen() {
		m := c.condition(at.of("when", i), w)
		out.Clauses = append(out.Clauses, &securityapi.Clause{Matches: []*securityapi.Match{m}})
	}
	c.foundL7 = c.foundL7 || c.ruleL7
	if c.ruleL7 && !c.deny {
		return nil
	}
	return out
}

// notEmpty refuses lists that are written but have no items: what looks like
// "nobody" would mean "anybody".
func (c *ruleConverter) notEmpty(at path, fields ...string) {
	n := c.policy.find(at)
	if n == nil {
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, v := n.Content[i], n.Content[i+1]
		if v.Kind != yaml.SequenceNode || len(v.Content) > 0 {
			continue
		}
		for _, f := range fields {
			if f == key.Value || f == "*" {
				c.policy.errorf(at.of(key.Value), "is an empty list")
			}
		}
	}
}

// given refuses a source or operation that asks for nothing.
func (c *ruleConverter) given(at path) bool {
	n := c.policy.find(at)
	if n == nil || len(n.Content) == 0 {
		c.policy.errorf(at, "must not be empty")
		return false
	}
	c.notEmpty(at, "*")
	return true
}

// unsupported notes attributes that need HTTP.
func (c *ruleConverter) unsupported(at path, fields map[string][]string) {
	for name, values := range sorted(fields) {
		if len(values) == 0 {
			continue
		}
		c.ruleL7 = true
		c.warnL7(at.of(name))
	}
}

func (c *ruleConverter) warnL7(at path) {
	if c.deny {
		c.policy.warnf(at, "cannot be enforced without HTTP and is left out: the rule denies more than it says, or nothing if it says nothing else")
	} else {
		c.policy.warnf(at, "cannot be enforced without HTTP: the rule it is in allows nothing")
	}
}

func (c *ruleConverter) operation(at path, op *securityv1.Operation) *securityapi.Match {
	if !c.given(at) {
		return &securityapi.Match{}
	}
	c.unsupported(at, map[string][]string{
		"hosts": op.GetHosts(), "notHosts": op.GetNotHosts(),
		"methods": op.GetMethods(), "notMethods": op.GetNotMethods(),
		"paths": op.GetPaths(), "notPaths": op.GetNotPaths(),
	})
	return &securityapi.Match{
		DestinationPorts:    c.ports(at.of("ports"), op.GetPorts()),
		NotDestinationPorts: c.ports(at.of("notPorts"), op.GetNotPorts()),
	}
}

func (c *ruleConverter) source(at path, s *securityv1.Source) *securityapi.Match {
	if !c.given(at) {
		return &securityapi.Match{}
	}
	// Trust domains have no field of their own in a Match, and as principals they
	// would widen what they should narrow.
	c.unsupported(at, map[string][]string{
		"remoteIpBlocks": s.GetRemoteIpBlocks(), "notRemoteIpBlocks": s.GetNotRemoteIpBlocks(),
		"requestPrincipals": s.GetRequestPrincipals(), "notRequestPrincipals": s.GetNotRequestPrincipals(),
		"trustDomains": s.GetTrustDomains(), "notTrustDomains": s.GetNotTrustDomains(),
	})
	return &securityapi.Match{
		Namespaces:         c.strings(at.of("namespaces"), s.GetNamespaces()),
		NotNamespaces:      c.strings(at.of("notNamespaces"), s.GetNotNamespaces()),
		Principals:         c.principals(at.of("principals"), s.GetPrincipals()),
		NotPrincipals:      c.principals(at.of("notPrincipals"), s.GetNotPrincipals()),
		ServiceAccounts:    c.accounts(at.of("serviceAccounts"), s.GetServiceAccounts()),
		NotServiceAccounts: c.accounts(at.of("notServiceAccounts"), s.GetNotServiceAccounts()),
		SourceIps:          c.blocks(at.of("ipBlocks"), s.GetIpBlocks()),
		NotSourceIps:       c.blocks(at.of("notIpBlocks"), s.GetNotIpBlocks()),
	}
}

func (c *ruleConverter) condition(at path, w *securityv1.Condition) *securityapi.Match {
	c.notEmpty(at, "*")
	if len(w.GetValues())+len(w.GetNotValues()) == 0 {
		c.policy.errorf(at, "needs values or notValues")
	}
	m := &securityapi.Match{}
	yes, no := at.of("values"), at.of("notValues")
	switch w.GetKey() {
	case "source.ip":
		m.SourceIps, m.NotSourceIps = c.blocks(yes, w.Values), c.blocks(no, w.NotValues)
	case "source.namespace":
		m.Namespaces, m.NotNamespaces = c.strings(yes, w.Values), c.strings(no, w.NotValues)
	case "source.principal":
		m.Principals, m.NotPrincipals = c.principals(yes, w.Values), c.principals(no, w.NotValues)
	case "destination.ip":
		m.DestinationIps, m.NotDestinationIps = c.blocks(yes, w.Values), c.blocks(no, w.NotValues)
	case "destination.port":
		m.DestinationPorts, m.NotDestinationPorts = c.ports(yes, w.Values), c.ports(no, w.NotValues)
	case "":
		c.policy.errorf(at.of("key"), "must not be empty")
	default:
		c.ruleL7 = true
		c.warnL7(at.of("key"))
	}
	return m
}

func (c *ruleConverter) ports(at path, values []string) []uint32 {
	var out []uint32
	for i, v := range values {
		port, err := strconv.ParseUint(v, 10, 16)
		if err != nil || port == 0 {
			c.policy.errorf(at.of(i), "%q is no port: 1 to 65535", v)
			continue
		}
		out = append(out, uint32(port))
	}
	return out
}

func (c *ruleConverter) blocks(at path, values []string) []*securityapi.Address {
	var out []*securityapi.Address
	for i, v := range values {
		block, err := netip.ParsePrefix(v)
		if !strings.Contains(v, "/") {
			var addr netip.Addr
			if addr, err = netip.ParseAddr(v); err == nil {
				block = netip.PrefixFrom(addr, addr.BitLen())
			}
		}
		if err != nil || block.Addr().Zone() != "" || block.Addr().Is4In6() {
			c.policy.errorf(at.of(i), "%q is neither an IP address nor a network", v)
			continue
		}
		out = append(out, &securityapi.Address{Address: block.Masked().Addr().AsSlice(), Length: uint32(block.Bits())})
	}
	return out
}

func (c *ruleConverter) principals(at path, values []string) []*securityapi.StringMatch {
	for i, v := range values {
		if strings.HasPrefix(v, "spiffe://") {
			c.policy.errorf(at.of(i), "principals are written without spiffe://, as in cluster.local/ns/default/sa/default")
		}
	}
	return c.strings(at, values)
}

// strings reads the four forms of a string match: x, x*, *x, and * alone, which
// means that there is one.
func (c *ruleConverter) strings(at path, values []string) []*securityapi.StringMatch {
	var out []*securityapi.StringMatch
	for i, v := range values {
		m := &securityapi.StringMatch{}
		literal := v
		switch {
		case v == "":
			c.policy.errorf(at.of(i), "must not be empty")
			continue
		case v == "*":
			m.MatchType, literal = &securityapi.StringMatch_Presence{Presence: &securityapi.Presence{}}, ""
		case strings.HasPrefix(v, "*"):
			literal = v[1:]
			m.MatchType = &securityapi.StringMatch_Suffix{Suffix: literal}
		case strings.HasSuffix(v, "*"):
			literal = v[:len(v)-1]
			m.MatchType = &securityapi.StringMatch_Prefix{Prefix: literal}
		default:
			m.MatchType = &securityapi.StringMatch_Exact{Exact: v}
		}
		if strings.Contains(literal, "*") {
			c.policy.warnf(at.of(i), "an asterisk elsewhere than at one end of %q stands for itself", v)
		}
		out = append(out, m)
	}
	return out
}

// accounts reads "account", of the policy's own namespace, and "namespace/account".
func (c *ruleConverter) accounts(at path, values []string) []*securityapi.ServiceAccountMatch {
	var out []*securityapi.ServiceAccountMatch
	for i, v := range values {
		ns, sa, ok := strings.Cut(v, "/")
		if !ok {
			ns, sa = c.policy.ns, v
		}
		if ns == "" || sa == "" || strings.ContainsAny(v, "*") || strings.Contains(sa, "/") {
			c.policy.errorf(at.of(i), "%q is neither a service account nor namespace/account", v)
			continue
		}
		out = append(out, &securityapi.ServiceAccountMatch{Namespace: ns, ServiceAccount: sa})
	}
	return out
}
