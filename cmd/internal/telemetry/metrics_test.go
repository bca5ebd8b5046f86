package telemetry

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/mesh"
)

// encode returns the lines of m, with numbers written as ztunnel writes them.
func encode(t *testing.T, m *Metrics) []string {
	t.Helper()
	var out bytes.Buffer
	if err := m.Encode(&out); err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(wholeNumber.ReplaceAllString(out.String(), "$1"), "\n"), "\n")
}

var wholeNumber = regexp.MustCompile(`(?m)( [0-9]+)\.0$`)

// ours are the lines of families that both have; ztunnel's runtime is its own
// affair.
func ours(lines []string) []string {
	var out []string
	for _, l := range lines {
		name := strings.TrimPrefix(strings.TrimPrefix(l, "# HELP "), "# TYPE ")
		if strings.HasPrefix(name, "istio_") || strings.HasPrefix(name, "workload_manager_") || l == "# EOF" {
			out = append(out, l)
		}
	}
	for i, l := range out {
		out[i] = sortLabels(l)
	}
	slices.Sort(out)
	return out
}

// sortLabels brings the labels of a line into the order of their names, as
// client_golang has them; the format gives their order no meaning.
func sortLabels(line string) string {
	name, rest, ok := strings.Cut(line, "{")
	if !ok {
		return line
	}
	end := strings.LastIndexByte(rest, '}')
	labels := strings.Split(rest[:end], `",`)
	for i := range labels {
		labels[i] = strings.TrimSuffix(labels[i], `"`) + `"`
	}
	slices.Sort(labels)
	return name + "{" + strings.Join(labels, ",") + rest[end:]
}

// golden returns the two pods and the service of the run that metrics.txt is of.
func golden() (pa, pb *mesh.Workload, svc *mesh.Service) {
	pa = &mesh.Workload{UID: "cluster1//v1/Pod/default/pa", Name: "pa", Namespace: "default",
		Identity: identity.MustParse("spiffe://cluster.local/ns/default/sa/pa")}
	pa.App = mesh.App{CanonicalName: "client", CanonicalRevision: "v1", WorkloadName: "client"}
	pa.Place = mesh.Place{Cluster: "Kubernetes", Region: "r1", Zone: "z1"}
	pb = &mesh.Workload{UID: "cluster1//v1/Pod/default/pb", Name: "pb", Namespace: "default",
		Identity: identity.MustParse("spiffe://cluster.local/ns/default/sa/pb")}
	pb.App = mesh.App{CanonicalName: "server", CanonicalRevision: "v2", WorkloadName: "server"}
	pb.Place = mesh.Place{Cluster: "Kubernetes"}
	svc = &mesh.Service{Name: "server", ServiceKey: mesh.ServiceKey{Namespace: "default", Hostname: "server.default.svc.cluster.local"}}
	return pa, pb, svc
}

func TestMetricsGolden(t *testing.T) {
	pa, pb, svc := golden()
	m := NewMetrics("")
	traffic := NewTraffic(nil)
	m.Add(traffic)
	counts := map[string]float64{"active": 2}
	m.Gauge("workload_manager_active_proxy_count",
		"The total number current workloads with active proxies (unstable).", func() float64 { return counts["active"] })
	m.Gauge("workload_manager_pending_proxy_count",
		"The total number current workloads with pending proxies (unstable).", func() float64 { return 0 })
	m.Counter("workload_manager_proxies_started_total",
		"The total number of proxies that were started (unstable).", func() uint64 { return 2 })
	m.Counter("workload_manager_proxies_stopped_total",
		"The total number of proxies that were stopped (unstable).", func() uint64 { return 0 })

	source, destination := traffic.Recorder(), traffic.Recorder()
	// connection tells both pods of one connection, as both ran in one process.
	connection := func(svc *mesh.Service, out, in tunnel.Reason, request, response uint64, end bool) {
		rec := tunnel.Record{Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:15008"),
			HBONEAddr: "10.0.0.2:8080", SrcWorkload: pa, DstWorkload: pb, SrcIdentity: pa.Identity, DstIdentity: pb.Identity}
		o, i := rec, rec
		o.Service = svc
		i.Direction = tunnel.Inbound
		source.Opened(&o)
		destination.Opened(&i)
		if !end {
			return
		}
		o.Reason, o.Sent, o.Received = out, request, response
		i.Reason, i.Sent, i.Received = in, response, request
		source.Closed(&o)
		destination.Closed(&i)
	}
	connection(svc, tunnel.OK, tunnel.OK, 74, 75, true)
	connection(nil, tunnel.OK, tunnel.OK, 77, 75, true)
	connection(nil, tunnel.PeerDenied, tunnel.Denied, 0, 0, true)
	connection(nil, tunnel.PeerRefused, tunnel.ConnectRefused, 0, 0, true)
	connection(nil, tunnel.OK, tunnel.OK, 0, 0, false) // Left open.

	text, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	want := ours(strings.Split(strings.TrimSpace(string(text)), "\n"))
	if diff := cmp.Diff(want, ours(encode(t, m))); diff != "" {
		t.Errorf("families that ztunnel has too (-want +got):\n%s", diff)
	}
}

func record(src, dst *mesh.Workload) *tunnel.Record {
	return &tunnel.Record{Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:2"),
		SrcWorkload: src, DstWorkload: dst}
}

func has(lines []string, parts ...string) bool {
	return slices.ContainsFunc(lines, func(l string) bool {
		for _, p := range parts {
			if !strings.Contains(l, p) {
				return false
			}
		}
		return true
	})
}

func TestLabelsOfPlaintext(t *testing.T) {
	pa, pb, _ := golden()
	m, traffic := NewMetrics("1.31"), NewTraffic(nil)
	m.Add(traffic)
	rec := traffic.Recorder()
	rec.Opened(record(pa, pb))
	rec.Opened(record(nil, nil))
	derived := record(nil, pb)
	derived.Direction = tunnel.Inbound
	derived.SrcBaggage = &hbone.Baggage{Cluster: "c", Namespace: "ns", Workload: "w", Service: "svc", Revision: "rev", Region: "r", Zone: "z"}
	rec.Opened(derived)
	lines := encode(t, m)
	const opened = "istio_tcp_connections_opened_total{"
	if !has(lines, opened, `source_workload="client"`, `source_principal="unknown"`,
		`destination_principal="spiffe://cluster.local/ns/default/sa/pb"`, `connection_security_policy="unknown"`) {
		t.Error("plaintext between known workloads is not shown as such")
	}
	if !slices.Contains(lines, sortLabels(opened+`reporter="source",source_workload="unknown",source_canonical_service="unknown",`+
		`source_canonical_revision="unknown",source_workload_namespace="unknown",source_principal="unknown",source_app="unknown",`+
		`source_version="unknown",source_cluster="unknown",destination_service="unknown",destination_service_namespace="unknown",`+
		`destination_service_name="unknown",destination_workload="unknown",destination_canonical_service="unknown",`+
		`destination_canonical_revision="unknown",destination_workload_namespace="unknown",destination_principal="unknown",`+
		`destination_app="unknown",destination_version="unknown",destination_cluster="unknown",request_protocol="tcp",`+
		`response_flags="-",connection_security_policy="unknown"} 1`)) {
		t.Error("without any workload there are regions, or other labels")
	}
	if !has(lines, opened, `source_workload="w"`, `source_canonical_service="svc"`, `source_app="w"`, `source_version="rev"`,
		`source_region="r"`, `source_zone="z"`) {
		t.Error("baggage does not say who an unknown client is")
	}
	if !has(lines, `istio_build{component="ztunnel",tag="1.31"} 1`) {
		t.Error("no istio_build")
	}
}

func TestHostileBaggage(t *testing.T) {
	m, traffic := NewMetrics(""), NewTraffic(nil)
	m.Add(traffic)
	rec := traffic.Recorder()
	r := record(nil, nil)
	r.Direction = tunnel.Inbound
	r.SrcBaggage = &hbone.Baggage{Workload: "\xff\n\"" + strings.Repeat("x", 100_000)}
	rec.Opened(r)
	for _, l := range encode(t, m) { // An invalid label would fail the whole scrape.
		if len(l) > 4096 {
			t.Errorf("a line of %d bytes", len(l))
		}
	}
}

func TestCardinalityIsBounded(t *testing.T) {
	traffic := NewTraffic(nil)
	rec := traffic.Recorder()
	_, pb, _ := golden()
	r := record(nil, pb)
	r.Direction = tunnel.Inbound
	for i := range maxSeries + 500 {
		r.SrcBaggage = &hbone.Baggage{Workload: fmt.Sprintf("w%d", i)}
		rec.Opened(r)
		rec.Closed(r)
	}
	if n := len(traffic.series); n > maxSeries+1 {
		t.Errorf("%d series, want no more than %d", n, maxSeries+1)
	}
	if n := len(rec.cache); n > maxCached {
		t.Errorf("%d pairs are remembered", n)
	}
	var opened, closed uint64
	for _, s := range traffic.series {
		opened += s.opened.Load()
		closed += s.closed.Load()
	}
	if opened != maxSeries+500 || closed != opened {
		t.Errorf("%d opened and %d closed of %d", opened, closed, maxSeries+500)
	}
	if traffic.overflows.Load() == 0 {
		t.Error("nothing tells of the overflow")
	}
}

func TestSeriesOfDeletedWorkloadsGoAway(t *testing.T) {
	pa, pb, _ := golden()
	traffic := NewTraffic(nil)
	rec := traffic.Recorder()
	r := record(pa, pb)
	rec.Opened(r)
	rec.Opened(r)
	r.Reason = tunnel.Denied
	rec.Closed(r)
	r.Reason = tunnel.OK

	now := time.Now()
	alive := map[string]bool{pa.UID: true, pb.UID: true}
	sweep := func(after time.Duration) int {
		now = now.Add(after)
		traffic.Sweep(now, func(uid string) bool { return alive[uid] })
		return len(traffic.series)
	}
	if n := sweep(time.Hour); n != 2 {
		t.Errorf("%d series, want 2 while both live", n)
	}
	alive[pb.UID] = false
	if n := sweep(time.Hour); n != 2 {
		t.Errorf("%d series, want 2 just after the end", n)
	}
	alive[pb.UID] = true // It comes back in time.
	sweep(time.Hour)
	alive[pb.UID] = false
	sweep(time.Second)
	if n := sweep(keepDeleted - time.Second); n != 2 {
		t.Errorf("%d series, want 2 so that they are scraped once more", n)
	}
	if n := sweep(time.Second); n != 1 {
		t.Errorf("%d series, want the one with a live connection", n)
	}
	rec.Closed(r)
	if n := sweep(time.Second); n != 0 {
		t.Errorf("%d series, want none", n)
	}
	rec.Opened(r) // A late one starts anew, and is not lost.
	if n := len(traffic.series); n != 1 {
		t.Errorf("%d series, want 1", n)
	}
	rec.Closed(r)
}

// TestLiveConnectionsCountWhenScraped: each byte once, however often anybody
// looks; nothing is asked of the pods between scrapes.
func TestLiveConnectionsCountWhenScraped(t *testing.T) {
	pa, pb, _ := golden()
	m, traffic := NewMetrics(""), NewTraffic(nil)
	m.Add(traffic)
	rec, r := traffic.Recorder(), record(pa, pb)
	asked := 0
	traffic.OnScrape(func() {
		asked++
		rec.Progress(r)
	})
	want := func(why string, asks, request, response int) {
		t.Helper()
		lines := encode(t, m)
		if asked != asks || !has(lines, "istio_tcp_received_bytes_total{", fmt.Sprintf("} %d", request)) ||
			!has(lines, "istio_tcp_sent_bytes_total{", fmt.Sprintf("} %d", response)) {
			t.Errorf("%s: asked %d times, want %d, or not %d and %d bytes:\n%s", why, asked, asks, request, response, strings.Join(lines, "\n"))
		}
	}
	rec.Opened(r)
	r.Sent, r.Received = 100, 7
	want("live", 1, 100, 7)
	r.Sent = 150
	want("scraped at once again", 1, 100, 7)
	traffic.refreshed = time.Time{}
	want("a second later", 2, 150, 7)
	r.Received = 8
	rec.Closed(r)
	want("closed", 2, 150, 8)
}

// TestLiveCountSurvivesNewIdentity: the peer has proven another identity than
// was expected; the series of the first must not count as used for ever.
func TestLiveCountSurvivesNewIdentity(t *testing.T) {
	pa, pb, _ := golden()
	traffic := NewTraffic(nil)
	rec, r := traffic.Recorder(), record(pa, pb)
	r.HBONEAddr, r.SrcIdentity, r.DstIdentity = "10.0.0.2:80", pa.Identity, pb.Identity
	rec.Opened(r)
	r.DstIdentity = identity.MustParse("spiffe://cluster.local/ns/default/sa/other")
	rec.Closed(r)
	for l, s := range traffic.series {
		if n := s.live.Load(); n != 0 {
			t.Errorf("%d live connections of %v, want 0", n, l)
		}
	}
}

func TestXDSMetrics(t *testing.T) {
	m := NewMetrics("")
	m.XDS(func() xds.Stats {
		return xds.Stats{
			Connected:    true,
			Terminations: map[string]uint64{"Reconnect": 2, "Error": 0},
			Types:        map[string]xds.TypeStats{"type.googleapis.com/istio.workload.Address": {Messages: 3, Bytes: 400, Known: 5}},
		}
	})
	lines := encode(t, m)
	const url = `{url="type.googleapis.com/istio.workload.Address"}`
	for _, want := range []string{
		`istio_xds_connection_terminations_total{reason="Reconnect"} 2`,
		`istio_xds_message_total` + url + ` 3`,
		`istio_xds_message_bytes_total` + url + ` 400`,
		"# TYPE istio_xds_message counter",
	} {
		if !slices.Contains(lines, want) {
			t.Errorf("no line %s", want)
		}
	}
	if has(lines, `reason="Error"`) {
		t.Error("what never happened is shown")
	}
}

func TestContentType(t *testing.T) {
	const plain, open = "text/plain; charset=utf-8", "application/openmetrics-text;charset=utf-8;version=1.0.0"
	for accept, want := range map[string]string{
		"":                             plain,
		"text/plain":                   plain,
		"*/*":                          plain,
		"application/openmetrics-text": open,
		"Application/OpenMetrics-Text": open,
		"application/openmetrics-text;version=1.0.0,application/vnd.google.protobuf;q=0.5": open,
		"text/plain;q=0.5 ,  application/openmetrics-text ; version=0.0.1;q=0.75":          open,
		"application/openmetrics-textual":                                                  plain,
	} {
		if got := ContentType(accept); got != want {
			t.Errorf("ContentType(%q) = %q, want %q", accept, got, want)
		}
	}
}

func TestRevocationMetrics(t *testing.T) {
	m := NewMetrics("")
	stats := certs.RevocationStats{Rejected: map[string]uint64{"source": 2, "destination": 0}, Lists: 3, Revoked: 40, Expired: 1}
	m.Revocations(func() certs.RevocationStats { return stats })
	lines := encode(t, m)
	for _, want := range []string{
		`istio_crl_policy_rejections_total{reporter="source"} 2`, "ztun_crl_lists 3", "ztun_crl_lists_expired 1", "ztun_crl_entries 40",
	} {
		if !has(lines, want) {
			t.Errorf("no %s among %q", want, lines)
		}
	}
	if has(lines, `reporter="destination"`) {
		t.Error("what never happened is shown")
	}
}
