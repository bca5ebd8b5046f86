package mesh

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/securityapi"
)

// Addresses returns the handler for xds.AddressType.
func (s *Store) Addresses() xds.Handler { return addresses{s} }

// Authorizations returns the handler for xds.AuthorizationType.
func (s *Store) Authorizations() xds.Handler { return authorizations{s} }

type addresses struct{ store *Store }

// Apply decodes everything first; the lock and the new snapshot come after.
func (a addresses) Apply(added []xds.Resource, removed []string) []xds.Rejection {
	s := a.store
	var rejected []xds.Rejection
	items := make([]any, 0, len(added))
	for i := range added {
		item, err := s.config.address(&added[i])
		if err != nil {
			rejected = append(rejected, xds.Rejection{Name: added[i].Name, Err: err})
			continue
		}
		items = append(items, item)
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	e := newEdit(s.Snapshot())
	for _, item := range items {
		var name string
		var err error
		switch v := item.(type) {
		case *Workload:
			name, err = v.UID, e.putWorkload(v)
		case *Service:
			name, err = v.String(), e.putService(v)
		}
		if err != nil {
			rejected = append(rejected, xds.Rejection{Name: name, Err: err})
		}
	}
	for _, name := range removed {
		e.removeAddress(name)
	}
	s.publish(e.next)
	return rejected
}

// removeAddress drops what a removed name means: a workload's UID, or else a
// service's namespace/hostname. A name that is not known is nothing to drop.
func (e *edit) removeAddress(name string) {
	if e.removeWorkload(name) {
		return
	}
	if namespace, hostname, ok := strings.Cut(name, "/"); ok {
		e.removeService(ServiceKey{namespace, hostname})
	}
}

type authorizations struct{ store *Store }

var errNoNamespace = errors.New("namespace scope without a namespace")

// Apply keeps the old policy where the new one cannot be used. Where there is
// no old one, what is known of the scope is kept, so that the policy counts as
// missing where it would apply, and is not just left out.
func (a authorizations) Apply(added []xds.Resource, removed []string) []xds.Rejection {
	s := a.store
	var rejected []xds.Rejection
	entries := make([]*policyEntry, 0, len(added))
	for i := range added {
		entry, err := compile(&added[i])
		if err != nil {
			rejected = append(rejected, xds.Rejection{Name: added[i].Name, Err: err})
		}
		if entry != nil {
			entries = append(entries, entry)
		}
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	e := newEdit(s.Snapshot())
	for _, entry := range entries {
		e.putPolicy(entry)
	}
	for _, name := range removed {
		e.removePolicy(name)
	}
	e.next.PolicyVersion++
	s.publish(e.next)
	return rejected
}

// compile returns an entry without a policy when the policy cannot be used but
// its scope can be told.
func compile(r *xds.Resource) (*policyEntry, error) {
	var a securityapi.Authorization
	if err := proto.Unmarshal(r.Body, &a); err != nil {
		return nil, fmt.Errorf("mesh: decode policy: %w", err)
	}
	entry := &policyEntry{key: r.Name, inert: a.GetDryRun()}
	switch a.GetScope() {
	case securityapi.Scope_GLOBAL:
		entry.scoped = true
	case securityapi.Scope_NAMESPACE:
		if a.GetNamespace() == "" {
			return nil, fmt.Errorf("mesh: policy %s: %w", r.Name, errNoNamespace)
		}
		entry.scoped, entry.home = true, a.GetNamespace()
	}
	p, err := authz.Compile(r.Name, &a)
	entry.policy = p
	return entry, err
}
