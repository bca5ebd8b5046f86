package control

import (
	"fmt"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// bigMesh is n pods behind n/10 services.
func bigMesh(n int) map[string]string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "apiVersion: v1\nkind: Pod\nmetadata: {name: p%d, namespace: x, labels: {app: a%d}}\nspec: {nodeName: n%d}\nstatus: {podIP: 10.%d.%d.%d}\n---\n", i, i/10, i%50, 1+i>>16, i>>8&255, i&255)
		if i%10 == 0 {
			fmt.Fprintf(&b, "apiVersion: v1\nkind: Service\nmetadata: {name: s%d, namespace: x}\nspec: {selector: {app: a%d}, ports: [{port: 80}]}\n---\n", i/10, i/10)
		}
	}
	return map[string]string{"f.yaml": b.String()}
}

func BenchmarkRead1000Pods(b *testing.B) {
	cfg := Config{Static: NewStatic(bigMesh(1000))}
	for b.Loop() {
		if _, r := Check(cfg); !r.Used {
			b.Fatal(r.Err())
		}
	}
}

// Ten times the pods and Services must cost about ten times as much.
func BenchmarkReadServices(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			var text strings.Builder
			for i := range n {
				fmt.Fprintf(&text, "apiVersion: v1\nkind: Pod\nmetadata: {name: p%d, namespace: x, labels: {app: a%d, tier: one}}\nspec: {nodeName: n}\nstatus: {podIP: 10.%d.%d.%d}\n---\n", i, i, 1+i>>16, i>>8&255, i&255)
				fmt.Fprintf(&text, "apiVersion: v1\nkind: Service\nmetadata: {name: s%d, namespace: x}\nspec: {selector: {tier: one, app: a%d}, ports: [{port: 80}]}\n---\n", i, i)
			}
			cfg := Config{Static: NewStatic(map[string]string{"f.yaml": text.String()})}
			for b.Loop() {
				if _, r := Check(cfg); !r.Used {
					b.Fatal(r.Err())
				}
			}
		})
	}
}

// What one changed pod of 1000 costs for each connected proxy.
func BenchmarkPushOneOf1000Pods(b *testing.B) {
	files := bigMesh(1000)
	before, _ := Check(Config{Static: NewStatic(files)})
	files["f.yaml"] = strings.Replace(files["f.yaml"], "podIP: 10.1.0.7", "podIP: 10.200.0.7", 1)
	after, _ := Check(Config{Static: NewStatic(files)})
	sub := first(&discovery.DeltaDiscoveryRequest{TypeUrl: typeAddress}, "n1")
	sub.next(before, true)
	worlds := []*World{before, after}
	i := 0
	for b.Loop() {
		i++
		if resp := sub.next(worlds[i%2], true); len(resp.GetResources()) != 1 {
			b.Fatal(len(resp.GetResources()))
		}
	}
}
