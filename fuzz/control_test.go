package fuzz

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/mesh"
	"github.com/ztun/ztun/xds/workloadapi"
)

// Limits of FuzzControlPlane, small enough to be met.
const (
	limitResources = 12
	limitBytes     = 600
	limitTotal     = 900
)

// FuzzControlPlane answers the client with hostile bytes. Each resource is
// taken whole or not at all, the NACK names what was not, bytes that are no
// answer end the stream and change nothing, and good answers are applied
// afterwards.
func FuzzControlPlane(f *testing.F) {
	planeCertificate()
	for i := range 4 {
		f.Add(byte(i), noise(uint64(i), 300), []byte{byte(i), 3, 1, 90, 4, 7, 250, 2})
	}
	for i, b := range hostileAnswers() {
		f.Add(byte(i), b, []byte{byte(i), 4, 200, 7})
	}
	f.Fuzz(func(t *testing.T, mode byte, answer, in []byte) {
		synctest.Test(t, func(t *testing.T) {
			h := newHostile(t, in)
			defer h.plane.stop()
			raw := newScript(answer)
			h.send(h.envelope(raw, mode&1 != 0))
			for h.script.more() && len(h.script.b) > 4 {
				h.send(h.envelope(&script{h.script.bytes(1 + h.script.pick(200))}, h.script.one(2)))
			}
			h.good()
		})
	})
}

// hostileAnswers are whole answers to begin with.
func hostileAnswers() (out [][]byte) {
	s := newScript(noise(99, 900))
	for kind := range types {
		r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: types[kind], Nonce: "n", RemovedResources: []string{"ns1/p", uids[0]}}
		for range 4 {
			name, body := s.resource(kind)
			r.Resources = append(r.Resources, resource(name, "1", body))
		}
		b, _ := proto.Marshal(r)
		out = append(out, b, b[:len(b)-7])
	}
	return out
}

// A hostile is a control plane that says anything.
type hostile struct {
	history
	size  [2]map[string]int  // of what is held
	noted [2]map[string]bool // what was refused with no older version held
}

func newHostile(t *testing.T, in []byte) *hostile {
	h := &hostile{history: history{T: t, script: newScript(in), model: newModel(localNode)}}
	for kind := range types {
		h.held[kind], h.size[kind], h.noted[kind] = map[string]string{}, map[string]int{}, map[string]bool{}
	}
	h.plane = newPlane(t, mesh.Config{LocalNode: localNode, Rand: h.drawn.rand}, xds.Limits{Resources: limitResources, ResourceBytes: limitBytes, TotalBytes: limitTotal})
	h.st, _ = h.plane.accept()
	return h
}

// envelope makes an answer: of the bytes as they are, or with the parts that
// hold them in order, so that more than the envelope is tried.
func (h *hostile) envelope(s *script, raw bool) []byte {
	if raw {
		return s.bytes(maxScript)
	}
	kind := s.pick(2)
	r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: types[kind], Nonce: string(s.bytes(s.pick(4)))}
	for range s.pick(6) {
		name, body := s.resource(kind)
		switch s.pick(8) {
		case 0:
			name = strings.Repeat("n", 1+s.pick(256)*20)
		case 1:
			body = append(body, make([]byte, s.pick(3)*limitBytes/2)...)
		case 2:
			body = s.bytes(s.pick(64))
		case 3:
			name = strings.ToValidUTF8(string(s.bytes(12)), "?")
		}
		res := resource(name, fmt.Sprint(s.pick(3)), body)
		switch s.pick(16) {
		case 0:
			res.Resource = nil
		case 1:
			res.Version = strings.Repeat("v", 8*s.pick(256))
		}
		r.Resources = append(r.Resources, res)
	}
	for range s.pick(3) {
		r.RemovedResources = append(r.RemovedResources, s.name(kind))
	}
	b, err := proto.Marshal(r)
	if err != nil {
		return nil
	}
	return b
}

// send sends bytes as an answer and holds the reply against the model. What is
// no message ends the stream.
func (h *hostile) send(b []byte) {
	h.Helper()
	var r discoveryv3.DeltaDiscoveryResponse
	bad := proto.Unmarshal(b, &r)
	if err := h.st.s.SendMsg(b); err != nil {
		h.Fatal(err)
	}
	reply, err := h.st.s.Recv()
	if bad != nil {
		if err == nil {
			h.Fatalf("an answer that is no message had the reply %v", reply)
		}
		h.st.end <- nil
		h.resume()
		return
	}
	if err != nil {
		h.Fatalf("no reply to %v: %v", &r, err)
	}
	if reply.GetTypeUrl() != r.GetTypeUrl() || reply.GetResponseNonce() != r.GetNonce() {
		h.Fatalf("reply to %q/%q is for %q/%q", r.GetTypeUrl(), r.GetNonce(), reply.GetTypeUrl(), reply.GetResponseNonce())
	}
	kind := slices.Index(types[:], r.GetTypeUrl())
	if kind < 0 {
		if reply.GetErrorDetail() != nil {
			h.Fatalf("NACK of type %q: %v", r.GetTypeUrl(), reply.GetErrorDetail())
		}
		return
	}
	h.apply(kind, &r, reply)
}

// apply applies a well-formed answer to the model.
func (h *hostile) apply(kind int, r *discoveryv3.DeltaDiscoveryResponse, reply *discoveryv3.DeltaDiscoveryRequest) {
	h.Helper()
	rejected := make(map[string]bool)
	good := make(map[string]bool)
	unusable := make(map[string]bool)
	total, fresh := h.total(kind), make(map[string]bool)
	var admitted []*discoveryv3.Resource
	for _, res := range r.GetResources() {
		name, size := res.GetName(), len(res.GetResource().GetValue())
		_, held := h.held[kind][name]
		isNew := !held && !h.noted[kind][name]
		grown := total + size - h.size[kind][name]
		switch {
		case res.GetResource() == nil, len(name) > 4<<10, len(res.GetVersion()) > 1<<10, size > limitBytes, grown > limitTotal,
			isNew && !fresh[name] && len(h.held[kind])+len(h.noted[kind])+len(fresh) >= limitResources:
			rejected[name] = true
			continue
		}
		total = grown
		admitted = append(admitted, res)
		if isNew {
			fresh[name] = true
		}
		if h.model.put(kind, name, res.GetResource().GetValue()) {
			good[name] = true
		} else {
			rejected[name], unusable[name] = true, true
		}
	}
	h.settle(kind, admitted, good, unusable)
	for _, name := range r.GetRemovedResources() {
		h.model.remove(kind, name)
		delete(h.held[kind], name)
		delete(h.size[kind], name)
		delete(h.noted[kind], name)
	}
	h.warm[kind] = h.warm[kind] || len(rejected) == 0
	h.checkNames(reply, rejected)
}

// settle notes what the client must hold now. Of a resource that came usable
// and unusable in one answer it may hold either version, so it is sent again.
func (h *hostile) settle(kind int, admitted []*discoveryv3.Resource, good, unusable map[string]bool) {
	for _, res := range admitted {
		name := res.GetName()
		switch _, held := h.held[kind][name]; {
		case unusable[name] && !held:
			h.noted[kind][name] = true
		case good[name] && !unusable[name]:
			h.held[kind][name], h.size[kind][name] = res.GetVersion(), len(res.GetResource().GetValue())
			delete(h.noted[kind], name)
		}
	}
}

func (h *hostile) total(kind int) (n int) {
	for _, size := range h.size[kind] {
		n += size
	}
	return n
}

// checkNames wants every rejected resource named, by the beginning of its name
// at least. What one answer holds here never fills a NACK.
func (h *hostile) checkNames(reply *discoveryv3.DeltaDiscoveryRequest, rejected map[string]bool) {
	h.Helper()
	detail := reply.GetErrorDetail()
	if (detail != nil) != (len(rejected) > 0) {
		h.Fatalf("NACK %v, want one of %q", detail, slices.Sorted(maps.Keys(rejected)))
	}
	for name := range rejected {
		if !strings.Contains(detail.GetMessage(), fmt.Sprintf("%.256s: ", name)) {
			h.Fatalf("NACK %q does not name %q", detail.GetMessage(), name)
		}
	}
}

// resume takes the next stream: nothing was lost or gained with the last one.
// The control plane says at once that it has what the client tells of, and
// nothing else.
func (h *hostile) resume() {
	h.Helper()
	var first [2]*discoveryv3.DeltaDiscoveryRequest
	h.st, first = h.plane.accept()
	for kind := range types {
		told := first[kind].GetInitialResourceVersions()
		h.checkVersions(kind, told)
		reply := h.st.answer(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: types[kind], Nonce: "again"})
		if reply.GetErrorDetail() != nil {
			h.Fatalf("NACK of nothing: %v", reply.GetErrorDetail())
		}
		for name := range h.model.names(kind) {
			if _, ok := told[name]; !ok {
				h.model.remove(kind, name)
			}
		}
		clear(h.noted[kind])
		h.warm[kind] = true
	}
}

// good makes room and sends what every client must take.
func (h *hostile) good() {
	h.Helper()
	h.compare()
	for kind := range types {
		names := slices.Sorted(maps.Keys(h.model.names(kind)))
		names = append(names, slices.Sorted(maps.Keys(h.noted[kind]))...)
		h.send(encoded(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: types[kind], Nonce: "clear", RemovedResources: names}))
	}
	w := &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: &workloadapi.Workload{Uid: uids[0], Addresses: [][]byte{{10, 0, 0, 1}}}}}
	h.send(encoded(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: types[addresses], Nonce: "good", Resources: []*discoveryv3.Resource{resource(uids[0], "good", encoded(w))}}))
	if got := h.plane.store.Snapshot().WorkloadByIP("", ips[0]); got == nil || got.UID != uids[0] {
		h.Fatalf("after a good answer 10.0.0.1 is %v", got)
	}
	h.compare()
}

func encoded(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}
