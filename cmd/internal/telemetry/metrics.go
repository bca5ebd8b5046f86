package telemetry

import (
	"fmt"
	"io"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/xds"
)

// Metrics is everything that is scraped from a proxy.
type Metrics struct {
	registry *prometheus.Registry
}

// NewMetrics has the metrics of the process itself. tag is the version of
// Istio that the proxy was installed with; "": unknown.
func NewMetrics(tag string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	if tag == "" {
		tag = unknown
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "istio_build", Help: "Istio component build info.",
		ConstLabels: prometheus.Labels{"component": "ztunnel", "tag": cleanLabel(tag)},
	})
	build.Set(1)
	m.registry.MustRegister(build, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Add adds a collector. Adding one twice is a mistake of the program's and
// panics.
func (m *Metrics) Add(c prometheus.Collector) { m.registry.MustRegister(c) }

// Gauge adds a gauge that is read when it is scraped.
func (m *Metrics) Gauge(name, help string, read func() float64) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read))
}

// Counter adds a counter that is read when it is scraped. Its name ends in
// _total.
func (m *Metrics) Counter(name, help string, read func() uint64) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help},
		func() float64 { return float64(read()) }))
}

// Counters adds a family of counters that differ in one label and are read when
// they are scraped. Those that are zero are not shown.
func (m *Metrics) Counters(name, help, label string, read func() map[string]uint64) {
	m.registry.MustRegister(&counters{prometheus.NewDesc(name, help, []string{label}, nil), read})
}

type counters struct {
	desc *prometheus.Desc
	read func() map[string]uint64
}

// Describe implements prometheus.Collector.
func (c *counters) Describe(out chan<- *prometheus.Desc) { out <- c.desc }

// Collect implements prometheus.Collector.
func (c *counters) Collect(out chan<- prometheus.Metric) {
	for value, n := range c.read() {
		if n > 0 {
			out <- prometheus.MustNewConstMetric(c.desc, prometheus.CounterValue, float64(n), value)
		}
	}
}

// Revocations adds the metrics of revocation lists.
func (m *Metrics) Revocations(read func() certs.RevocationStats) {
	m.Counters("istio_crl_policy_rejections_total",
		"The total number of peers refused or cut since their certificates are revoked (unstable).", "reporter",
		func() map[string]uint64 { return read().Rejected })
	m.Gauge("ztun_crl_lists", "Revocation lists in force (unstable).", func() float64 { return float64(read().Lists) })
	m.Gauge("ztun_crl_lists_expired", "Revocation lists in force that have expired (unstable).",
		func() float64 { return float64(read().Expired) })
	m.Gauge("ztun_crl_entries", "Certificates that are revoked (unstable).", func() float64 { return float64(read().Revoked) })
}

// XDS adds the metrics of the control plane's client.
func (m *Metrics) XDS(read func() xds.Stats) { m.registry.MustRegister(xdsCollector(read)) }

type xdsCollector func() xds.Stats

var (
	xdsTerminations = prometheus.NewDesc("istio_xds_connection_terminations_total",
		"The total number of terminated xds connections (unstable).", []string{"reason"}, nil)
	xdsMessages = prometheus.NewDesc("istio_xds_message_total",
		"The total number of messages received (unstable).", []string{"url"}, nil)
	xdsBytes = prometheus.NewDesc("istio_xds_message_bytes_total",
		"The total number of bytes received (unstable).", []string{"url"}, nil)
	xdsConnected = prometheus.NewDesc("ztun_xds_connected",
		"Whether a stream to the control plane is open (unstable).", nil, nil)
	xdsRejected = prometheus.NewDesc("ztun_xds_rejected_total",
		"Resources that could not be used (unstable).", []string{"url"}, nil)
	xdsKnown = prometheus.NewDesc("ztun_xds_resources",
		"Resources that are held (unstable).", []string{"url"}, nil)
)

// Describe implements prometheus.Collector.
func (xdsCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{xdsTerminations, xdsMessages, xdsBytes, xdsConnected, xdsRejected, xdsKnown} {
		out <- d
	}
}

// Collect implements prometheus.Collector. What never happened is not shown.
func (read xdsCollector) Collect(out chan<- prometheus.Metric) {
	s := read()
	counter := func(d *prometheus.Desc, v uint64, label string) {
		if v > 0 {
			out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), label)
		}
	}
	for reason, n := range s.Terminations {
		counter(xdsTerminations, n, reason)
	}
	for url, t := range s.Types {
		counter(xdsMessages, t.Messages, url)
		counter(xdsBytes, t.Bytes, url)
		counter(xdsRejected, t.Rejected, url)
		out <- prometheus.MustNewConstMetric(xdsKnown, prometheus.GaugeValue, float64(t.Known), url)
	}
	connected := 0.0
	if s.Connected {
		connected = 1
	}
	out <- prometheus.MustNewConstMetric(xdsConnected, prometheus.GaugeValue, connected)
}

// Encode writes all metrics in the OpenMetrics text format. ztunnel writes the
// same whatever the scraper asks for, and only calls it by another name.
func (m *Metrics) Encode(w io.Writer) error {
	families, err := m.registry.Gather()
	if err != nil && len(families) == 0 {
		return fmt.Errorf("telemetry: gather metrics: %w", err)
	}
	enc := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeOpenMetrics))
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return fmt.Errorf("telemetry: encode %s: %w", f.GetName(), err)
		}
	}
	if closer, ok := enc.(expfmt.Closer); ok {
		if err := closer.Close(); err != nil {
			return fmt.Errorf("telemetry: encode metrics: %w", err)
		}
	}
	return nil
}

// ContentType is what to call the output of Encode to a scraper that accepts
// what its Accept header says.
func ContentType(accept string) string {
	for _, entry := range strings.Split(accept, ",") {
		media, _, _ := strings.Cut(entry, ";")
		if strings.EqualFold(strings.TrimSpace(media), "application/openmetrics-text") {
			return "application/openmetrics-text;charset=utf-8;version=1.0.0"
		}
	}
	return "text/plain; charset=utf-8"
}
