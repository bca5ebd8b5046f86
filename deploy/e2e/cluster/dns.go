package cluster

import (
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
)

// names answers <service>.<namespace>.svc.cluster.local and
// <hostname>.<service>..., as the specification of DNS-based service discovery
// says: https://github.com/kubernetes/dns/blob/master/docs/specification.md
// Other names do not exist.
type names struct {
	services corelisters.ServiceLister
	slices   discoverylisters.EndpointSliceLister
}

const clusterDomain = "svc.cluster.local."

// serveNames answers at address, UDP and TCP, as long as the program runs.
func serveNames(c *Client, address string) error {
	f := informers.NewSharedInformerFactory(c, 0)
	n := &names{f.Core().V1().Services().Lister(), f.Discovery().V1().EndpointSlices().Lister()}
	forever := make(chan struct{})
	f.Start(forever)
	f.WaitForCacheSync(forever)
	packets, err := net.ListenPacket("udp", address)
	if err != nil {
		return fmt.Errorf("e2e: DNS: %w", err)
	}
	stream, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("e2e: DNS: %w", err)
	}
	for _, s := range []*dns.Server{{PacketConn: packets, Handler: n}, {Listener: stream, Handler: n}} {
		go func() {
			if err := s.ActivateAndServe(); err != nil {
				progress("DNS ended: %v", err)
			}
		}()
	}
	return nil
}

func (n *names) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg).SetReply(q)
	m.Authoritative = true
	if len(q.Question) == 1 {
		found := false
		m.Answer, found = n.answer(q.Question[0], maxAliases)
		if !found {
			m.Rcode = dns.RcodeNameError
		}
	}
	_ = w.WriteMsg(m)
}

// maxAliases bounds a chain of them, which may lead to its beginning.
const maxAliases = 8

// answer returns the records of a name, and whether the name exists at all.
func (n *names) answer(q dns.Question, aliases int) ([]dns.RR, bool) {
	name := strings.ToLower(q.Name)
	head, ok := strings.CutSuffix(name, "."+clusterDomain)
	if !ok {
		return nil, false
	}
	parts := strings.Split(head, ".")
	if len(parts) < 2 || len(parts) > 3 {
		return nil, false
	}
	namespace, service, host := parts[len(parts)-1], parts[len(parts)-2], ""
	if len(parts) == 3 {
		host = parts[0]
	}
	s, err := n.services.Services(namespace).Get(service)
	if err != nil {
		return nil, false
	}
	header := func(kind uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: kind, Class: dns.ClassINET, Ttl: 1}
	}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		target := dns.Fqdn(s.Spec.ExternalName)
		out := []dns.RR{&dns.CNAME{Hdr: header(dns.TypeCNAME), Target: target}}
		if aliases > 1 {
			more, _ := n.answer(dns.Question{Name: target, Qtype: q.Qtype, Qclass: q.Qclass}, aliases-1)
			out = append(out, more...)
		}
		return out, true
	}
	addresses := s.Spec.ClusterIPs
	if s.Spec.ClusterIP == corev1.ClusterIPNone || host != "" {
		addresses = n.endpoints(s, host)
	}
	var out []dns.RR
	for _, text := range addresses {
		ip := net.ParseIP(text)
		switch v4 := ip.To4(); {
		case v4 != nil && q.Qtype == dns.TypeA:
			out = append(out, &dns.A{Hdr: header(dns.TypeA), A: v4})
		case v4 == nil && q.Qtype == dns.TypeAAAA:
			out = append(out, &dns.AAAA{Hdr: header(dns.TypeAAAA), AAAA: ip})
		}
	}
	return out, host == "" || len(addresses) > 0
}

// endpoints are the addresses of a headless service's ready pods, or of the one with that hostname.
func (n *names) endpoints(s *corev1.Service, host string) []string {
	list, err := n.slices.EndpointSlices(s.Namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: s.Name}))
	if err != nil {
		return nil
	}
	var out []string
	for _, slice := range list {
		for _, e := range slice.Endpoints {
			ready := e.Conditions.Ready == nil || *e.Conditions.Ready || s.Spec.PublishNotReadyAddresses
			named := host == "" || e.Hostname != nil && *e.Hostname == host
			if ready && named {
				out = append(out, e.Addresses...)
			}
		}
	}
	return out
}

// readSome reads what one answer of a program's debug interface can hold.
func readSome(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, 64<<20))
	return string(b), err
}

var _ dns.Handler = (*names)(nil)
