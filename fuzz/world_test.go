package fuzz

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/mesh"
)

const localNode = "n1"

// FuzzWorld tells the client a history, over streams that break, and wants the
// store at its end to answer as the model does, and as a store that was told
// the end only.
func FuzzWorld(f *testing.F) {
	planeCertificate()
	for i := range 6 {
		f.Add(noise(uint64(i), 60*(i+1)))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		synctest.Test(t, func(t *testing.T) {
			h := newHistory(t, in)
			defer h.plane.stop()
			for h.script.more() {
				h.step()
			}
			h.compare()
		})
	})
}

// A history is what a control plane tells one client.
type history struct {
	*testing.T
	script *script
	plane  *plane
	st     *stream
	drawn  draws
	model  *model
	truth  [2]map[string]version // what the control plane has, by type
	held   [2]map[string]string  // versions that the client must have accepted; anyVersion: it may tell any
	warm   [2]bool               // an answer without a rejection came
	nonce  int
}

type version struct {
	version string
	body    []byte
}

// anyVersion is held when one answer had a usable and an unusable version of
// one resource.
const anyVersion = "any"

// draws counts what chance may choose from; it is a mesh.Config's Rand.
type draws struct{ next, of uint64 }

func (d *draws) rand(n uint64) uint64 {
	d.of = n
	return d.next % n
}

func newHistory(t *testing.T, in []byte) *history {
	h := &history{T: t, script: newScript(in), model: newModel(localNode)}
	for kind := range types {
		h.truth[kind], h.held[kind] = map[string]version{}, map[string]string{}
	}
	h.plane = newPlane(t, mesh.Config{LocalNode: localNode, Rand: h.drawn.rand}, xds.Limits{})
	h.connect()
	return h
}

func (h *history) step() {
	kind := h.script.pick(2)
	switch h.script.pick(8) {
	case 0:
		h.reconnect()
	case 1:
		h.answer(2, "type.googleapis.com/other", nil, nil)
	default:
		added, removed := h.change(kind)
		h.answer(kind, types[kind], added, removed)
	}
}

// change makes up to four changes of the truth, and tells what a response says
// of them.
func (h *history) change(kind int) (added []*discoveryv3.Resource, removed []string) {
	for range 1 + h.script.pick(4) {
		if h.script.pick(4) == 0 {
			name := h.script.name(kind)
			delete(h.truth[kind], name)
			removed = append(removed, name)
			continue
		}
		name, body := h.script.resource(kind)
		h.nonce++
		v := version{fmt.Sprint(h.nonce), body}
		added = append(added, resource(name, v.version, body))
		if !slices.Contains(removed, name) {
			h.truth[kind][name] = v
		}
	}
	return added, removed
}

// answer sends a response, applies it to the model, and checks the reply.
func (h *history) answer(kind int, typeURL string, added []*discoveryv3.Resource, removed []string) {
	h.Helper()
	h.nonce++
	reply := h.st.answer(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: fmt.Sprint(h.nonce), Resources: added, RemovedResources: removed})
	bad := make(map[string]bool)
	good := make(map[string]bool)
	for _, r := range added {
		if h.model.put(kind, r.GetName(), r.GetResource().GetValue()) {
			good[r.GetName()] = true
			h.held[kind][r.GetName()] = r.GetVersion()
		} else {
			bad[r.GetName()] = true
		}
	}
	for name := range bad {
		if good[name] {
			h.held[kind][name] = anyVersion
		}
	}
	for _, name := range removed {
		h.model.remove(kind, name)
		delete(h.held[kind], name)
	}
	h.checkReply(reply, bad)
	if kind < len(types) && len(bad) == 0 {
		h.warm[kind] = true
	}
}

// checkReply wants a NACK that names what is bad, and an ACK if nothing is.
func (h *history) checkReply(reply *discoveryv3.DeltaDiscoveryRequest, bad map[string]bool) {
	h.Helper()
	detail := reply.GetErrorDetail()
	if (detail != nil) != (len(bad) > 0) {
		h.Fatalf("NACK %q, want one of %v", detail.GetMessage(), slices.Collect(maps.Keys(bad)))
	}
	for name := range bad {
		if !strings.Contains(detail.GetMessage(), name+": ") {
			h.Fatalf("NACK %q does not name %q", detail.GetMessage(), name)
		}
	}
}

// reconnect ends the stream, changes the truth meanwhile, and tells the client
// what it lacks, as istiod does.
func (h *history) reconnect() {
	h.st.end <- choose(h.script, nil, status.Error(codes.Unavailable, "transport is closing"), status.Error(codes.Internal, "no"))
	for kind := range types {
		if h.script.one(2) {
			h.change(kind)
		}
	}
	h.connect()
}

func (h *history) connect() {
	h.Helper()
	var first [2]*discoveryv3.DeltaDiscoveryRequest
	h.st, first = h.plane.accept()
	for kind := range types {
		told := first[kind].GetInitialResourceVersions()
		h.checkVersions(kind, told)
		var added []*discoveryv3.Resource
		for _, name := range slices.Sorted(maps.Keys(h.truth[kind])) {
			if v := h.truth[kind][name]; told[name] != v.version {
				added = append(added, resource(name, v.version, v.body))
			}
		}
		var removed []string
		for name := range told {
			if _, ok := h.truth[kind][name]; !ok {
				removed = append(removed, name)
			}
		}
		// What the client does not tell of and is not sent again is gone.
		for name := range h.model.names(kind) {
			if _, ok := h.truth[kind][name]; !ok {
				h.model.remove(kind, name)
				delete(h.held[kind], name)
			}
		}
		h.answer(kind, types[kind], added, removed)
	}
}

// checkVersions: "for each type, every known resource name and the version last
// received; rejected resources are left out" (facts/ztunnel.md 2.4).
func (h *history) checkVersions(kind int, told map[string]string) {
	h.Helper()
	want := maps.Clone(h.held[kind])
	for name, v := range want {
		if got, ok := told[name]; v == anyVersion {
			if delete(want, name); ok {
				want[name] = got
			}
		}
	}
	if diff := cmp.Diff(want, maps.Collect(maps.All(told)), equateEmpty); diff != "" {
		h.Fatalf("versions at reconnect: -want +got\n%s", diff)
	}
}

var equateEmpty = cmp.Transformer("empty", func(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
})

// names are those of a type that the model knows of.
func (m *model) names(kind int) map[string]bool {
	out := make(map[string]bool)
	if kind == policies {
		for name := range m.policies {
			out[name] = true
		}
		return out
	}
	for name := range m.workloads {
		out[name] = true
	}
	for name := range m.services {
		out[name] = true
	}
	return out
}

// fresh is a store that is told the end of the history, in the order that
// decides among equals.
func (h *history) fresh() *mesh.Store {
	store := mesh.NewStore(mesh.Config{LocalNode: localNode, Rand: h.drawn.rand})
	var list []xds.Resource
	for _, name := range slices.SortedFunc(maps.Keys(h.model.workloads), func(a, b string) int { return h.model.workloads[a].put - h.model.workloads[b].put }) {
		list = append(list, xds.Resource{Name: name, Body: h.model.workloads[name].body})
	}
	for _, name := range slices.SortedFunc(maps.Keys(h.model.services), func(a, b string) int { return h.model.services[a].first[""] - h.model.services[b].first[""] }) {
		list = append(list, xds.Resource{Name: name, Body: h.model.services[name].body})
	}
	if bad := store.Addresses().Apply(list, nil); len(bad) > 0 {
		h.Fatalf("a fresh store rejects %v", bad)
	}
	list = nil
	for name, p := range h.model.policies {
		list = append(list, xds.Resource{Name: name, Body: p.body})
	}
	store.Authorizations().Apply(list, nil)
	return store
}

// compare asks all three of them everything.
func (h *history) compare() {
	h.Helper()
	synctest.Wait()
	h.compareReady()
	got, fresh := h.plane.store.Snapshot(), h.fresh().Snapshot()
	ask := func(what string, model any, store func(s *mesh.Snapshot) any) {
		h.Helper()
		told := store(got)
		if !reflect.DeepEqual(model, told) {
			h.Errorf("%s: -model +store\n%s", what, cmp.Diff(model, told))
		}
		if again := store(fresh); !reflect.DeepEqual(again, told) && !h.model.tie {
			h.Errorf("%s: -fresh store +store\n%s", what, cmp.Diff(again, told))
		}
		h.model.tie = false
	}
	h.compareNames(ask)
	h.compareAddresses(ask)
	h.comparePolicies(ask)
	if h.Failed() {
		h.FailNow()
	}
}

// compareReady: ready is once every type has had an answer without a rejection.
func (h *history) compareReady() {
	ready := false
	select {
	case <-h.plane.client.Ready():
		ready = true
	default:
	}
	if ready != (h.warm[addresses] && h.warm[policies]) {
		h.Errorf("ready %v, want that of %v", ready, h.warm)
	}
}

type asker func(what string, model any, store func(s *mesh.Snapshot) any)

func (h *history) compareNames(ask asker) {
	for _, uid := range append(slices.Collect(maps.Keys(h.model.workloads)), uids...) {
		_, known := h.model.workloads[uid]
		ask("workload "+uid, known, func(s *mesh.Snapshot) any { return s.Workload(uid) != nil })
	}
	for _, name := range serviceNames {
		namespace, host, _ := strings.Cut(name, "/")
		svc := h.model.services[name]
		ask("service "+name, svc != nil, func(s *mesh.Snapshot) any { return s.Service(namespace, host) != nil })
		if svc == nil {
			continue
		}
		var want []string
		for _, w := range h.model.endpoints(svc) {
			want = append(want, w.GetUid())
		}
		ask("endpoints of "+name, sorted(want), func(s *mesh.Snapshot) any { return uidsOf(s.Endpoints(s.Service(namespace, host))) })
	}
	for _, host := range hosts {
		for _, client := range namespaces {
			ask("host "+host+" from "+client, nameOf(h.model.serviceByHostname(host, client)), func(s *mesh.Snapshot) any { return keyOf(s.ServiceByHostname(host, client, "")) })
		}
	}
	ask("identities", h.model.localIdentities(), func(s *mesh.Snapshot) any {
		var out []string
		for _, id := range s.LocalIdentities() {
			out = append(out, id.String())
		}
		return sorted(out)
	})
	for _, w := range h.model.workloads {
		name, namespace, account := w.GetName(), w.GetNamespace(), accountOf(w.Workload)
		ask("local "+name, uidOf(h.model.local(name, namespace, account)), func(s *mesh.Snapshot) any {
			if w := s.Local(name, namespace, account); w != nil {
				return w.UID
			}
			return ""
		})
	}
}

func (h *history) compareAddresses(ask asker) {
	for _, network := range networks {
		for _, ip := range ips {
			ask(fmt.Sprintf("workload at %s/%v", network, ip), uidOf(h.model.workloadByIP(network, ip)), func(s *mesh.Snapshot) any {
				if w := s.WorkloadByIP(network, ip); w != nil {
					return w.UID
				}
				return ""
			})
			for _, client := range namespaces {
				ask(fmt.Sprintf("service at %s/%v from %s", network, ip, client), nameOf(h.model.serviceByVIP(network, ip, client)), func(s *mesh.Snapshot) any {
					return keyOf(s.ServiceByVIP(network, ip, client))
				})
			}
		}
	}
	for uid, src := range h.model.workloads {
		for _, ip := range ips {
			for _, port := range []uint16{80, 81} {
				dst := netip.AddrPortFrom(ip, port)
				ask(fmt.Sprintf("route from %s to %v", uid, dst), h.model.resolve(src, dst), func(s *mesh.Snapshot) any { return h.routes(s, s.Workload(uid), dst) })
			}
		}
	}
}

// routes are all the answers of Resolve, each as often as chance would give it.
func (h *history) routes(s *mesh.Snapshot, src *mesh.Workload, dst netip.AddrPort) answers {
	out := make(answers)
	h.drawn = draws{of: 1}
	for ; h.drawn.next < min(h.drawn.of, 64); h.drawn.next++ {
		r, err := s.Resolve(src, dst)
		out[routeText(r, err)]++
	}
	return out
}

func routeText(r mesh.Route, err error) string {
	for _, known := range []error{mesh.ErrNoHealthyUpstream, mesh.ErrNoPort, mesh.ErrNoDestination, mesh.ErrNoIdentity, mesh.ErrUnsupported} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	switch {
	case err != nil:
		return err.Error()
	case r.Kind == mesh.Passthrough:
		return "PASSTHROUGH " + r.Dial.String()
	case r.Kind == mesh.TCP:
		return fmt.Sprintf("TCP %v to %s", r.Dial, r.Peer.UID)
	}
	var ids []string
	for _, id := range r.Identities {
		ids = append(ids, id.String())
	}
	return fmt.Sprintf("HBONE %v:%d authority %s to %s as %v", r.Dial.Addr(), r.Dial.Port(), r.Authority, r.Peer.UID, sorted(ids))
}

func (h *history) comparePolicies(ask asker) {
	for uid, w := range h.model.workloads {
		apply, missing := h.model.policiesOf(w)
		ask("policies of "+uid, [2][]string{apply, missing}, func(s *mesh.Snapshot) any {
			list, missing := s.Policies(s.Workload(uid))
			var apply []string
			for _, p := range list {
				apply = append(apply, p.Key)
			}
			return [2][]string{sorted(apply), sorted(missing)}
		})
		for _, in := range connections {
			ask(fmt.Sprintf("%v to %s", in, uid), h.model.allows(w, in), func(s *mesh.Snapshot) any {
				list, missing := s.Policies(s.Workload(uid))
				id, _ := identity.Parse(in.peer)
				return authz.Check(authz.Input{Src: in.src, Dst: in.dst, Peer: id}, list, missing).Allowed
			})
		}
	}
}

func uidOf(w *worker) string {
	if w == nil {
		return ""
	}
	return w.GetUid()
}

func nameOf(s *served) string {
	if s == nil {
		return ""
	}
	return serviceName(s.Service)
}

func keyOf(s *mesh.Service) string {
	if s == nil {
		return ""
	}
	return s.String()
}

func uidsOf(list []*mesh.Workload) (out []string) {
	for _, w := range list {
		out = append(out, w.UID)
	}
	return sorted(out)
}
