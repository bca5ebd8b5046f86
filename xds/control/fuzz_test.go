package control

import (
	"bytes"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

// Whatever a file holds, it is used or its problems are named; reading it twice
// gives the same; and what is used can be served.
func FuzzLoader(f *testing.F) {
	for _, seed := range []string{
		meshYAML["mesh.yaml"], dbYAML, webPod, policy("rules: [{from: [{source: {principals: ['*']}}]}]"),
		peerAuth("x", "w", web+strict+", "+ports("9090: {mode: PERMISSIVE}")),
		serviceHead + "  selector: {a: b}\n  ipFamilyPolicy: RequireDualStack",
		"apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Node, metadata: {name: n}}, null, 1]",
		"a: &a [*a]", "{<<: {a: 1}, <<: [{b: 2}]}", "? [a]\n: b", "- !!binary x", "a: .nan\nb: .inf", "\xff\xfe", "%YAML 1.1\n---\nx", "x: !!int y",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a, creationTimestamp: !!timestamp 2001-01-01}\nspec: {containers: [{resources: {limits: {cpu: .inf}}}]}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			return
		}
		read := func() (*World, Report) {
			ps := &problems{}
			return interpret(Config{}.withDefaults(), map[string][]byte{"f.yaml": data}, ps, newAddressBook(nil))
		}
		w, r := read()
		if r.Used != (r.Err() == nil) || r.Used != (w != nil) {
			t.Fatalf("used %v, world %v, error %v", r.Used, w != nil, r.Err())
		}
		lines := bytes.Count(data, []byte("\n")) + bytes.Count(data, []byte("\r")) + bytes.Count(data, []byte("\u2028")) + bytes.Count(data, []byte("\u2029")) + bytes.Count(data, []byte("\u0085")) + 2
		for _, p := range r.Problems {
			if p.Line < 0 || p.Line > lines || p.Text == "" {
				t.Errorf("problem %+v", p)
			}
		}
		if w == nil {
			return
		}
		again, _ := read()
		sub := first(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress}, "n")
		sub.next(w, true)
		if resp := sub.next(again, true); resp != nil {
			t.Errorf("read twice, it differs: %v", resp)
		}
		for typeURL, m := range map[string]proto.Message{typeAddress: &workloadapi.Address{}, typeAuthorization: &securityapi.Authorization{}} {
			for name, r := range w.resources[typeURL] {
				if err := proto.Unmarshal(r.body.Value, m); err != nil || !strings.Contains(name, "/") {
					t.Errorf("resource %q: %v", name, err)
				}
			}
		}
	})
}

// No value of a policy's field gives a match that is wider than it says: an
// entry that cannot be converted is a problem, never dropped.
func FuzzPolicyValues(f *testing.F) {
	for _, seed := range []string{"*", "*x", "x*", "a*b", "", "10.0.0.1", "10.0.0.0/8", "::1/200", "80", "-1", "ns/sa", "a/b/c", "spiffe://x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, v string) {
		p := &authorizationPolicy{}
		ps := &problems{}
		docs := parseFile("f.yaml", []byte("a: 1"), ps)
		p.document, p.ns = docs[0], "x"
		c := ruleConverter{policy: p}
		for name, convert := range map[string]func() int{
			"strings":    func() int { return len(c.strings(nil, []string{v})) },
			"principals": func() int { return len(c.principals(nil, []string{v})) },
			"accounts":   func() int { return len(c.accounts(nil, []string{v})) },
			"blocks":     func() int { return len(c.blocks(nil, []string{v})) },
			"ports":      func() int { return len(c.ports(nil, []string{v})) },
		} {
			ps.list = nil
			if n := convert(); n == 0 && !ps.fatal() {
				t.Errorf("%s: %q is dropped in silence", name, v)
			}
		}
	})
}

// Selectors against a twin that asks the other way round.
func FuzzSelector(f *testing.F) {
	f.Add("a=b,c=d", "a=b")
	f.Add("", "a=b")
	f.Add("a=", "a")
	parse := func(s string) map[string]string {
		m := make(map[string]string)
		for part := range strings.SplitSeq(s, ",") {
			if k, v, ok := strings.Cut(part, "="); ok {
				m[k] = v
			}
		}
		return m
	}
	f.Fuzz(func(t *testing.T, labels, selector string) {
		l, s := parse(labels), parse(selector)
		missing := 0
		for k, v := range s {
			found := false
			for lk, lv := range l {
				found = found || (lk == k && lv == v)
			}
			if !found {
				missing++
			}
		}
		if got := matches(s, l); got != (missing == 0) {
			t.Errorf("matches(%v, %v) = %v", s, l, got)
		}
	})
}

// Requests in any order leave a subscription that converges: what the client
// has been told is what it wants.
func FuzzSubscription(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7})
	f.Add([]byte{9, 8, 200, 17, 3, 3, 60, 61})
	w1, r1 := Check(Config{Static: NewStatic(meshYAML)})
	w2, r2 := Check(Config{Static: NewStatic(with(map[string]string{"db.yaml": dbYAML}))})
	if r1.Err() != nil || r2.Err() != nil {
		f.Fatal(r1.Err(), r2.Err())
	}
	names := []string{"*", webUID, clientUID, dbUID, webKey, "/10.0.0.2", "/10.96.0.1", "nobody"}
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) == 0 {
			return
		}
		request := func(op byte) *discovery.DeltaDiscoveryRequest {
			req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress}
			name := names[op%8]
			switch op / 8 % 4 {
			case 0:
				req.ResourceNamesSubscribe = []string{name}
			case 1:
				req.ResourceNamesUnsubscribe = []string{name}
			case 2:
				req.InitialResourceVersions = map[string]string{name: "v"}
			}
			return req
		}
		sub := first(request(ops[0]), "n1")
		client := make(map[string]string) // what a client would have
		for k, v := range sub.known {
			client[k] = v
		}
		worlds := []*World{w1, w2}
		for i, op := range ops {
			w := worlds[(int(op)>>6)%2]
			if i > 0 {
				sub.change(request(op))
			}
			for _, removals := range []bool{op&32 == 0, true} {
				resp := sub.next(w, removals)
				for _, r := range resp.GetResources() {
					client[r.Name] = r.Version
				}
				for _, name := range resp.GetRemovedResources() {
					delete(client, name)
				}
			}
			for name := range sub.wanted(w) {
				if want := w.resources[typeAddress][name].version; client[name] != want {
					t.Fatalf("after %d: the client has %q of %s, not %q", i, client[name], name, want)
				}
			}
			wanted := sub.wanted(w)
			for name := range client {
				if !wanted[name] {
					t.Fatalf("after %d: the client still has %s", i, name)
				}
			}
		}
	})
}

func FuzzCSR(f *testing.F) {
	f.Add(newCSR(f))
	f.Add("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
	f.Fuzz(func(t *testing.T, text string) {
		if csr, err := parseCSR(text); err == nil && csr.CheckSignature() != nil {
			t.Error("taken without a signature")
		}
	})
}
