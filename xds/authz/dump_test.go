package authz

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ztun/ztun/xds/securityapi"
)

// The first two are what stock ztunnel printed for these policies.
func TestMarshalJSON(t *testing.T) {
	tests := []struct {
		in   *pb
		want string
	}{
		{&pb{
			Name: "deny-9999", Namespace: "default", Scope: securityapi.Scope_WORKLOAD_SELECTOR, Action: securityapi.Action_DENY,
			Rules: list(one(&pbMatch{DestinationPorts: list(uint32(9999)), Principals: list(isExact("cluster.local/ns/default/sa/pa"))})),
		}, `{"action":"Deny","dryRun":false,"name":"deny-9999","namespace":"default",
			"rules":[[[{"destinationPorts":[9999],"principals":[{"Exact":"cluster.local/ns/default/sa/pa"}]}]]],"scope":"WorkloadSelector"}`},
		{&pb{
			Name: "allow-all", Namespace: "istio-system",
			Rules: list(one(&pbMatch{NotSourceIps: list(cidr("192.0.2.0/24")), Namespaces: list(isPrefix("def"))})),
		}, `{"action":"Allow","dryRun":false,"name":"allow-all","namespace":"istio-system",
			"rules":[[[{"namespaces":[{"Prefix":"def"}],"notSourceIps":["192.0.2.0/24"]}]]],"scope":"Global"}`},
		{&pb{
			Name: "n", Namespace: "ns", Scope: securityapi.Scope_NAMESPACE, DryRun: true,
			Rules: list(&pbRule{}, one(), one(&pbMatch{}, &pbMatch{
				NotPrincipals: list(isPresent(), isSuffix("x")), ServiceAccounts: list(account2("a", "b")),
				NotDestinationPorts: list(uint32(1)), DestinationIps: list(cidr("::1/128")),
			})),
		}, `{"action":"Allow","dryRun":true,"name":"n","namespace":"ns","rules":[[],[[]],[[{},{
			"notPrincipals":[{"Presence":[]},{"Suffix":"x"}],"serviceAccounts":[{"namespace":"a","serviceAccount":"b"}],
			"notDestinationPorts":[1],"destinationIps":["::1/128"]}]]],"scope":"Namespace"}`},
		{&pb{Name: "none"}, `{"action":"Allow","dryRun":false,"name":"none","namespace":"","rules":[],"scope":"Global"}`},
	}
	for _, tt := range tests {
		b, err := json.Marshal(mustCompile(t, "k", tt.in))
		if err != nil {
			t.Fatal(err)
		}
		var got, want any
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(tt.want), &want); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -want +got\n%s", tt.in.GetName(), diff)
		}
	}
}
