package hbone

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
)

// Names of the header fields that a CONNECT and its answer carry.
const (
	HeaderBaggage     = "baggage"
	HeaderForwarded   = "forwarded"
	HeaderTraceparent = "traceparent"
	HeaderNetwork     = "x-forwarded-network"
	HeaderProxyStatus = "proxy-status"
)

// Baggage describes a workload to the other side. Its values are not proven by
// anything: they are for telemetry only.
type Baggage struct {
	Cluster      string
	Namespace    string
	WorkloadType string // deployment, cronjob, pod or job; "" if unknown
	Workload     string
	Service      string // canonical name
	Revision     string // canonical revision
	Region       string
	Zone         string
}

// String returns the header's value. It may be empty, and is sent even then.
func (b Baggage) String() string {
	var s strings.Builder
	add := func(key, value string) {
		if value == "" {
			return
		}
		if s.Len() > 0 {
			s.WriteByte(',')
		}
		s.WriteString(key)
		s.WriteByte('=')
		s.WriteString(value)
	}
	add("k8s.cluster.name", b.Cluster)
	add("k8s.namespace.name", b.Namespace)
	if b.Workload != "" {
		add("k8s."+b.WorkloadType+".name", b.Workload)
	}
	add("service.name", b.Service)
	add("service.version", b.Revision)
	add("cloud.region", b.Region)
	add("cloud.availability_zone", b.Zone)
	return s.String()
}

// ParseBaggage parses the values of all baggage fields of one request. Unknown
// keys are ignored; a byte outside of ASCII fails the whole.
func ParseBaggage(values []string) (Baggage, error) {
	var b Baggage
	for _, line := range values {
		for len(line) > 0 {
			var item string
			item, line, _ = strings.Cut(line, ",")
			key, value, _ := strings.Cut(item, "=")
			value, _, _ = strings.Cut(value, "=")
			if err := b.set(key, value); err != nil {
				return Baggage{}, err
			}
		}
	}
	return b, nil
}

func (b *Baggage) set(key, value string) error {
	if !isASCII(value) {
		return fmt.Errorf("hbone: baggage value of %q is not ASCII", key)
	}
	switch key {
	case "k8s.cluster.name":
		b.Cluster = value
	case "k8s.namespace.name":
		b.Namespace = value
	case "k8s.deployment.name", "k8s.cronjob.name", "k8s.pod.name", "k8s.job.name":
		b.WorkloadType = strings.TrimSuffix(strings.TrimPrefix(key, "k8s."), ".name")
		b.Workload = value
	case "service.name":
		b.Service = value
	case "service.version":
		b.Revision = value
	case "cloud.region":
		b.Region = value
	case "cloud.availability_zone":
		b.Zone = value
	}
	return nil
}

// Forwarded returns the forwarded header's value for an app at client that
// called the service named host ("" if it called none).
func Forwarded(client netip.AddrPort, host string) string {
	s := `for="` + client.String() + `"`
	if host != "" {
		s += ";host=" + host
	}
	return s
}

// ForwardedHost returns the host part of a forwarded header, or "". Whom the
// header names as the client is never believed.
func ForwardedHost(value string) string {
	if !isASCII(value) {
		return ""
	}
	for len(value) > 0 {
		var part string
		part, value, _ = strings.Cut(value, ";")
		host, ok := strings.CutPrefix(strings.TrimSpace(part), "host=")
		if !ok {
			continue
		}
		if len(host) >= 2 && host[0] == '"' && host[len(host)-1] == '"' {
			host = host[1 : len(host)-1]
		}
		return host
	}
	return ""
}

// A Trace is the W3C trace context of one connection.
type Trace struct {
	ID   [16]byte
	Span [8]byte
}

// String returns the traceparent header's value.
func (t Trace) String() string {
	b := make([]byte, 0, 55)
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, t.ID[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, t.Span[:])
	return string(append(b, "-00"...))
}

// ParseTrace parses a traceparent header of any version that has version 00's
// four fields.
func ParseTrace(s string) (Trace, bool) {
	var t Trace
	var version, flags [1]byte
	if len(s) != 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return Trace{}, false
	}
	for _, f := range []struct {
		dst []byte
		src string
	}{{version[:], s[:2]}, {t.ID[:], s[3:35]}, {t.Span[:], s[36:52]}, {flags[:], s[53:]}} {
		if _, err := hex.Decode(f.dst, []byte(f.src)); err != nil {
			return Trace{}, false
		}
	}
	return t, true
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
