package telemetry

import (
	"strings"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/xds/mesh"
)

// trafficLabels are the labels of traffic metrics in ztunnel's order. The last
// four are there only if something is known of one of the workloads.
var trafficLabels = [...]string{
	"reporter",
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster",
	"destination_service", "destination_service_namespace", "destination_service_name",
	"destination_workload", "destination_canonical_service", "destination_canonical_revision",
	"destination_workload_namespace", "destination_principal", "destination_app", "destination_version",
	"destination_cluster",
	"request_protocol", "response_flags", "connection_security_policy",
	"source_region", "source_zone", "destination_region", "destination_zone",
}

// Where groups of labels begin.
const (
	labelReporter    = 0
	labelSource      = 1
	labelService     = 9
	labelDestination = 12
	labelProtocol    = 20
	labelFlags       = 21
	labelSecurity    = 22
	labelRegions     = 23
)

const unknown = "unknown"

// labels are the values of trafficLabels. "" in the last four: not there.
type labels [len(trafficLabels)]string

// labelsOf computes the labels of a connection, without its flag.
func labelsOf(r *tunnel.Record) labels {
	var l labels
	l[labelReporter] = "source"
	if r.Direction == tunnel.Inbound {
		l[labelReporter] = "destination"
	}
	principal := ""
	if r.MutualTLS() {
		principal = r.SrcIdentity.String()
	}
	switch {
	case r.SrcWorkload != nil:
		l.workload(labelSource, r.SrcWorkload, principal)
	default:
		l.baggage(labelSource, baggageOf(r), principal)
	}
	if s := r.Service; s != nil {
		l[labelService], l[labelService+1], l[labelService+2] = s.Hostname, s.Namespace, s.Name
	}
	principal = ""
	if w := r.DstWorkload; w != nil {
		if !w.Identity.IsZero() {
			principal = w.Identity.String() // Even without TLS: who it would be.
		}
		l.workload(labelDestination, w, principal)
	} else if r.MutualTLS() && !r.DstIdentity.IsZero() {
		l[labelDestination+4] = r.DstIdentity.String()
	}
	l[labelProtocol] = "tcp"
	l[labelSecurity] = unknown
	if r.MutualTLS() {
		l[labelSecurity] = "mutual_tls"
	}
	if r.SrcWorkload != nil || r.DstWorkload != nil || r.SrcBaggage != nil {
		l.regions(r)
	}
	for i := range labelRegions {
		l[i] = cleanLabel(l[i])
	}
	return l
}

// baggageOf is what the client says of itself where nobody knows better.
func baggageOf(r *tunnel.Record) (b hbone.Baggage) {
	if r.SrcWorkload == nil && r.SrcBaggage != nil {
		b = *r.SrcBaggage
	}
	return b
}

func (l *labels) workload(at int, w *mesh.Workload, principal string) {
	copy(l[at:], []string{w.WorkloadName, w.CanonicalName, w.CanonicalRevision, w.Namespace,
		principal, w.CanonicalName, w.CanonicalRevision, w.Cluster})
}

func (l *labels) baggage(at int, b hbone.Baggage, principal string) {
	copy(l[at:], []string{b.Workload, b.Service, b.Revision, b.Namespace,
		principal, b.Workload, b.Revision, b.Cluster})
}

func (l *labels) regions(r *tunnel.Record) {
	b := baggageOf(r)
	l[labelRegions], l[labelRegions+1] = b.Region, b.Zone
	if w := r.SrcWorkload; w != nil {
		l[labelRegions], l[labelRegions+1] = w.Region, w.Zone
	}
	if w := r.DstWorkload; w != nil {
		l[labelRegions+2], l[labelRegions+3] = w.Region, w.Zone
	}
	for i := labelRegions; i < len(l); i++ {
		l[i] = cleanLabel(l[i])
	}
}

// anonymous keeps of l only what our own node says, so that there can be few
// such sets: who the other side is has been given up.
func (l labels) anonymous() labels {
	other := labelDestination
	if l[labelReporter] == "destination" {
		other = labelSource
	}
	for i := range 8 {
		l[other+i] = unknown
	}
	for i := range 3 {
		l[labelService+i] = unknown
	}
	for i := labelRegions; i < len(l); i++ {
		l[i] = ""
	}
	return l
}

// maxLabel bounds what a peer's baggage can make us keep, in bytes.
const maxLabel = 512

// cleanLabel makes s a valid and bounded value; nothing becomes "unknown".
func cleanLabel(s string) string {
	if s == "" {
		return unknown
	}
	if len(s) > maxLabel {
		s = s[:maxLabel]
	}
	return strings.ToValidUTF8(s, "?")
}
