package authz

import (
	"fmt"
	"testing"

	"github.com/ztun/ztun/xds/securityapi"
)

// BenchmarkCheck: none of the DENY policies matches, the last ALLOW does.
func BenchmarkCheck(b *testing.B) {
	for _, n := range []int{1, 10, 100} {
		var policies []*Policy
		for i := range n {
			policies = append(policies,
				mustCompile(b, fmt.Sprintf("ns/deny-%d", i), &pb{Action: securityapi.Action_DENY, Rules: list(one(&pbMatch{
					DestinationPorts: list(uint32(8080)), Principals: list(isExact("cluster.local/ns/other/sa/bob")),
				}))}),
				mustCompile(b, fmt.Sprintf("ns/allow-%d", i), &pb{Rules: list(one(&pbMatch{
					SourceIps: list(cidr("10.0.0.0/8")), Namespaces: list(isExact(fmt.Sprint("ns", n-1-i)), isExact(map[bool]string{true: "default", false: "x"}[i == n-1])),
				}))}))
		}
		b.Run(fmt.Sprint("policies=", 2*n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !Check(tls, policies, nil).Allowed {
					b.Fatal("denied")
				}
			}
		})
	}
	var ids []*securityapi.StringMatch
	for i := range 1000 {
		ids = append(ids, isExact(fmt.Sprintf("cluster.local/ns/default/sa/%d", i)))
	}
	p := mustCompile(b, "ns/p", &pb{Rules: list(one(&pbMatch{Principals: append(ids, isExact(alice.Principal()))}))})
	b.Run("principals=1000", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if !Check(tls, list(p), nil).Allowed {
				b.Fatal("denied")
			}
		}
	})
}
