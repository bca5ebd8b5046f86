package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/cni"
	"github.com/ztun/ztun/cmd/internal/cni/wire"
	"github.com/ztun/ztun/cmd/internal/config"
	"github.com/ztun/ztun/cmd/internal/enrol"
	"github.com/ztun/ztun/cmd/internal/enrol/marks"
	"github.com/ztun/ztun/cmd/internal/owner"
	"github.com/ztun/ztun/cmd/internal/procs"
	"github.com/ztun/ztun/cmd/internal/socket"
	"github.com/ztun/ztun/cmd/internal/standin"
)

const (
	// tunNode is where TUN devices are made.
	tunNode = "/dev/net/tun"
	// nodeEvery is how often the node's addresses are looked at.
	nodeEvery = 5 * time.Second
)

// A node is everything that runs.
type node struct {
	cfg    *config.Agent
	log    *slog.Logger
	health *health

	// Set by build.
	host      *os.File     // The host's network namespace.
	addrs     []netip.Addr // The node's own. Owned by followNode once it runs.
	client    kubernetes.Interface
	owners    *procs.Owners
	standin   *standin.Standin
	agent     *agent.Agent
	asked     *owner.Server
	askSocket *net.UnixListener
	enrol     *enrol.Controller
	events    *cni.Server
	installer *cni.Installer

	wg    sync.WaitGroup
	fail  context.CancelCauseFunc // Ends the program: a part of it ended.
	ended context.Context
}

// run is the program, from a valid configuration until stop ends.
func run(stop context.Context, cfg *config.Agent, log *slog.Logger) error {
	n := &node{cfg: cfg, log: log, health: new(health)}
	log.Info("ztun-agent", "version", release, "node", cfg.NodeName)
	for _, note := range cfg.Notes {
		log.Warn(note)
	}
	n.ended, n.fail = context.WithCancelCause(context.Background())
	defer n.fail(nil)

	web, stopWeb := context.WithCancel(context.Background())
	waitWeb, err := n.listen(web)
	if err != nil {
		stopWeb()
		return err
	}
	defer waitWeb()
	defer stopWeb()
	defer n.close()
	if err := n.build(); err != nil {
		return err
	}
	n.health.setMetrics(n.metrics())
	return n.serve(stop)
}

// build makes every part, and opens the proxies' sockets. Nothing runs yet.
func (n *node) build() (err error) {
	cfg := n.cfg
	if n.host, err = needs(cfg, tunNode); err != nil {
		return err
	}
	selectors, err := marks.ParseSelectors(cfg.Selectors)
	if err != nil {
		return fmt.Errorf("config: AMBIENT_ENABLEMENT_SELECTOR: %w", err)
	}
	if n.client, err = enrol.NewClient(cfg.Kubeconfig, "ztun-agent"); err != nil {
		return err
	}
	for _, dir := range []string{cfg.RunDir, filepath.Dir(cfg.Socket)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("run directory: %w", err)
		}
	}
	if n.owners, err = procs.NewOwners(n.host, cfg.Host.Path("/proc")); err != nil {
		return err
	}
	if n.addrs, err = nodeAddresses(n.host); err != nil {
		return err
	}
	n.standin = standin.New(n.isProbe, n.log)
	n.agent, err = agent.New(agent.Config{
		StateDir: cfg.StateDir, Socket: cfg.Socket, SocketUID: cfg.ProxyUID, SocketGID: cfg.ProxyGID,
		NodeAddresses: n.addrs, Standin: n.standin, Log: n.log,
	})
	if err != nil {
		return err
	}
	n.askSocket, err = socket.Listen("unixpacket", n.questions(), cfg.ProxyUID, cfg.ProxyGID)
	if err != nil {
		return err
	}
	n.asked = owner.NewServer(owner.ServerConfig{Of: n.owners.Of, Addresses: n.agent.Addresses, UID: cfg.ProxyUID, Log: n.log})
	n.enrol, err = enrol.New(enrol.Config{
		Client: n.client, Agent: n.agent, Finder: &procs.Finder{Proc: cfg.Host.Path("/proc"), Host: n.host},
		NodeName: cfg.NodeName, SystemNamespace: cfg.SystemNamespace, Selectors: selectors, ExcludeNamespaces: cfg.ExcludeNamespaces,
		DNSCapture: cfg.DNSCapture, HostRoot: cfg.Host.Root(), NetnsDir: cfg.Host.Path("/var/run/netns"), HostNetnsDir: cfg.Host.NetnsDir, Log: n.log,
	})
	if err != nil {
		return err
	}
	n.events = cni.NewServer(filepath.Join(cfg.RunDir, wire.SocketName), n.enrol, n.log)
	n.installer, err = cni.NewInstaller(cni.Config{
		Binary: cfg.Install.Binary, BinDir: cfg.Install.BinDir, NetDir: cfg.Install.NetDir, ConfName: cfg.Install.ConfName,
		Unchained: cfg.Install.Unchained, Owned: cfg.Install.Owned, OwnedName: cfg.Install.OwnedName, GroupRead: cfg.Install.GroupRead,
		Entry: wire.Conf{RunDir: cfg.RunDir, PodNamespace: cfg.PodNamespace, ExcludeNamespaces: cfg.ExcludeNamespaces},
		Log:   n.log,
	})
	return err
}

// questions is the path of the socket on which proxies ask.
func (n *node) questions() string { return filepath.Join(filepath.Dir(n.cfg.Socket), owner.SocketName) }

// isProbe says whether a connection that a node's address opens is a kubelet's.
func (n *node) isProbe(src, dst netip.AddrPort) bool {
	o, err := n.owners.Of(src, dst)
	if err != nil {
		n.log.Debug("asking whose a connection is", "error", err)
	}
	return err == nil && o.MayProbe()
}

// followNode tells of the node's addresses as they come and go: a bridge comes
// with the first pod, a tunnel when the CNI likes.
func (n *node) followNode(ctx context.Context) error {
	tick := time.NewTicker(nodeEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		addrs, err := nodeAddresses(n.host)
		if err != nil {
			n.log.Warn("the node's addresses are those of before", "error", err)
			continue
		}
		if !slices.Equal(addrs, n.addrs) {
			n.log.Info("the node has other addresses", "addresses", addrs)
			n.addrs = addrs
			n.agent.SetNodeAddresses(addrs)
		}
	}
}

// serve runs what build made, until stop ends or a part does.
func (n *node) serve(stop context.Context) error {
	// Installing ends first, then Kubernetes, then what proxies and pods need.
	install, stopInstall := context.WithCancel(context.Background())
	kube, stopKube := context.WithCancel(context.Background())
	rest, stopRest := context.WithCancel(context.Background())
	defer n.wg.Wait()
	defer stopRest()
	defer stopKube()
	defer stopInstall()
	installed, decided := make(chan struct{}), make(chan struct{})

	n.start(rest, "plugin's requests", n.events.Run)
	go func() { defer close(decided); n.part(kube, "pods of this node", n.enrol.Run) }()
	granted := false
	select {
	case <-n.enrol.Synced():
		granted = n.mayAsk(stop)
	case <-stop.Done():
	case <-n.ended.Done():
	}
	if stop.Err() == nil && n.ended.Err() == nil {
		n.log.Info("this node's pods are known; proxies are served", "pods", len(n.agent.Status()))
		n.start(rest, "proxies", n.agent.Run)
		n.start(rest, "node's addresses", n.followNode)
		n.start(rest, "proxies' questions", func(ctx context.Context) error { return n.asked.Serve(ctx, n.askSocket) })
		n.health.set(n.installer.Ready, n.installer.Err)
		go func() { defer close(installed); n.part(install, "plugin", n.installer.Run) }()
	} else {
		close(installed)
	}
	select {
	case <-stop.Done():
	case <-n.ended.Done():
	}
	var err error
	if err = context.Cause(n.ended); err == nil {
		n.log.Info("told to stop")
	}
	n.health.set(nil, nil)
	stopInstall()
	<-installed
	if err == nil {
		n.leave(granted, func() { stopKube(); <-decided })
	}
	stopKube()
	<-decided
	return err
}

// start runs a part until ctx ends.
func (n *node) start(ctx context.Context, what string, f func(context.Context) error) {
	n.wg.Go(func() { n.part(ctx, what, f) })
}

// part ends the program if it ends by itself.
func (n *node) part(ctx context.Context, what string, f func(context.Context) error) {
	err := f(ctx)
	if ctx.Err() == nil {
		if err == nil {
			err = errors.New("ended")
		}
		n.fail(fmt.Errorf("%s: %w", what, err))
	}
}

// close gives back what build opened, when nothing runs any more.
func (n *node) close() {
	if n.standin != nil {
		n.standin.Close()
	}
	if n.enrol != nil {
		n.enrol.Close()
	}
	if n.askSocket != nil {
		_ = n.askSocket.Close()
	}
	if n.owners != nil {
		n.owners.Close()
	}
	if n.host != nil {
		_ = n.host.Close()
	}
}
