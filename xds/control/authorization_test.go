package control

import (
	"slices"
	"strings"
	"testing"
)

// policy is an AuthorizationPolicy p in namespace x with the given spec.
func policy(spec string) string {
	return "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: x}\nspec:\n" + indent(spec)
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n  ")
}

// Facts istio.md 5.6.
func TestAuthorizationPolicyBecomesAuthorization(t *testing.T) {
	for _, tc := range []struct{ name, spec, want string }{
		{"allow nothing", "{}", ""},
		{"allow nothing, empty rules", "rules: []", ""},
		{"deny", "action: DENY\nrules: [{from: [{source: {namespaces: [a]}}]}]",
			`action: DENY rules { clauses { matches { namespaces { exact: "a" } } } }`},
		{"empty rule matches everything", "rules: [{}]", "rules {}"},
		{"string forms", `rules: [{from: [{source: {principals: ["*", "*x", "x*", "x"]}}]}]`,
			`rules { clauses { matches { principals { presence {} } principals { suffix: "x" } principals { prefix: "x" } principals { exact: "x" } } } }`},
		{"every source field", `rules: [{from: [{source: {namespaces: [a], notNamespaces: [b], principals: [c], notPrincipals: [d], serviceAccounts: [sa, ns/sa], notServiceAccounts: [other], ipBlocks: [10.0.0.1], notIpBlocks: [10.1.2.3/16, "fd00::/8"]}}]}]`,
			`rules { clauses { matches {
			   namespaces { exact: "a" } not_namespaces { exact: "b" } principals { exact: "c" } not_principals { exact: "d" }
			   service_accounts { namespace: "x" serviceAccount: "sa" } service_accounts { namespace: "ns" serviceAccount: "sa" } not_service_accounts { namespace: "x" serviceAccount: "other" }
			   source_ips { address: "\n\x00\x00\x01" length: 32 } not_source_ips { address: "\n\x01\x00\x00" length: 16 }
			   not_source_ips { address: "\xfd\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" length: 8 } } } }`},
		{"to before from before when", `rules: [{when: [{key: destination.ip, values: [10.0.0.1]}], from: [{source: {namespaces: [a]}}], to: [{operation: {ports: ["80"], notPorts: ["81"]}}]}]`,
			`rules { clauses { matches { destination_ports: 80 not_destination_ports: 81 } } clauses { matches { namespaces { exact: "a" } } } clauses { matches { destination_ips { address: "\n\x00\x00\x01" length: 32 } } } }`},
		{"or within, and between", `rules: [{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}], to: [{operation: {ports: ["1"]}}, {operation: {ports: ["2"]}}]}, {from: [{source: {namespaces: [c]}}]}]`,
			`rules { clauses { matches { destination_ports: 1 } matches { destination_ports: 2 } } clauses { matches { namespaces { exact: "a" } } matches { namespaces { exact: "b" } } } }
			 rules { clauses { matches { namespaces { exact: "c" } } } }`},
		{"each when key", `rules: [{when: [{key: source.ip, notValues: [10.0.0.1]}, {key: source.namespace, values: [a], notValues: [b]}, {key: source.principal, values: ["*"]}, {key: destination.port, values: ["80"]}]}]`,
			`rules { clauses { matches { not_source_ips { address: "\n\x00\x00\x01" length: 32 } } } clauses { matches { namespaces { exact: "a" } not_namespaces { exact: "b" } } }
			 clauses { matches { principals { presence {} } } } clauses { matches { destination_ports: 80 } } }`},
		{"allow drops rules with HTTP", `rules: [{to: [{operation: {methods: [GET], ports: ["80"]}}]}, {from: [{source: {namespaces: [a]}}]}, {when: [{key: "request.headers[x]", values: [y]}]}]`,
			`rules { clauses { matches { namespaces { exact: "a" } } } }`},
		{"allow drops trust domains", `rules: [{from: [{source: {namespaces: [a], trustDomains: [b]}}]}]`, ``},
		{"allow becomes nothing", `rules: [{to: [{operation: {paths: ["/"]}}]}]`, ""},
		{"deny keeps the rest", `{action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ["80"]}}], from: [{source: {namespaces: [a], requestPrincipals: [b]}}]}]}`,
			`action: DENY rules { clauses { matches { destination_ports: 80 } } clauses { matches { namespaces { exact: "a" } } } }`},
		{"deny leaves an empty match", `{action: DENY, rules: [{to: [{operation: {hosts: [a]}}], from: [{source: {namespaces: [a]}}]}]}`,
			`action: DENY rules { clauses { matches {} } clauses { matches { namespaces { exact: "a" } } } }`},
		{"deny with an HTTP when", `{action: DENY, rules: [{when: [{key: request.auth.claims, values: [a]}]}]}`,
			`action: DENY rules { clauses { matches {} } }`},
		{"snake case", `rules: [{from: [{source: {not_namespaces: [a]}}]}]`, `rules { clauses { matches { not_namespaces { exact: "a" } } } }`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := world(t, policy(tc.spec)).authorization("x/p")
			if got == nil {
				t.Fatal("not served")
			}
			wantProto(t, got, `name: "p" namespace: "x" scope: NAMESPACE `+tc.want)
		})
	}
}

func TestAuthorizationScope(t *testing.T) {
	pods := docs(
		"apiVersion: v1\nkind: Pod\nmetadata: {name: in, namespace: x, labels: {app: web, tier: front}}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.1}",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: other, namespace: x, labels: {app: db}}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.2}",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: in, namespace: y, labels: {app: web}}\nspec: {nodeName: n}\nstatus: {podIP: 10.0.0.3}", "")
	all := []string{"x/in", "x/other", "y/in"}
	for _, tc := range []struct {
		name, namespace, spec, scope string
		attached                     []string
	}{
		{"namespace", "x", "{}", "NAMESPACE", nil},
		{"global", "istio-system", "{}", "GLOBAL", nil},
		{"selector", "x", "selector: {matchLabels: {app: web}}", "WORKLOAD_SELECTOR", all[:1]},
		{"selector of two", "x", "selector: {matchLabels: {app: web, tier: front}}", "WORKLOAD_SELECTOR", all[:1]},
		{"selector of none", "x", "selector: {matchLabels: {app: web, tier: back}}", "WORKLOAD_SELECTOR", nil},
		{"empty selector", "x", "selector: {}", "WORKLOAD_SELECTOR", all[:2]},
		{"selector in the root namespace", "istio-system", "selector: {matchLabels: {app: web}}", "WORKLOAD_SELECTOR", []string{"x/in", "y/in"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := world(t, pods+"---\n"+strings.Replace(policy(tc.spec), "namespace: x", "namespace: "+tc.namespace, 1))
			key := tc.namespace + "/p"
			if got := w.authorization(key).Scope.String(); got != tc.scope {
				t.Errorf("scope %s, want %s", got, tc.scope)
			}
			var attached []string
			for _, m := range w.wire.workloads {
				if slices.Contains(m.AuthorizationPolicies, key) {
					attached = append(attached, m.Namespace+"/"+m.Name)
				}
			}
			if !slices.Equal(attached, tc.attached) {
				t.Errorf("attached to %v, want %v", attached, tc.attached)
			}
		})
	}
}

// What is not enforced is said, with its place.
func TestAuthorizationWarnings(t *testing.T) {
	for _, tc := range []struct {
		name, spec, place, text string
		served                  bool
	}{
		{"HTTP in allow", "rules:\n- to:\n  - operation:\n      methods: [GET]", "f.yaml:8: warning: spec.rules[0].to[0].operation.methods: ", "allows nothing", true},
		{"HTTP in deny", "action: DENY\nrules:\n- to:\n  - operation:\n      ports: ['1']\n      notPaths: [/]", "f.yaml:10: warning: spec.rules[0].to[0].operation.notPaths: ", "left out", true},
		{"HTTP when", "rules:\n- when:\n  - key: request.headers[a]\n    values: [b]", "f.yaml:7: warning: spec.rules[0].when[0].key: ", "allows nothing", true},
		{"deny without effect", "action: DENY\nrules: [{to: [{operation: {methods: [GET]}}]}]", "f.yaml:4: warning: spec: ", "has no effect", true},
		{"deny nothing", "action: DENY", "f.yaml:4: warning: spec: ", "denies nothing", true},
		{"audit", "action: AUDIT\nrules: [{}]", "f.yaml:5: warning: spec.action: ", "AUDIT is not enforced", false},
		{"custom", "action: CUSTOM\nprovider: {name: a}\nrules: [{}]", "f.yaml:5: warning: spec.action: ", "CUSTOM is not enforced", false},
		{"target", "targetRefs: [{kind: Service, name: s}]\nrules: [{}]", "f.yaml:4: warning: spec: ", "only a waypoint", false},
		{"selects nothing", "selector: {matchLabels: {a: b}}", "f.yaml:5: warning: spec.selector: ", "selects no pod", true},
		{"inner asterisk", "rules: [{from: [{source: {principals: [a*b]}}]}]", "f.yaml:5: warning: spec.rules[0].from[0].source.principals[0]: ", "stands for itself", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w, r := readYAML(policy(tc.spec))
			if err := r.Err(); err != nil {
				t.Fatal(err)
			}
			if !hasProblem(r, tc.place, tc.text) {
				t.Errorf("no warning %q ... %q in %q", tc.place, tc.text, texts(r))
			}
			if served := w.authorization("x/p") != nil; served != tc.served {
				t.Errorf("served: %v", served)
			}
		})
	}
	t.Run("dry run", func(t *testing.T) {
		w, r := readYAML(strings.Replace(policy("{}"), "namespace: x", "namespace: x, annotations: {istio.io/dry-run: 'true'}", 1))
		if w == nil || w.authorization("x/p") != nil || !hasProblem(r, "f.yaml:3: warning: metadata.annotations[istio.io/dry-run]: ", "not served") {
			t.Errorf("problems %q", texts(r))
		}
	})
	t.Run("outside the mesh", func(t *testing.T) {
		_, r := readYAML(docs(policy("selector: {matchLabels: {a: b}}"), "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: x, labels: {a: b}}\nstatus: {podIP: 10.0.0.1}"))
		if !hasProblem(r, "f.yaml:5: warning: spec.selector: ", "nothing enforces it") {
			t.Errorf("problems %q", texts(r))
		}
	})
}

// What istiod drops in silence, and what would mean the opposite of what it
// says, is refused.
func TestAuthorizationProblems(t *testing.T) {
	for _, tc := range []struct{ name, spec, place, text string }{
		{"unknown field", "rule: []", "f.yaml:5: spec.rule: ", "unknown field"},
		{"likely field", "rules: [{From: []}]", "f.yaml:5: spec.rules[0].From: ", "it is written from"},
		{"action", "action: Deny", "f.yaml:5: spec.action: ", "must be one of ALLOW, AUDIT, CUSTOM, DENY"},
		{"port", "rules: [{to: [{operation: {ports: ['http']}}]}]", "f.yaml:5: spec.rules[0].to[0].operation.ports[0]: ", "is no port"},
		{"port as a number", "rules: [{to: [{operation: {ports: [80]}}]}]", "f.yaml:5: spec.rules[0].to[0].operation.ports[0]: ", "put 80 in quotes"},
		{"port range", "rules: [{to: [{operation: {ports: ['65536']}}]}]", "f.yaml:5: spec.rules[0].to[0].operation.ports[0]: ", "is no port"},
		{"block", "rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]", "f.yaml:5: spec.rules[0].from[0].source.ipBlocks[0]: ", "neither"},
		{"mapped address", "rules: [{from: [{source: {ipBlocks: ['::ffff:10.0.0.1']}}]}]", "f.yaml:5: spec.rules[0].from[0].source.ipBlocks[0]: ", "neither"},
		{"when block", "rules: [{when: [{key: source.ip, values: [x]}]}]", "f.yaml:5: spec.rules[0].when[0].values[0]: ", "neither"},
		{"spiffe", "rules: [{from: [{source: {principals: ['spiffe://a']}}]}]", "f.yaml:5: spec.rules[0].from[0].source.principals[0]: ", "without spiffe://"},
		{"empty string", "rules: [{from: [{source: {namespaces: ['']}}]}]", "f.yaml:5: spec.rules[0].from[0].source.namespaces[0]: ", "must not be empty"},
		{"account", "rules: [{from: [{source: {serviceAccounts: [a/b/c]}}]}]", "f.yaml:5: spec.rules[0].from[0].source.serviceAccounts[0]: ", "neither"},
		{"account wildcard", "rules: [{from: [{source: {serviceAccounts: ['*']}}]}]", "f.yaml:5: spec.rules[0].from[0].source.serviceAccounts[0]: ", "neither"},
		{"empty from", "rules: [{from: []}]", "f.yaml:5: spec.rules[0].from: ", "is an empty list"},
		{"empty source", "rules: [{from: [{source: {}}]}]", "f.yaml:5: spec.rules[0].from[0].source: ", "must not be empty"},
		{"no source", "rules: [{from: [{}]}]", "f.yaml:5: spec.rules[0].from[0]", "must not be empty"},
		{"null source", "rules: [{from: [null]}]", "f.yaml:5: spec.rules[0].from[0]: ", "must be a value"},
		{"empty values of a source", "rules: [{from: [{source: {namespaces: []}}]}]", "f.yaml:5: spec.rules[0].from[0].source.namespaces: ", "is an empty list"},
		{"empty operation", "rules: [{to: [{operation: {}}]}]", "f.yaml:5: spec.rules[0].to[0].operation: ", "must not be empty"},
		{"when without values", "rules: [{when: [{key: source.ip}]}]", "f.yaml:5: spec.rules[0].when[0]: ", "needs values"},
		{"when without key", "rules: [{when: [{values: [a]}]}]", "f.yaml:5: spec.rules[0].when[0]", "must not be empty"},
		{"selector and target", "selector: {matchLabels: {a: b}}\ntargetRefs: [{kind: Service, name: s}]", "f.yaml:5: spec.selector: ", "exclude each other"},
		{"selector by expression", "selector: {matchExpressions: []}", "f.yaml:5: spec.selector.matchExpressions: ", "unknown field"},
		{"both spellings", "selector: {matchLabels: {a: b}, match_labels: {a: c}}", "f.yaml:5: spec.selector.match_labels: ", "other spelling"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, r := readYAML(policy(tc.spec))
			if r.Used || !hasProblem(r, tc.place, tc.text) {
				t.Errorf("used: %v; no problem %q ... %q in %q", r.Used, tc.place, tc.text, texts(r))
			}
		})
	}
}
