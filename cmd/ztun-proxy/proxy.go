package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/ztun/ztun/cmd/internal/admin"
	"github.com/ztun/ztun/cmd/internal/config"
	"github.com/ztun/ztun/cmd/internal/owner"
	"github.com/ztun/ztun/cmd/internal/telemetry"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/h2"
	"github.com/ztun/ztun/tunnel/hbone"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds"
	"github.com/ztun/ztun/xds/mesh"
)

// Tasks that have to be done before the proxy is ready.
const (
	taskState = "state manager"
	taskProxy = "proxy"
	taskPods  = "workload proxy manager"
)

// sweepEvery is how often the metrics of deleted workloads are looked for.
const sweepEvery = 30 * time.Second

// A proxy is everything that runs.
type proxy struct {
	cfg   *config.Config
	logs  *telemetry.Logs
	log   *slog.Logger
	ready admin.Readiness

	traffic     *telemetry.Traffic
	engine      *netstack.Engine
	handshakes  *hbone.Handshakes
	store       *mesh.Store
	xds         *xds.Client
	ca          *certs.IstioCA
	revocations *certs.Revocations // Nil: no list was named.
	certs       *certs.Manager
	pods        *pods
	owners      *owner.Client
	agent       *zds.Client

	quit     chan struct{} // Closed by the admin server.
	failed   chan error    // A part that nothing works without has ended.
	quitOnce sync.Once
	services sync.WaitGroup // Control plane, certificates and what follows the mesh.
}

// run is the program, from a valid configuration to the end.
func run(cfg *config.Config) error {
	out := telemetry.NewWriter(os.Stdout)
	defer out.Close()
	logs, err := telemetry.NewLogs(out, telemetry.LogOptions{JSON: cfg.Log.JSON, Filter: cfg.Log.Filter})
	if err != nil {
		return fmt.Errorf("config: RUST_LOG: %w", err)
	}
	p := &proxy{cfg: cfg, logs: logs, log: logs.Logger("app"), quit: make(chan struct{}), failed: make(chan error, cfg.Readers)}
	p.log.Info("version: " + version())
	for _, n := range cfg.Notes {
		p.log.Warn(n)
	}
	p.log.Info("running with config: " + cfg.String())
	if err := p.build(); err != nil {
		return err
	}
	return p.serve(out)
}

// build makes every part; nothing runs yet but the readers, which have nothing
// to read.
func (p *proxy) build() (err error) {
	cfg := p.cfg
	p.ready.Set(taskState, false)
	p.ready.Set(taskProxy, false)
	p.ready.Set(taskPods, false)

	p.traffic = telemetry.NewTraffic(p.logs)
	p.store = mesh.NewStore(meshConfig(cfg))
	if p.xds, err = xds.New(p.xdsConfig()); err != nil {
		return err
	}
	ca := certs.IstioCAConfig{
		Address: cfg.CA.Address, RootCA: cfg.CA.Root.Source(), AltHostname: cfg.CA.AltHostname,
		ClusterID: cfg.Node.ClusterID, Headers: cfg.CA.Pairs(), Impersonate: true,
		TLS12: cfg.TLS12, PQCOnly: cfg.Certs.PostQuantumOnly, Log: p.logs.Logger("identity"),
	}
	switch {
	case cfg.Auth.TokenFile != "":
		ca.Token = certs.TokenFile(cfg.Auth.TokenFile)
	case cfg.Auth.Token != "":
		ca.Token = certs.StaticToken(cfg.Auth.Token)
	}
	if p.ca, err = certs.NewIstioCA(ca); err != nil {
		return err
	}
	if path := cfg.Certs.CRLPath; path != "" {
		p.revocations, err = certs.NewRevocations(certs.RevocationsConfig{Path: path, Log: p.logs.Logger("crl")})
		if err != nil {
			return err
		}
	}
	p.certs = certs.NewManager(certs.Config{
		CA: p.ca, TTL: cfg.Certs.TTL, PQCOnly: cfg.Certs.PostQuantumOnly, Revocations: p.revocations,
		Log: p.logs.Logger("identity"),
	})
	p.handshakes = hbone.NewHandshakes(hbone.HandshakesConfig{})
	p.engine, err = netstack.New(netstack.Config{
		Readers: cfg.Readers, Keepalive: keepalive(cfg.Keepalive), Log: p.logs.Logger("netstack"),
		Failed: func(err error) { p.failed <- err },
	})
	if err != nil {
		return err
	}
	p.owners = owner.NewClient(cfg.OwnerSocket)
	p.pods = p.newPods()
	p.traffic.OnScrape(p.pods.report)
	p.agent = zds.NewClient(zds.ClientConfig{
		Socket:  cfg.AgentSocket,
		Starter: p.pods,
		Yields:  true,
		Ready:   func(ready bool) { p.ready.Set(taskPods, ready) },
		Log:     p.logs.Logger("inpod"),
	})
	return nil
}

// meshConfig leaves the trust domain of workloads that name none alone: istiod
// leaves cluster.local out and names every other. TRUST_DOMAIN is the proxy's own.
func meshConfig(cfg *config.Config) mesh.Config { return mesh.Config{LocalNode: cfg.Node.Name} }

// keepalive is that of every connection, of either leg.
func keepalive(c config.Keepalive) netstack.Keepalive {
	k := netstack.Keepalive{Off: c.Off, Idle: c.Time, Interval: c.Interval, Count: c.Retries}
	if c.UserTimeout {
		k.UserTimeout = c.Time + time.Duration(c.Retries)*c.Interval
	}
	return k
}

func (p *proxy) xdsConfig() xds.Config {
	cfg := p.cfg
	c := xds.Config{
		Address: cfg.XDS.Address, RootCA: cfg.XDS.Root.Source(), AltHostname: cfg.XDS.AltHostname,
		TLS12: cfg.TLS12, PQCOnly: cfg.Certs.PostQuantumOnly,
		ClusterID: cfg.Node.ClusterID, Headers: cfg.XDS.Pairs(),
		Node: xds.Node{
			PodName: cfg.Node.PodName, Namespace: cfg.Node.PodNamespace, IP: cfg.Node.InstanceIP,
			NodeName: cfg.Node.Name, Metadata: cfg.Node.Announced("ztun-" + release), JSON: cfg.Node.MetadataJSON,
		},
		Subscriptions: []xds.Subscription{
			{Type: xds.AddressType, Handler: p.store.Addresses()},
			{Type: xds.AuthorizationType, Handler: p.store.Authorizations()},
		},
		// Where istiod answers there is its CA too.
		Answered: func() { p.certs.Retry() },
		Log:      p.logs.Logger("xds"),
	}
	switch {
	case cfg.Auth.TokenFile != "":
		c.Token = xds.TokenFile(cfg.Auth.TokenFile)
	case cfg.Auth.Token != "":
		c.Token = xds.StaticToken(cfg.Auth.Token)
	}
	return c
}

func (p *proxy) newPods() *pods {
	h := p.cfg.HBONE
	tunnels := h2.Config{
		InitialWindow: min(h.StreamWindow, h2.DefaultInitialWindow), MaxWindow: h.StreamWindow,
		ConnWindow: h.ConnectionWindow, MaxFrameSize: h.FrameSize,
	}
	client := tunnels
	client.MaxStreams = uint32(h.MaxStreams)
	var neighbours *tunnel.Neighbours
	if !h.NoJoin {
		neighbours = tunnel.NewNeighbours()
	}
	return &pods{
		probes: newProber(p.owners, p.cfg.NoProbeFallback, p.logs.Logger("inpod")),
		engine: p.engine, traffic: p.traffic, log: p.logs.Logger("proxy"), policyLog: p.logs.Logger("state"),
		running: map[*pod]struct{}{}, ended: map[string]uint64{},
		config: tunnel.Config{
			Mesh: p.store, Certs: p.certs, Revocations: p.revocations, Handshakes: p.handshakes,
			Neighbours:        neighbours,
			NoResponseBaggage: h.NoBaggage,
			PolicyInfo:        p.cfg.Log.PolicyInfo,
			H2Client:          client, H2Server: tunnels,
			Timeouts: tunnel.Timeouts{Idle: h.PoolIdle},
		},
	}
}

// metrics is everything that is scraped.
func (p *proxy) metrics(out *telemetry.Writer) *telemetry.Metrics {
	m := telemetry.NewMetrics(p.cfg.Node.Metadata["ISTIO_VERSION"])
	m.Add(p.traffic)
	m.XDS(p.xds.Stats)
	if p.revocations != nil {
		m.Revocations(p.revocations.Stats)
	}
	m.Gauge("workload_manager_active_proxy_count",
		"The total number current workloads with active proxies (unstable).",
		func() float64 { return float64(p.agent.Stats().Active) })
	m.Gauge("workload_manager_pending_proxy_count",
		"The total number current workloads with pending proxies (unstable).",
		func() float64 { return float64(p.agent.Stats().Pending) })
	m.Counter("workload_manager_proxies_started_total",
		"The total number of proxies that were started (unstable).", func() uint64 { return p.agent.Stats().Started })
	m.Counter("workload_manager_proxies_stopped_total",
		"The total number of proxies that were stopped (unstable).", func() uint64 { return p.agent.Stats().Stopped })
	m.Gauge("ztun_agent_connected",
		"1 while the node agent is connected. Without it the pods go on, and no new one is served (unstable).", func() float64 {
			if p.agent.Stats().Connected {
				return 1
			}
			return 0
		})
	m.Counter("ztun_agent_connections_total",
		"Connections to the node agent (unstable).", func() uint64 { return p.agent.Stats().Connections })
	m.Counter("ztun_agent_protocol_errors_total",
		"Messages of the node agent that broke the protocol (unstable).", func() uint64 { return p.agent.Stats().ProtocolErrors })
	m.Counters("ztun_probe_questions_total",
		"Connections from the node, by whose the node agent says they are, or what was done without it (unstable).", "answer",
		p.pods.probes.counts)
	m.Counter("ztun_log_lines_dropped_total", "Log lines that found the output too slow (unstable).", out.Dropped)
	if n := p.pods.config.Neighbours; n != nil {
		m.Gauge("ztun_same_node_buffers_bytes",
			"Buffers that streams between pods of this node hold (unstable).", func() float64 { return float64(n.Memory()) })
	}
	m.Counters("ztun_pod_events_total",
		"What happened at the devices and connections of all pods (unstable).", "event", p.pods.counts)
	return m
}

// dump is the config dump.
func (p *proxy) dump(ctx context.Context) (any, error) {
	state := workloadState(ctx, p.agent.Pods(), p.log)
	return admin.NewDump(p.cfg.Dump(), versionDump(p.cfg), p.store.Snapshot().Dump(), p.certs.Dump(), state), nil
}

// followMesh keeps a certificate for every identity of a pod on this node,
// and drops the metrics of workloads that are gone.
func (p *proxy) followMesh(ctx context.Context) {
	watch := p.store.Watch()
	defer watch.Stop()
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	held := map[identity.ID]struct{}{}
	for {
		snapshot := p.store.Snapshot()
		if p.cfg.Node.Name != "" { // Else every workload of the mesh counts as local.
			held = p.prefetch(snapshot, held)
		}
		select {
		case <-watch.C:
		case now := <-sweep.C:
			p.traffic.Sweep(now, func(uid string) bool { return p.store.Snapshot().Workload(uid) != nil })
		case <-ctx.Done():
			return
		}
	}
}

func (p *proxy) prefetch(s *mesh.Snapshot, held map[identity.ID]struct{}) map[identity.ID]struct{} {
	wanted := map[identity.ID]struct{}{}
	for _, id := range s.LocalIdentities() {
		wanted[id] = struct{}{}
		if _, ok := held[id]; !ok {
			p.certs.Prefetch(id)
		}
	}
	for id := range held {
		if _, ok := wanted[id]; !ok {
			p.certs.Forget(id)
		}
	}
	return wanted
}
