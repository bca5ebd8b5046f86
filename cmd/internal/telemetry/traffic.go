package telemetry

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
)

const (
	// maxSeries bounds how many sets of labels there are. Beyond it the other
	// side of a connection is counted as unknown.
	maxSeries = 20_000
	// maxCached bounds what a Recorder remembers, in pairs of workloads.
	maxCached = 1024
	// keepDeleted is how long the series of a deleted workload stay, so that
	// they are scraped once more.
	keepDeleted = 5 * time.Minute
	// refreshEvery is how often scrapes can ask the pods.
	refreshEvery = time.Second
)

// Traffic counts the connections of all pods and writes the access log. It is
// a prometheus.Collector.
type Traffic struct {
	logs *Logs
	// refresh makes the pods report what live connections have moved. Nil: nobody does.
	refresh   func()
	open      [2]atomic.Int64 // By tunnel.Direction.
	overflows atomic.Uint64   // Connections whose other side is not told.

	// mu guards the fields below.
	mu     sync.Mutex
	series map[labels]*series

	// refreshing guards the fields below.
	refreshing sync.Mutex
	refreshed  time.Time
}

// series are the counters of one set of labels, the flag included.
type series struct {
	opened, closed, failed atomic.Uint64
	request, response      atomic.Uint64 // Bytes.
	live                   atomic.Int64  // Opened, not closed; only for flag "-".
	dead                   atomic.Bool   // No longer shown; do not use.

	src, dst string // UIDs of the workloads; "": unknown.

	// Guarded by the Traffic's mu.
	goneSince time.Time
}

// NewTraffic counts nothing yet. Its access log goes to logs; nil: nowhere.
func NewTraffic(logs *Logs) *Traffic {
	return &Traffic{logs: logs, series: map[labels]*series{}}
}

// OnScrape makes every scrape call refresh first, which calls Pod.Report; not
// more often than once a second, since it costs the pods' loops and anybody may
// scrape. Call it before the first scrape.
func (t *Traffic) OnScrape(refresh func()) { t.refresh = refresh }

func (t *Traffic) refreshNow() {
	if t.refresh == nil {
		return
	}
	t.refreshing.Lock()
	defer t.refreshing.Unlock()
	if time.Since(t.refreshed) >= refreshEvery {
		t.refresh()
		t.refreshed = time.Now()
	}
}

// seriesFor finds or makes the counters of l, which never fails.
func (t *Traffic) seriesFor(l labels, src, dst *mesh.Workload) *series {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s, ok := t.series[l]; ok {
		return s
	}
	if len(t.series) >= maxSeries {
		t.overflows.Add(1)
		if l[labelReporter] == "source" {
			dst = nil
		} else {
			src = nil
		}
		l = l.anonymous()
		if s, ok := t.series[l]; ok {
			return s
		}
	}
	s := &series{}
	if src != nil {
		s.src = src.UID
	}
	if dst != nil {
		s.dst = dst.UID
	}
	t.series[l] = s
	return s
}

// Sweep drops the series of workloads that exists says are gone, a while after
// they have gone and once no connection uses them.
func (t *Traffic) Sweep(now time.Time, exists func(uid string) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for l, s := range t.series {
		gone := s.src != "" && !exists(s.src) || s.dst != "" && !exists(s.dst)
		switch {
		case !gone:
			s.goneSince = time.Time{}
		case s.goneSince.IsZero():
			s.goneSince = now
		case now.Sub(s.goneSince) >= keepDeleted && s.live.Load() == 0:
			s.dead.Store(true)
			delete(t.series, l)
		}
	}
}

// Recorder returns the Recorder of one pod.
func (t *Traffic) Recorder() *Recorder {
	return &Recorder{traffic: t, cache: map[cacheKey]*cached{}}
}

// A Recorder counts and logs one pod's connections. It belongs to the pod's
// loop.
type Recorder struct {
	traffic *Traffic
	cache   map[cacheKey]*cached
}

var (
	_ tunnel.Recorder   = (*Recorder)(nil)
	_ tunnel.Progresser = (*Recorder)(nil)
)

// cacheKey is all that the labels of a connection depend on.
type cacheKey struct {
	direction tunnel.Direction
	tls       bool
	src, dst  *mesh.Workload
	service   *mesh.Service
	srcID     identity.ID
	dstID     identity.ID
	baggage   hbone.Baggage
}

// cached are the series of one key, by flag.
type cached struct {
	labels labels
	plain  *series // Flag "-".
	flags  []flagged
}

type flagged struct {
	flag   string
	series *series
}

// Opened implements tunnel.Recorder.
func (r *Recorder) Opened(rec *tunnel.Record) {
	s := r.lookup(rec).plain
	s.opened.Add(1)
	s.live.Add(1)
	rec.Slot = s
	r.traffic.open[rec.Direction].Add(1)
	if l := r.traffic.logs; l != nil {
		l.logAccess(slog.LevelDebug, "connection opened", rec, false)
	}
}

// Progress implements tunnel.Progresser.
func (r *Recorder) Progress(rec *tunnel.Record) {
	if request, response := rec.Untold(); request|response != 0 {
		r.lookup(rec).plain.moved(request, response)
	}
}

func (s *series) moved(request, response uint64) {
	s.request.Add(request)
	s.response.Add(response)
}

// Closed implements tunnel.Recorder.
func (r *Recorder) Closed(rec *tunnel.Record) {
	c := r.lookup(rec)
	c.plain.moved(rec.Untold())
	// Not c's: the labels may have changed with the identity that the peer proved.
	if opened, ok := rec.Slot.(*series); ok {
		opened.live.Add(-1)
	}
	s, flag := c.plain, rec.Reason.Flag()
	if flag != "-" {
		s = r.flag(c, rec, flag)
		s.failed.Add(1)
	}
	s.closed.Add(1)
	r.traffic.open[rec.Direction].Add(-1)
	if l := r.traffic.logs; l != nil {
		level := slog.LevelInfo
		if rec.Reason != tunnel.OK {
			level = slog.LevelError
		}
		l.logAccess(level, "connection complete", rec, true)
	}
}

// Failed implements tunnel.Recorder.
func (r *Recorder) Failed(rec *tunnel.Record) {
	if l := r.traffic.logs; l != nil {
		l.logEarly(rec)
	}
}

func (r *Recorder) lookup(rec *tunnel.Record) *cached {
	key := cacheKey{
		direction: rec.Direction, tls: rec.MutualTLS(),
		src: rec.SrcWorkload, dst: rec.DstWorkload, service: rec.Service,
		srcID: rec.SrcIdentity, dstID: rec.DstIdentity,
		baggage: baggageOf(rec),
	}
	if c, ok := r.cache[key]; ok && !c.plain.dead.Load() {
		return c
	}
	if len(r.cache) >= maxCached {
		clear(r.cache)
	}
	c := &cached{labels: labelsOf(rec)}
	c.plain = r.traffic.seriesFor(c.labels.with("-"), rec.SrcWorkload, rec.DstWorkload)
	r.cache[key] = c
	return c
}

// flag returns the series of c's labels with another flag. There are few.
func (r *Recorder) flag(c *cached, rec *tunnel.Record, flag string) *series {
	for i, f := range c.flags {
		if f.flag == flag {
			if !f.series.dead.Load() {
				return f.series
			}
			c.flags = append(c.flags[:i], c.flags[i+1:]...)
			break
		}
	}
	s := r.traffic.seriesFor(c.labels.with(flag), rec.SrcWorkload, rec.DstWorkload)
	c.flags = append(c.flags, flagged{flag, s})
	return s
}

func (l labels) with(flag string) labels {
	l[labelFlags] = flag
	return l
}

// Describe implements prometheus.Collector. It says nothing: some sets have
// four labels more than others.
func (t *Traffic) Describe(chan<- *prometheus.Desc) {}

// trafficFamilies are the five counters and how a series has their value.
var trafficFamilies = []struct {
	full, short *prometheus.Desc
	value       func(*series) (value uint64, shown bool)
}{
	family("istio_tcp_connections_opened_total", "The total number of TCP connections opened.",
		func(s *series) (uint64, bool) { v := s.opened.Load(); return v, v > 0 }),
	family("istio_tcp_connections_closed_total", "The total number of TCP connections closed.",
		func(s *series) (uint64, bool) { v := s.closed.Load(); return v, v > 0 }),
	family("istio_tcp_received_bytes_total", "The size of total bytes received during request in case of a TCP connection.",
		func(s *series) (uint64, bool) { return s.request.Load(), s.opened.Load() > 0 }),
	family("istio_tcp_sent_bytes_total", "The size of total bytes sent during response in case of a TCP connection.",
		func(s *series) (uint64, bool) { return s.response.Load(), s.opened.Load() > 0 }),
	family("istio_tcp_connections_failed_total", "The total number of TCP connections that failed to establish (unstable).",
		func(s *series) (uint64, bool) { v := s.failed.Load(); return v, v > 0 }),
}

func family(name, help string, value func(*series) (uint64, bool)) (f struct {
	full, short *prometheus.Desc
	value       func(*series) (uint64, bool)
}) {
	f.full = prometheus.NewDesc(name, help, trafficLabels[:], nil)
	f.short = prometheus.NewDesc(name, help, trafficLabels[:labelRegions], nil)
	f.value = value
	return f
}

var (
	socketsDesc = prometheus.NewDesc("istio_tcp_sockets_open",
		"The current number of open TCP sockets (unstable).", []string{"reporter"}, nil)
	seriesDesc = prometheus.NewDesc("ztun_traffic_series",
		"The number of label sets of the traffic metrics (unstable).", nil, nil)
	overflowDesc = prometheus.NewDesc("ztun_traffic_series_overflows_total",
		"Label sets whose other side is counted as unknown, since there are too many (unstable).", nil, nil)
)

// Collect implements prometheus.Collector.
func (t *Traffic) Collect(out chan<- prometheus.Metric) {
	t.refreshNow()
	t.mu.Lock()
	all := make(map[labels]*series, len(t.series))
	for l, s := range t.series {
		all[l] = s
	}
	t.mu.Unlock()
	for l, s := range all {
		for i := range trafficFamilies {
			f := &trafficFamilies[i]
			v, shown := f.value(s)
			if !shown {
				continue
			}
			desc, values := f.full, l[:]
			if l[labelRegions] == "" {
				desc, values = f.short, l[:labelRegions]
			}
			out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v), values...)
		}
	}
	for d, name := range []string{tunnel.Outbound: "source", tunnel.Inbound: "destination"} {
		if v := t.open[d].Load(); v != 0 || len(all) > 0 {
			out <- prometheus.MustNewConstMetric(socketsDesc, prometheus.GaugeValue, float64(v), name)
		}
	}
	out <- prometheus.MustNewConstMetric(seriesDesc, prometheus.GaugeValue, float64(len(all)))
	if v := t.overflows.Load(); v > 0 {
		out <- prometheus.MustNewConstMetric(overflowDesc, prometheus.CounterValue, float64(v))
	}
}
