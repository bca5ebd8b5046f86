package control

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/authz"
	"github.com/ztun/ztun/xds/mesh"
)

// told is the mesh as a proxy on node n1 knows it after being told of w.
func told(t *testing.T, w *World) *mesh.Snapshot {
	t.Helper()
	store := mesh.NewStore(mesh.Config{LocalNode: "n1"})
	for typeURL, handler := range map[string]xds.Handler{typeAddress: store.Addresses(), typeAuthorization: store.Authorizations()} {
		var all []xds.Resource
		for _, name := range w.names[typeURL] {
			r := w.resources[typeURL][name]
			all = append(all, xds.Resource{Name: r.name, Version: r.version, Body: r.body.Value})
		}
		if rejected := handler.Apply(all, nil); len(rejected) > 0 {
			t.Fatalf("rejected: %v", rejected)
		}
	}
	return store.Snapshot()
}

func TestOwnClientIsServed(t *testing.T) {
	s := serve(t, Config{})
	store := mesh.NewStore(mesh.Config{LocalNode: "n2"})
	client, err := xds.New(xds.Config{
		Address: s.addr, RootCA: string(s.RootPEM()), Token: xds.StaticToken(s.token("n2")),
		Node: xds.Node{PodName: "z", Namespace: "istio-system", IP: "10.0.0.9", NodeName: "n2"},
		Subscriptions: []xds.Subscription{
			{Type: xds.AddressType, Handler: store.Addresses()},
			{Type: xds.AuthorizationType, Handler: store.Authorizations()},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); _ = client.Run(ctx) }()
	select {
	case <-client.Ready():
	case <-ctx.Done():
		t.Fatal("never ready")
	}
	src, err := store.WaitLocal(ctx, "client", "x", "client")
	if err != nil {
		t.Fatal(err)
	}
	route, err := store.Snapshot().Resolve(src, netip.MustParseAddrPort("10.96.0.1:80"))
	if err != nil || route.Kind != mesh.HBONE || route.Target != netip.MustParseAddrPort("10.0.0.1:80") || route.Peer.Identity.String() != webID {
		t.Errorf("route %+v, %v", route, err)
	}
	apply, missing := store.Snapshot().Policies(route.Peer)
	if v := authz.Check(authz.Input{Dst: route.Target, Peer: src.Identity}, apply, missing); v.Allowed || len(missing) > 0 {
		t.Errorf("a policy that allows nothing: %v, missing %q", v, missing)
	}
	s.set(with(map[string]string{"db.yaml": dbYAML}))
	eventually(t, "the new pod is known", func() bool { return store.Snapshot().Workload(dbUID) != nil })
	if st := s.Status(); len(st.Clients) != 1 || st.Clients[0].Nacked["Address"] != 0 {
		t.Errorf("clients %+v", st.Clients)
	}
	cancel()
	<-done
}

func TestOwnCertificateClientIsServed(t *testing.T) {
	s := serve(t, Config{})
	ca, err := certs.NewIstioCA(certs.IstioCAConfig{Address: s.addr, RootCA: string(s.RootPEM()), Token: certs.StaticToken(s.token("n1")), Impersonate: true})
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	id := identity.MustParse(webID)
	key, csr, err := certs.NewRequest(id)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	chain, err := ca.Sign(ctx, id, csr, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := certs.New(id, key, chain, time.Now()); err != nil {
		t.Error(err)
	}
	if _, err := ca.Sign(ctx, identity.MustParse("spiffe://cluster.local/ns/x/sa/client"), csr, time.Hour); err == nil {
		t.Error("an identity of another node")
	}
}

// What a proxy decides about plaintext is what the modes say, for every
// combination of modes at every level, and for ports named and not.
func TestPlaintextIsRefusedWhereModesSaySo(t *testing.T) {
	modes := []string{"", "UNSET", "DISABLE", "PERMISSIVE", "STRICT"}
	peer := identity.MustParse("spiffe://cluster.local/ns/y/sa/z")
	spec := func(selector, mode string, port string) string {
		s := selector
		if mode != "" {
			s += "mtls: {mode: " + mode + "}, "
		}
		if port != "" {
			s += ports("9090: {mode: " + port + "}, 81: {mode: STRICT}, 82: {mode: PERMISSIVE}")
		}
		return s
	}
	for _, meshMode := range modes {
		for _, nsMode := range modes {
			for _, podMode := range modes {
				for _, portMode := range modes {
					parts := []string{webPod}
					if meshMode != "" {
						parts = append(parts, peerAuth("istio-system", "m", spec("", meshMode, "")))
					}
					if nsMode != "" {
						parts = append(parts, peerAuth("x", "n", spec("", nsMode, "")))
					}
					if podMode != "" || portMode != "" {
						parts = append(parts, peerAuth("x", "w", spec(web, podMode, portMode)))
					}
					snapshot := told(t, world(t, docs(parts...)))
					pod := snapshot.Workload("Kubernetes//Pod/x/web")
					apply, missing := snapshot.Policies(pod)
					if len(missing) > 0 {
						t.Fatalf("%q %q %q %q: missing %q", meshMode, nsMode, podMode, portMode, missing)
					}
					byPort := map[uint16]string{80: ""}
					if portMode != "" {
						byPort = map[uint16]string{80: "", 9090: portMode, 81: "STRICT", 82: "PERMISSIVE"}
					}
					for port, mode := range byPort {
						strictHere := false
						for _, m := range []string{meshMode, nsMode, podMode, mode} {
							if m != "" && m != "UNSET" {
								strictHere = m == "STRICT"
							}
						}
						where := fmt.Sprintf("mesh %q, namespace %q, pod %q, port %d %q", meshMode, nsMode, podMode, port, mode)
						in := authz.Input{Src: netip.MustParseAddrPort("10.0.0.9:1"), Dst: netip.AddrPortFrom(pod.Addrs[0], port)}
						if got := authz.Check(in, apply, missing); got.Allowed == strictHere {
							t.Errorf("%s: plaintext: %v", where, got)
						}
						in.Peer = peer
						if got := authz.Check(in, apply, missing); !got.Allowed {
							t.Errorf("%s: mutual TLS: %v", where, got)
						}
					}
				}
			}
		}
	}
}

// Rules decide as they read, from YAML to verdict.
func TestPoliciesDecideAsTheyRead(t *testing.T) {
	friend, stranger := identity.MustParse("spiffe://cluster.local/ns/x/sa/friend"), identity.MustParse("spiffe://cluster.local/ns/y/sa/stranger")
	for _, tc := range []struct {
		name, spec                    string
		friend80, stranger80, plain80 bool
		friend81, stranger81, plain81 bool
	}{
		{"nothing is allowed", "{}", false, false, false, false, false, false},
		{"everything is allowed", "rules: [{}]", true, true, true, true, true, true},
		{"an account", "rules: [{from: [{source: {serviceAccounts: [friend]}}]}]", true, false, false, true, false, false},
		{"a namespace on a port", "rules: [{from: [{source: {namespaces: [x]}}], to: [{operation: {ports: ['80']}}]}]", true, false, false, false, false, false},
		{"whoever proves an identity", "rules: [{from: [{source: {principals: ['*']}}]}]", true, true, false, true, true, false},
		{"deny a namespace", "action: DENY\nrules: [{from: [{source: {namespaces: [y]}}]}]", true, false, true, true, false, true},
		{"deny others than a principal", "action: DENY\nrules: [{from: [{source: {notPrincipals: ['*/sa/friend']}}]}]", true, false, false, true, false, false},
		{"deny a port by condition", "action: DENY\nrules: [{when: [{key: destination.port, values: ['81']}]}]", true, true, true, false, false, false},
		{"allow with HTTP allows nothing", "rules: [{to: [{operation: {ports: ['80'], methods: [GET]}}]}]", false, false, false, false, false, false},
		{"deny with HTTP denies more", "action: DENY\nrules: [{to: [{operation: {ports: ['80'], methods: [GET]}}]}]", false, false, false, true, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			snapshot := told(t, world(t, docs(webPod, policy(tc.spec))))
			pod := snapshot.Workload("Kubernetes//Pod/x/web")
			apply, missing := snapshot.Policies(pod)
			for _, c := range []struct {
				who  string
				peer identity.ID
				port uint16
				want bool
			}{
				{"friend", friend, 80, tc.friend80}, {"stranger", stranger, 80, tc.stranger80}, {"plaintext", identity.ID{}, 80, tc.plain80},
				{"friend", friend, 81, tc.friend81}, {"stranger", stranger, 81, tc.stranger81}, {"plaintext", identity.ID{}, 81, tc.plain81},
			} {
				got := authz.Check(authz.Input{Src: netip.MustParseAddrPort("10.0.0.9:1"), Dst: netip.AddrPortFrom(pod.Addrs[0], c.port), Peer: c.peer}, apply, missing)
				if got.Allowed != c.want {
					t.Errorf("%s to %d: %v", c.who, c.port, got)
				}
			}
		})
	}
}
