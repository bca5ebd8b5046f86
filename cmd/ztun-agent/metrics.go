package main

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/ztun/ztun/cmd/internal/agent"
)

// metrics has the names of Istio's node agent, and our own beginning with
// ztun_.
func (n *node) metrics() http.Handler {
	r := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "istio_build", Help: "Istio component build info",
		ConstLabels: prometheus.Labels{"component": "cni", "tag": release}})
	build.Set(1)
	r.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gauge := func(name, help string, read func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read))
	}
	family := func(kind prometheus.ValueType, name, help, label string, read func() map[string]uint64) {
		r.MustRegister(&labelled{prometheus.NewDesc(name, help, []string{label}, nil), kind, read})
	}
	family(prometheus.CounterValue, "istio_cni_installs_total", "Total number of CNI plugins installed by the Istio CNI installer", "result", n.installer.Counts)
	gauge("istio_cni_install_ready", "Whether the CNI plugin installation is ready or not", func() float64 {
		if n.installer.Ready() {
			return 1
		}
		return 0
	})
	gauge("ztunnel_connected", "number of connections to ztunnel", func() float64 { return float64(n.agent.Proxies()) })
	family(prometheus.CounterValue, "nodeagent_reconcile_events_total", "The total number of node agent reconcile events", "type", n.enrol.Events)
	family(prometheus.CounterValue, "istio_cni_plugin_requests_total", "The total number of requests of the CNI plugin", "response_code", n.events.Counts)
	family(prometheus.GaugeValue, "ztun_agent_pods", "Pods by how far they have come.", "phase", n.phases)
	family(prometheus.CounterValue, "ztun_agent_probe_answers_total", "Proxies' questions whose a connection is, by the answer.", "owner",
		func() map[string]uint64 { return n.asked.Stats().Answers })
	family(prometheus.CounterValue, "ztun_agent_standin_total", "What the agent did with devices that no proxy reads.", "event", func() map[string]uint64 {
		s := n.standin.Stats()
		return map[string]uint64{"asked": s.Asked, "probes": s.Probes, "packets_forwarded": s.Forwarded, "packets_dropped": s.Dropped}
	})
	gauge("ztun_agent_standin_devices", "Devices that the agent reads because no proxy does.", func() float64 { return float64(n.standin.Stats().Devices) })
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4, EnableOpenMetrics: true})
}

// phases counts pods; each phase is there, also without a pod.
func (n *node) phases() map[string]uint64 {
	counts := map[string]uint64{}
	for _, p := range []agent.Phase{agent.Attaching, agent.Attached, agent.Served, agent.Detaching} {
		counts[string(p)] = 0
	}
	for _, s := range n.agent.Status() {
		counts[string(s.Phase)]++
	}
	return counts
}

// labelled is a family that differs in one label and is read when it is
// scraped.
type labelled struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func() map[string]uint64
}

// Describe implements prometheus.Collector.
func (l *labelled) Describe(out chan<- *prometheus.Desc) { out <- l.desc }

// Collect implements prometheus.Collector.
func (l *labelled) Collect(out chan<- prometheus.Metric) {
	for value, v := range l.read() {
		out <- prometheus.MustNewConstMetric(l.desc, l.kind, float64(v), value)
	}
}
