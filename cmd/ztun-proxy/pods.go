package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ztun/ztun/cmd/internal/admin"
	"github.com/ztun/ztun/cmd/internal/telemetry"
	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/netstack"
	"github.com/ztun/ztun/tun"
	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/splice"
)

// pods turns what the agent says into stacks and tunnels. It is a zds.Starter.
type pods struct {
	engine  *netstack.Engine
	traffic *telemetry.Traffic
	log     *slog.Logger
	// policyLog takes the decisions of policies.
	policyLog *slog.Logger
	// probes asks which connections are the kubelet's. Nil: none is.
	probes *prober
	// config is what all pods have in common.
	config tunnel.Config

	// mu guards the fields below.
	mu      sync.Mutex
	running map[*pod]struct{}
	ended   map[string]uint64 // What the pods that stopped have counted.
}

// pod serves one pod.
type pod struct {
	owner  *pods
	name   string
	tunnel *tunnel.Pod
	stack  *netstack.Stack
}

var (
	_ zds.Starter = (*pods)(nil)
	_ zds.Yielder = (*pod)(nil)
	_ zds.Updater = (*pod)(nil)
)

// Start implements zds.Starter.
func (p *pods) Start(w zds.Workload, files zds.Files) (zds.Proxy, error) {
	if w.Device == nil {
		files.Close()
		return nil, errors.New("the agent sent no description of a device: it is not ztun's")
	}
	d := w.Device
	dev, err := tun.New(files.Device, tun.Options{MTU: d.MTU, Offload: d.Offload})
	if err != nil {
		files.Close()
		return nil, err
	}
	name := w.Namespace + "/" + w.Name
	log := p.log.With("wl", name)
	s := &pod{owner: p, name: name}
	stackCfg := stackConfig(name, d, log)
	stackCfg.IsProbe = p.probes.forPod(w.UID, d)
	stackCfg.ICMP, stackCfg.Predecessor, stackCfg.PortPart = files.ICMP, files.Predecessor, d.PortPart
	stackCfg.Resumed = s.resume
	s.stack, err = p.engine.Add(dev, stackCfg, func(stack *netstack.Stack) (netstack.Handler, error) {
		cfg := p.config
		cfg.Workload = tunnel.Workload{Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
		cfg.Addrs, cfg.Stack, cfg.Recorder, cfg.Log = d.Addresses, stack, p.traffic.Recorder(), log
		cfg.PolicyLog = p.policyLog.With("wl", name)
		var err error
		s.tunnel, err = tunnel.NewPod(cfg)
		if err != nil {
			return nil, err
		}
		return handler{s.tunnel}, nil
	})
	if err != nil {
		if s.tunnel != nil {
			s.tunnel.Close()
		}
		files.Close() // Its device is dev.
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running[s] = struct{}{}
	return s, nil
}

// Update implements zds.Updater.
func (s *pod) Update(w zds.Workload) error {
	d := w.Device
	err := s.stack.Update(netstack.Update{
		Addrs: d.Addresses, BypassInbound: d.BypassInbound, VirtualInterfaces: d.VirtualInterfaces,
		IsProbe: s.owner.probes.forPod(w.UID, d),
	})
	if err == nil {
		s.tunnel.SetAddrs(d.Addresses)
	}
	return err
}

// counts are what the stacks and tunnels of all pods have counted, those that
// stopped included: a counter never goes down.
func (p *pods) counts() map[string]uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	sum := maps.Clone(p.ended)
	for s := range p.running {
		s.count(sum)
	}
	return sum
}

// reportTimeout bounds how long a scrape waits for the loops.
const reportTimeout = time.Second

// report makes every pod tell how far its connections are.
func (p *pods) report() {
	ctx, cancel := context.WithTimeout(context.Background(), reportTimeout)
	defer cancel()
	p.mu.Lock()
	served := slices.Collect(maps.Keys(p.running))
	p.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range served {
		// What is late comes with the next scrape.
		wg.Go(func() { _ = s.tunnel.Report(ctx) })
	}
	wg.Wait()
}

// count adds to sum what happened at the pod that somebody may want to know.
func (s *pod) count(sum map[string]uint64) {
	stack := s.stack.Stats()
	pod, pool, peers := s.tunnel.Stats()
	for event, n := range map[string]uint64{
		"bad_header": stack.BadHeader, "malformed": stack.Malformed, "not_tcp": stack.NotTCP,
		"foreign_source": stack.ForeignSource, "bad_checksum": stack.BadChecksum, "drained": stack.Drained,
		"forwarded": stack.Forwarded, "stray": stack.Stray, "write_failed": stack.WriteFailed,
		"limit_connections": stack.LimitConnections + pod.Limited.Load(), "limit_pending": stack.LimitPending,
		"expired": stack.Expired, "cut": pod.Cut.Load(), "icmp_error": stack.ICMP,
		"limit_tunnels": pool.Limited.Load() + peers.Limited.Load(), "handshake_failed": peers.HandshakeFails.Load(),
		"same_node": pod.SameNode.Load(), "handed_on": stack.HandedOn, "hand_on_failed": stack.HandOnFailed,
	} {
		sum[event] += n
	}
}

func stackConfig(name string, d *zds.Device, log *slog.Logger) netstack.StackConfig {
	cfg := netstack.StackConfig{
		Name:              name,
		Addrs:             d.Addresses,
		Families:          d.NodeAddresses, // A pod has what its node has, if not at once.
		BypassInbound:     d.BypassInbound,
		VirtualInterfaces: d.VirtualInterfaces,
		// CaptureDNS stays off until something answers: captured queries go on
		// to the server that the app asked.
		Gone: func(err error) {
			log.Warn("pod's device is gone; the agent makes another", "error", err)
		},
	}
	for _, f := range d.OlderFlows {
		cfg.Older = append(cfg.Older, netstack.Tuple{Local: f.Local, Remote: f.Remote})
	}
	return cfg
}

// drained is a context for who does not want to wait.
var drained = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// Yield implements zds.Yielder. Peers are asked to open new connections, which
// are the successor's.
func (s *pod) Yield(packets *os.File) error {
	s.stack.Hold()
	_ = s.tunnel.Drain(drained) // Begins it.
	err := s.stack.Yield(packets)
	if errors.Is(err, netstack.ErrClosed) { // Nobody reads here any more.
		_ = packets.Close()
		return nil
	}
	if err != nil {
		s.stack.Loop().Post(s.resume)
	}
	return err
}

// resume runs on the loop when the device is read again that was yielded. New
// connections are taken also by a process that is about to end: nobody else does.
func (s *pod) resume() {
	s.tunnel.Resume()
	s.stack.Loop().Post(s.stack.Accept) // After that.
}

// Predecessor implements zds.Yielder.
func (s *pod) Predecessor() *os.File { return s.stack.Predecessor() }

// Lend implements zds.Yielder.
func (s *pod) Lend() (f zds.Files, yielded bool, err error) {
	f.Device, f.ICMP, yielded, err = s.stack.Lend()
	return f, yielded, err
}

// Stop implements zds.Proxy. Connections are reset.
func (s *pod) Stop() {
	s.tunnel.Close()
	s.stack.Close()
	p := s.owner
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.running[s]; ok {
		delete(p.running, s)
		s.count(p.ended)
	}
}

// handler is a pod's netstack.Handler.
type handler struct{ *tunnel.Pod }

func (h handler) HandleTCP(r *netstack.Request) { h.Pod.HandleTCP(r) }

func (h handler) HandleTunnel(end splice.End, remote, local netip.AddrPort) {
	h.Pod.HandleTunnel(end, remote, local)
}

func (h handler) HandleUDP(d *netstack.Datagram) { d.Forward() }

// dumpTimeout bounds how long the loops may take to list connections.
const dumpTimeout = 5 * time.Second

// workloadState is the config dump's view of the pods. A pod whose loop does
// not answer is shown without connections: that is when somebody needs the dump.
func workloadState(ctx context.Context, list []zds.PodStatus, log *slog.Logger) map[string]admin.WorkloadState {
	ctx, cancel := context.WithTimeout(ctx, dumpTimeout)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := make(map[string]admin.WorkloadState, len(list))
	for _, st := range list {
		w := st.Workload
		ws := admin.WorkloadState{
			State: "Pending",
			Info:  admin.WorkloadInfo{Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount},
		}
		wg.Go(func() {
			if s, ok := st.Proxy.(*pod); ok {
				live, err := s.tunnel.Connections(ctx)
				if errors.Is(err, tunnel.ErrClosed) {
					return
				}
				ws.State = "Up"
				if err == nil {
					ws.Connections = admin.DumpConnections(live)
				} else {
					log.Warn("config dump without the pod's connections", "wl", s.name, "error", err)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			out[w.UID] = ws
		})
	}
	wg.Wait()
	return out
}
