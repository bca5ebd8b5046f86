package mesh

import (
	"errors"
	"slices"
	"strings"
)

// maxShared is how many workloads or services may share one address, host name
// or prefix: removing one of n costs O(n).
const maxShared = 1 << 14

var errShared = errors.New("mesh: too many resources share one address or host name")

// An edit makes the next snapshot from the last one. It changes maps in place
// that it has copied already, so it must not be used after publishing.
type edit struct {
	b    *batch
	next *Snapshot
}

func newEdit(s *Snapshot) *edit {
	next := *s
	return &edit{new(batch), &next}
}

// members are the workloads that name one service.
type members struct {
	owner *batch
	byUID pmap[string, *Workload]
	// tables is the cache of choose; nil until first used.
	tables tableCache
}

func (e *edit) putWorkload(w *Workload) error {
	old, ok := e.next.workloads.get(w.UID)
	for _, ip := range w.Addrs {
		list, _ := e.next.byIP.get(keyOf(w.Network, ip))
		if !w.HostNetwork && len(list) >= maxShared && !slices.Contains(list, old) {
			return errShared
		}
	}
	if ok {
		e.unlink(old)
		for i := range old.Services {
			if _, still := w.Member(old.Services[i].Service); !still {
				e.leave(old.Services[i].Service, old.UID)
			}
		}
	}
	n := e.next
	if namespace, hostname, ok := strings.Cut(w.UID, "/"); ok {
		// One name is one resource, whatever it was before.
		e.removeService(ServiceKey{namespace, hostname})
	}
	n.workloads = n.workloads.set(e.b, w.UID, w)
	for i := range w.Services {
		e.join(w.Services[i].Service, w)
	}
	if !w.HostNetwork {
		for _, ip := range w.Addrs {
			n.byIP = pushed(e.b, n.byIP, keyOf(w.Network, ip), w)
		}
	}
	if e.isLocal(w) {
		n.local = pushed(e.b, n.local, localKey{w.Name, w.Namespace, w.ServiceAccount}, w)
		if w.needsCertificate() {
			count, _ := n.ids.get(w.Identity)
			n.ids = n.ids.set(e.b, w.Identity, count+1)
		}
	}
	return nil
}

func (w *Workload) needsCertificate() bool {
	return !w.Identity.IsZero() && (w.Protocol == ProtocolHBONE || w.NativeTunnel)
}

func (e *edit) isLocal(w *Workload) bool {
	return e.next.config.LocalNode == "" || w.Node == e.next.config.LocalNode
}

func (e *edit) removeWorkload(uid string) bool {
	old, ok := e.next.workloads.get(uid)
	if !ok {
		return false
	}
	e.unlink(old)
	for i := range old.Services {
		e.leave(old.Services[i].Service, uid)
	}
	e.next.workloads = e.next.workloads.remove(e.b, uid)
	return true
}

// unlink takes w out of the indexes that a new w will be put into again.
func (e *edit) unlink(w *Workload) {
	n := e.next
	if !w.HostNetwork {
		for _, ip := range w.Addrs {
			n.byIP = dropped(e.b, n.byIP, keyOf(w.Network, ip), w)
		}
	}
	if e.isLocal(w) {
		n.local = dropped(e.b, n.local, localKey{w.Name, w.Namespace, w.ServiceAccount}, w)
		if w.needsCertificate() {
			if count, _ := n.ids.get(w.Identity); count > 1 {
				n.ids = n.ids.set(e.b, w.Identity, count-1)
			} else {
				n.ids = n.ids.remove(e.b, w.Identity)
			}
		}
	}
}

// join makes w an endpoint of a service, known or not.
func (e *edit) join(key ServiceKey, w *Workload) {
	m := e.members(key)
	m.byUID = m.byUID.set(e.b, w.UID, w)
}

func (e *edit) leave(key ServiceKey, uid string) {
	m := e.members(key)
	m.byUID = m.byUID.remove(e.b, uid)
	if m.byUID.len() == 0 {
		e.next.members = e.next.members.remove(e.b, key)
	}
}

// members returns the service's members, in a form that this edit may change.
func (e *edit) members(key ServiceKey) *members {
	old, ok := e.next.members.get(key)
	if ok && old.owner == e.b {
		return old
	}
	m := &members{owner: e.b}
	if ok {
		m.byUID = old.byUID
	}
	e.next.members = e.next.members.set(e.b, key, m)
	return m
}

func (e *edit) putService(svc *Service) error {
	n := e.next
	old, _ := n.services.get(svc.ServiceKey)
	if err := e.fits(svc, old); err != nil {
		return err
	}
	e.removeWorkload(svc.String())
	n.services = n.services.set(e.b, svc.ServiceKey, svc)
	n.byHost = replaced(e.b, n.byHost, svc.Hostname, old, svc)
	if old != nil {
		for _, vip := range old.VIPs {
			if !slices.Contains(svc.VIPs, vip) {
				n.byVIP = dropped(e.b, n.byVIP, keyOf(vip.Network, vip.Addr), old)
			}
		}
		for _, c := range old.CIDRs {
			if !slices.Contains(svc.CIDRs, c) {
				e.setCIDR(c, func(list []*Service) []*Service { return without(list, old) })
			}
		}
	}
	for _, vip := range svc.VIPs {
		n.byVIP = replaced(e.b, n.byVIP, keyOf(vip.Network, vip.Addr), old, svc)
	}
	for _, c := range svc.CIDRs {
		e.setCIDR(c, func(list []*Service) []*Service { return swap(list, old, svc) })
	}
	return nil
}

// fits tells whether there is room in every list that svc takes a new place in.
func (e *edit) fits(svc, old *Service) error {
	full := func(list []*Service) bool { return len(list) >= maxShared && !slices.Contains(list, old) }
	if list, _ := e.next.byHost.get(svc.Hostname); full(list) {
		return errShared
	}
	for _, vip := range svc.VIPs {
		if list, _ := e.next.byVIP.get(keyOf(vip.Network, vip.Addr)); full(list) {
			return errShared
		}
	}
	for _, c := range svc.CIDRs {
		if table, _ := e.next.byCIDR.get(c.Network); table != nil {
			if list, _ := table.Get(c.Prefix); full(list) {
				return errShared
			}
		}
	}
	return nil
}

// removeService drops the definition; the workloads that name it stay members,
// so a service that comes back finds its endpoints.
func (e *edit) removeService(key ServiceKey) {
	n := e.next
	old, ok := n.services.get(key)
	if !ok {
		return
	}
	n.services = n.services.remove(e.b, key)
	n.byHost = dropped(e.b, n.byHost, old.Hostname, old)
	for _, vip := range old.VIPs {
		n.byVIP = dropped(e.b, n.byVIP, keyOf(vip.Network, vip.Addr), old)
	}
	for _, c := range old.CIDRs {
		e.setCIDR(c, func(list []*Service) []*Service { return without(list, old) })
	}
}

func (e *edit) setCIDR(c CIDR, change func([]*Service) []*Service) {
	table, _ := e.next.byCIDR.get(c.Network)
	if table == nil {
		table = new(cidrTable)
	}
	table = table.ModifyPersist(c.Prefix, func(list []*Service, _ bool) ([]*Service, bool) {
		list = change(list)
		return list, len(list) == 0
	})
	if table.Size() == 0 {
		e.next.byCIDR = e.next.byCIDR.remove(e.b, c.Network)
		return
	}
	e.next.byCIDR = e.next.byCIDR.set(e.b, c.Network, table)
}

// putPolicy replaces a policy, or notes one that cannot be used, if nothing
// better is known.
func (e *edit) putPolicy(p *policyEntry) {
	n := e.next
	if old, ok := n.policies.get(p.key); ok {
		if p.policy == nil && old.policy != nil {
			return
		}
		e.removePolicy(p.key)
	}
	n.policies = n.policies.set(e.b, p.key, p)
	if p.scoped {
		n.scoped = pushed(e.b, n.scoped, p.home, p)
	}
}

func (e *edit) removePolicy(key string) {
	n := e.next
	old, ok := n.policies.get(key)
	if !ok {
		return
	}
	n.policies = n.policies.remove(e.b, key)
	if old.scoped {
		n.scoped = dropped(e.b, n.scoped, old.home, old)
	}
}

// pushed appends to a list of the map. Older snapshots share the array and not
// the length, so only the newest list of a key may be appended to: edits form
// a single line, and dropped makes a new array.
func pushed[K comparable, T any](b *batch, m pmap[K, []T], k K, v T) pmap[K, []T] {
	list, _ := m.get(k)
	return m.set(b, k, append(list, v))
}

// replaced puts v in the place of old, or at the end when old is not there: a
// service that is sent again keeps its place among its equals.
func replaced[K, T comparable](b *batch, m pmap[K, []T], k K, old, v T) pmap[K, []T] {
	list, _ := m.get(k)
	return m.set(b, k, swap(list, old, v))
}

func swap[T comparable](list []T, old, v T) []T {
	i := slices.Index(list, old)
	if i < 0 {
		return append(list, v)
	}
	list = slices.Clone(list)
	list[i] = v
	return list
}

// dropped takes a value out of a list of the map.
func dropped[K, T comparable](b *batch, m pmap[K, []T], k K, v T) pmap[K, []T] {
	list, ok := m.get(k)
	if !ok {
		return m
	}
	if list = without(list, v); len(list) == 0 {
		return m.remove(b, k)
	}
	return m.set(b, k, list)
}

// without returns a new list that lacks v, with no spare capacity to share.
func without[T comparable](list []T, v T) []T {
	out := make([]T, 0, max(len(list)-1, 0))
	for _, x := range list {
		if x != v {
			out = append(out, x)
		}
	}
	return slices.Clip(out)
}
