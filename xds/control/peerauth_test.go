package control

import (
	"fmt"
	"slices"
	"testing"
)

func peerAuth(namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: %s, namespace: %s}\nspec: {%s}", name, namespace, spec)
}

const (
	strict     = "mtls: {mode: STRICT}"
	permissive = "mtls: {mode: PERMISSIVE}"
	disable    = "mtls: {mode: DISABLE}"
	unset      = "mtls: {mode: UNSET}"
	web        = "selector: {matchLabels: {app: web}}, "
	webPod     = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: x, labels: {app: web, istio.io/dataplane-mode: ambient}}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.1}"
)

func ports(list string) string { return "portLevelMtls: {" + list + "}" }

// Facts istio.md 5.7. The effective mode of a port is that of its own entry, or
// of the selector's policy, or of the namespace's, or of the mesh's.
func TestPeerAuthenticationOfAPod(t *testing.T) {
	const static, own = "istio-system/istio_converted_static_strict", "x/converted_peer_authentication_w"
	plaintext := `clauses { matches { not_principals { presence {} } } }`
	except := func(port int) string { return fmt.Sprintf("clauses { matches { not_destination_ports: %d } }", port) }
	only := func(port int) string {
		return fmt.Sprintf("rules { clauses { matches { destination_ports: %d not_principals { presence {} } } } }", port)
	}
	for _, tc := range []struct {
		name                      string
		mesh, namespace, workload string // specs; empty: none
		attached                  []string
		want                      string // of the converted policy; empty: none
	}{
		{"mesh strict", strict, "", "", []string{static}, ""},
		{"mesh permissive", permissive, "", "", nil, ""},
		{"mesh without a mode", "", "", web + strict, []string{static}, ""},
		{"namespace strict", "", strict, "", []string{static}, ""},
		{"namespace opens", strict, permissive, "", nil, ""},
		{"namespace disables", strict, disable, "", nil, ""},
		{"namespace inherits", strict, unset, "", []string{static}, ""},
		{"namespace closes", permissive, strict, "", []string{static}, ""},
		{"workload strict", permissive, permissive, web + strict, []string{static}, ""},
		{"workload opens", strict, strict, web + permissive, nil, ""},
		{"workload inherits", strict, "", web + unset, []string{static}, ""},
		{"strict, port open", "", "", web + strict + ", " + ports("9090: {mode: PERMISSIVE}"), []string{own}, "rules { " + plaintext + except(9090) + " }"},
		{"strict, port disabled", "", "", web + strict + ", " + ports("9090: {mode: DISABLE}"), []string{own}, "rules { " + plaintext + except(9090) + " }"},
		{"strict, two ports open", "", "", web + strict + ", " + ports("9091: {mode: DISABLE}, 9090: {mode: PERMISSIVE}"), []string{own}, "rules { " + plaintext + except(9090) + except(9091) + " }"},
		{"strict, port strict", "", "", web + strict + ", " + ports("9090: {mode: STRICT}"), []string{static}, ""},
		{"strict, port unset", "", "", web + strict + ", " + ports("9090: {mode: UNSET}"), []string{static}, ""},
		{"permissive, port strict", "", "", web + permissive + ", " + ports("9090: {mode: STRICT}"), []string{own}, only(9090)},
		{"disabled, port strict", strict, "", web + disable + ", " + ports("9090: {mode: STRICT}"), []string{own}, only(9090)},
		{"permissive, two ports strict", "", "", web + permissive + ", " + ports("9090: {mode: STRICT}, 80: {mode: STRICT}"), []string{own}, only(80) + only(9090)},
		{"permissive, port open", "", "", web + permissive + ", " + ports("9090: {mode: PERMISSIVE}"), nil, ""},
		{"unset, port strict", "", "", web + ports("9090: {mode: STRICT}"), []string{own}, only(9090)},
		{"unset under strict mesh, port open", strict, "", web + ports("9090: {mode: PERMISSIVE}"), []string{own}, "rules { " + except(9090) + plaintext + " }"},
		{"unset under strict mesh, port disabled", strict, "", web + ports("9090: {mode: DISABLE}"), []string{own}, "rules { " + except(9090) + plaintext + " }"},
		{"unset under strict namespace, port open", "", strict, web + ports("9090: {mode: PERMISSIVE}"), []string{own}, "rules { " + except(9090) + plaintext + " }"},
		{"unset under unset namespace under strict mesh, port open", strict, unset, web + ports("9090: {mode: PERMISSIVE}"), []string{own}, "rules { " + except(9090) + plaintext + " }"},
		{"unset under strict mesh, port strict", strict, "", web + ports("9090: {mode: STRICT}"), []string{static}, ""},
		{"unset under strict mesh, both", strict, "", web + ports("9090: {mode: PERMISSIVE}, 80: {mode: STRICT}"), []string{own}, "rules { " + except(9090) + plaintext + " }"},
		{"unset under open namespace under strict mesh, port strict", strict, permissive, web + ports("9090: {mode: STRICT}"), []string{own}, only(9090)},
		{"unset under open namespace under strict mesh, port open", strict, permissive, web + ports("9090: {mode: PERMISSIVE}"), nil, ""},
		{"another selector", strict, "", "selector: {matchLabels: {app: db}}, " + permissive, []string{static}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			parts := []string{webPod}
			for _, pa := range []struct{ ns, name, spec string }{{"istio-system", "m", tc.mesh}, {"x", "n", tc.namespace}, {"x", "w", tc.workload}} {
				if pa.spec != "" {
					parts = append(parts, peerAuth(pa.ns, pa.name, pa.spec))
				}
			}
			w := world(t, docs(parts...))
			if got := w.workload(t, "x", "web").AuthorizationPolicies; !slices.Equal(got, tc.attached) {
				t.Errorf("attached %q, want %q", got, tc.attached)
			}
			wantProto(t, w.authorization(static), `name: "istio_converted_static_strict" namespace: "istio-system" scope: WORKLOAD_SELECTOR action: DENY rules { `+plaintext+" }")
			got := w.authorization(own)
			if (got != nil) != (tc.want != "") {
				t.Fatalf("converted: %v", got)
			}
			if got != nil {
				wantProto(t, got, `name: "converted_peer_authentication_w" namespace: "x" scope: WORKLOAD_SELECTOR action: DENY `+tc.want)
			}
		})
	}
}

func TestNoPeerAuthenticationNoStaticPolicy(t *testing.T) {
	if w := world(t, webPod); len(w.wire.authorizations) != 0 {
		t.Errorf("served %v", w.wire.authorizations)
	}
}

func TestOldestPeerAuthenticationWins(t *testing.T) {
	dated := func(name, created, spec string) string {
		return fmt.Sprintf("apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: %s, namespace: x, creationTimestamp: %s}\nspec: {%s}", name, created, spec)
	}
	w, r := readYAML(docs(webPod,
		dated("a", "2026-02-01T00:00:00Z", strict), dated("b", "2026-01-01T00:00:00Z", permissive),
		dated("c", "2026-02-01T00:00:00Z", web+strict), dated("d", "2026-01-01T00:00:00Z", web+unset)))
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	if got := w.workload(t, "x", "web").AuthorizationPolicies; got != nil {
		t.Errorf("attached %q: the newer ones won", got)
	}
	if !hasProblem(r, "f.yaml:7: warning: ", "the one at f.yaml:12 is older") || !hasProblem(r, "f.yaml:20: warning: spec.selector: ", "the one at f.yaml:22 is older") {
		t.Errorf("problems %q", texts(r))
	}
}

func TestPeerAuthenticationProblems(t *testing.T) {
	for _, tc := range []struct{ name, yaml, place, text string }{
		{"mode", peerAuth("x", "a", "mtls: {mode: strict}"), "f.yaml:4: spec.mtls.mode: ", "must be one of DISABLE, PERMISSIVE, STRICT, UNSET"},
		{"ports without a selector", peerAuth("x", "a", ports("80: {mode: STRICT}")), "f.yaml:4: spec.portLevelMtls: ", "needs a selector"},
		{"port key", peerAuth("x", "a", web+ports("http: {mode: STRICT}")), "f.yaml:4: spec.portLevelMtls.http: ", "must be a whole number"},
		{"port range", peerAuth("x", "a", web+ports("70000: {mode: STRICT}")), "f.yaml:4: spec.portLevelMtls: ", "is no port"},
		{"unknown field", peerAuth("x", "a", "mode: STRICT"), "f.yaml:4: spec.mode: ", "unknown field"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, r := readYAML(tc.yaml)
			if r.Used || !hasProblem(r, tc.place, tc.text) {
				t.Errorf("used: %v; no problem %q ... %q in %q", r.Used, tc.place, tc.text, texts(r))
			}
		})
	}
	_, r := readYAML(docs(webPod, peerAuth("istio-system", "a", web+strict)))
	if !hasProblem(r, "f.yaml:10: warning: spec.selector: ", "has no effect") {
		t.Errorf("problems %q", texts(r))
	}
}
