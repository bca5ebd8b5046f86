package authz

import (
	"encoding/json"
	"net/netip"
)

// MarshalJSON gives the form of ztunnel's config dump, which istioctl reads.
func (p *Policy) MarshalJSON() ([]byte, error) {
	d := policyDump{
		Action:    p.Action.String(),
		DryRun:    p.DryRun,
		Name:      p.Name,
		Namespace: p.Namespace,
		Rules:     make([][][]matchDump, len(p.rules)),
		Scope:     p.Scope.String(),
	}
	for i, r := range p.rules {
		d.Rules[i] = make([][]matchDump, len(r))
		for j, c := range r {
			d.Rules[i][j] = make([]matchDump, len(c))
			for k := range c {
				d.Rules[i][j][k] = c[k].dump()
			}
		}
	}
	return json.Marshal(d)
}

type policyDump struct {
	Action    string          `json:"action"`
	DryRun    bool            `json:"dryRun"`
	Name      string          `json:"name"`
	Namespace string          `json:"namespace"`
	Rules     [][][]matchDump `json:"rules"`
	Scope     string          `json:"scope"`
}

type matchDump struct {
	DestinationIPs      []netip.Prefix `json:"destinationIps,omitempty"`
	DestinationPorts    []uint16       `json:"destinationPorts,omitempty"`
	Namespaces          []strMatch     `json:"namespaces,omitempty"`
	NotDestinationIPs   []netip.Prefix `json:"notDestinationIps,omitempty"`
	NotDestinationPorts []uint16       `json:"notDestinationPorts,omitempty"`
	NotNamespaces       []strMatch     `json:"notNamespaces,omitempty"`
	NotPrincipals       []strMatch     `json:"notPrincipals,omitempty"`
	NotServiceAccounts  []account      `json:"notServiceAccounts,omitempty"`
	NotSourceIPs        []netip.Prefix `json:"notSourceIps,omitempty"`
	Principals          []strMatch     `json:"principals,omitempty"`
	ServiceAccounts     []account      `json:"serviceAccounts,omitempty"`
	SourceIPs           []netip.Prefix `json:"sourceIps,omitempty"`
}

func (m *match) dump() matchDump {
	return matchDump{
		DestinationIPs:      m.destinationIPs.list,
		DestinationPorts:    m.destinationPorts.list,
		Namespaces:          m.namespaces.list,
		NotDestinationIPs:   m.notDestinationIPs.list,
		NotDestinationPorts: m.notDestPorts.list,
		NotNamespaces:       m.notNamespaces.list,
		NotPrincipals:       m.notPrincipals.list,
		NotServiceAccounts:  m.notServiceAccounts.list,
		NotSourceIPs:        m.notSourceIPs.list,
		Principals:          m.principals.list,
		ServiceAccounts:     m.serviceAccounts.list,
		SourceIPs:           m.sourceIPs.list,
	}
}

func (s strMatch) MarshalJSON() ([]byte, error) {
	switch s.kind {
	case exact:
		return json.Marshal(map[string]string{"Exact": s.text})
	case prefix:
		return json.Marshal(map[string]string{"Prefix": s.text})
	case suffix:
		return json.Marshal(map[string]string{"Suffix": s.text})
	default:
		return []byte(`{"Presence":[]}`), nil
	}
}

func (a account) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Namespace      string `json:"namespace"`
		ServiceAccount string `json:"serviceAccount"`
	}{a.namespace, a.name})
}
