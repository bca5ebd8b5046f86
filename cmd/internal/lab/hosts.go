package lab

import (
	"fmt"
	"strings"
)

// hostsFile returns the /etc/hosts of a pod: itself and every service, by
// each name that a resolver in the cluster would know.
//
// A pod outside of the mesh has nobody who understands a service's virtual
// address (there is no kube-proxy), so for it a service's names lead to the
// service's pods.
func hostsFile(p *podSpec, s *spec) string {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, a := range p.Addrs {
		fmt.Fprintf(&b, "%s\t%s\n", a, p.Name)
	}
	for _, svc := range s.world.Services() {
		addrs := svc.Addrs
		if !p.Enrolled && !svc.Headless {
			addrs = s.servicePods(svc.Namespace, svc.Name)
		}
		names := fmt.Sprintf("%s %s.%s.svc %s.%s", svc.Hostname, svc.Name, svc.Namespace, svc.Name, svc.Namespace)
		if svc.Namespace == p.Namespace {
			names += " " + svc.Name
		}
		for _, a := range addrs {
			fmt.Fprintf(&b, "%s\t%s\n", a, names)
		}
	}
	return b.String()
}

// resolvFile returns the /etc/resolv.conf of a pod. There is no DNS server in
// the lab; the search list is what a cluster's would be.
func resolvFile(p *podSpec) string {
	return fmt.Sprintf("search %s.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 attempts:1 timeout:1\n", p.Namespace)
}
