package mesh

import (
	"fmt"
	"net/netip"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/xds"
)

// newCity makes n services with one endpoint each and one service, at
// 10.255.0.1, with n endpoints.
func newCity(b *testing.B, n int) world {
	w := newWorld(b, Config{LocalNode: "here"})
	items := []proto.Message{source(on("here"), locality("r", "z", "s")), svc("ns", "big", at80("10.255.0.1"), balanced(failover, scopeNet, scopeRegion, scopeZone))}
	for i := range n {
		items = append(items, citizen(i), svc("ns", fmt.Sprint("s", i), at80(ipOf(10, i))))
	}
	w.put(items...)
	return w
}

func citizen(i int) *pbWorkload {
	return pod("ns", fmt.Sprint("w", i), ipOf(11, i), on(fmt.Sprint("node", i%100)), locality("r", fmt.Sprint("z", i%3), ""),
		in(fmt.Sprintf("ns/s%d.ns", i), 80, 8080), in("ns/big.ns", 80, 8080))
}

func ipOf(net byte, i int) string {
	return netip.AddrFrom4([4]byte{net, byte(i >> 16), byte(i >> 8), byte(i)}).String()
}

var sizes = []int{10, 1000, 10_000}

func BenchmarkResolve(b *testing.B) {
	for _, n := range sizes {
		w := newCity(b, n)
		s := w.Snapshot()
		src := s.Local("src", "ns", "src")
		for _, tt := range []struct {
			name, dst string
		}{{"service", ipOf(10, n/2)}, {"large-service", "10.255.0.1"}, {"workload", ipOf(11, n/2)}, {"unknown", "192.0.2.1"}} {
			dst := netip.AddrPortFrom(addrOf(tt.dst), 80)
			b.Run(fmt.Sprintf("%s/n=%d", tt.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := s.Resolve(src, dst); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkResolveAfterUpdate is the first Resolve to a service of n endpoints
// after one of them changed, with the update itself.
func BenchmarkResolveAfterUpdate(b *testing.B) {
	for _, n := range sizes {
		w := newCity(b, n)
		again := []xds.Resource{encode(b, citizen(n/2))}
		b.Run(fmt.Sprintf("n=%d", n), func(b *testing.B) {
			for b.Loop() {
				w.Addresses().Apply(again, nil)
				s := w.Snapshot()
				if _, err := s.Resolve(s.Local("src", "ns", "src"), netip.MustParseAddrPort("10.255.0.1:80")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkUpdate applies one workload to a mesh of n services and n workloads.
func BenchmarkUpdate(b *testing.B) {
	for _, n := range sizes {
		w := newCity(b, n)
		again := []xds.Resource{encode(b, citizen(n/2))}
		b.Run(fmt.Sprintf("n=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if rejected := w.Addresses().Apply(again, nil); len(rejected) > 0 {
					b.Fatal(rejected)
				}
			}
		})
	}
}

// BenchmarkLoad applies n services and n workloads in one batch.
func BenchmarkLoad(b *testing.B) {
	for _, n := range sizes {
		var added []xds.Resource
		for i := range n {
			added = append(added, encode(b, citizen(i)), encode(b, svc("ns", fmt.Sprint("s", i), at80(ipOf(10, i)))))
		}
		b.Run(fmt.Sprintf("n=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if rejected := NewStore(Config{}).Addresses().Apply(added, nil); len(rejected) > 0 {
					b.Fatal(rejected)
				}
			}
		})
	}
}

func BenchmarkPolicies(b *testing.B) {
	w := newWorld(b, Config{})
	w.put(pod("ns", "a", "10.0.0.1", named("ns/p0", "ns/p1")))
	for i := range 10 {
		w.policies(policy("ns", fmt.Sprint("p", i), selected), policy("ns", fmt.Sprint("n", i), inside), policy("root", fmt.Sprint("g", i), global))
	}
	s := w.Snapshot()
	a := s.Workload("cluster1//Pod/ns/a")
	b.ReportAllocs()
	for b.Loop() {
		if apply, _ := s.Policies(a); len(apply) != 22 {
			b.Fatal(len(apply))
		}
	}
}
