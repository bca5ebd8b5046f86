package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/ztun/ztun/cmd/internal/admin"
	"github.com/ztun/ztun/cmd/internal/telemetry"
	"github.com/ztun/ztun/tunnel/certs"
)

// serve runs what build made, until a signal or the admin server ends it.
func (p *proxy) serve(out *telemetry.Writer) error {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)

	http, stopHTTP := context.WithCancel(context.Background())
	services, stopServices := context.WithCancel(context.Background())
	agent, stopAgent := context.WithCancel(context.Background())
	defer stopHTTP()
	defer stopServices()
	defer stopAgent()

	waitHTTP, err := p.listen(http, out)
	if err != nil {
		return err
	}
	p.services.Go(func() { p.end("xds", p.xds.Run(services)) })
	p.services.Go(func() { p.end("certificates", p.certs.Run(services)) })
	if p.revocations != nil {
		p.services.Go(func() { p.end("revocations", p.revocations.Run(services)) })
	}
	p.services.Go(func() { p.end("questions about probes", p.owners.Run(services)) })
	p.services.Go(func() { p.followMesh(services) })
	p.services.Go(func() { giveBack(services) })
	p.ready.Set(taskProxy, true)
	agentDone := make(chan struct{})
	go p.talkToAgent(agent, agentDone)

	if err := p.waitForStop(signals); err != nil {
		return err // At once: the next proxy serves all pods.
	}
	go exitAtSecond(signals)
	hung := time.AfterFunc(p.cfg.DrainDeadline+stopGrace, p.exitHung)
	defer hung.Stop()
	p.log.Info("shutting down", "deadline", p.cfg.DrainDeadline)
	stopHTTP()
	drain, cancel := context.WithTimeout(context.Background(), p.cfg.DrainDeadline)
	p.agent.Leave()
	p.pods.drainAll(drain, p.agent.Pods(), p.log)
	cancel()
	stopAgent()
	<-agentDone
	for _, st := range p.agent.Pods() { // A Start was perhaps under way.
		if st.Proxy != nil {
			st.Proxy.Stop()
		}
	}
	waitHTTP()
	p.engine.Close()
	p.handshakes.Close()
	stopServices()
	p.services.Wait()
	_ = p.ca.Close()
	p.log.Info("shut down")
	return nil
}

// listen opens readiness first, then admin and metrics.
func (p *proxy) listen(ctx context.Context, out *telemetry.Writer) (wait func(), err error) {
	log := p.logs.Logger("admin")
	a := admin.Handler(admin.Config{Logs: p.logs, Dump: p.dump, Quit: func() { p.quitOnce.Do(func() { close(p.quit) }) }})
	var waits []func()
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		if err != nil {
			cancel()
			for _, w := range waits {
				w()
			}
		}
	}()
	for _, s := range []struct {
		name  string
		start func() (func(), error)
	}{
		{"readiness", func() (func(), error) {
			return admin.Serve(ctx, "readiness", []netip.AddrPort{p.cfg.Listen.Readiness}, p.ready.Handler(), log)
		}},
		{"admin", func() (func(), error) { return admin.Serve(ctx, "admin", p.cfg.Listen.Admin, a, log) }},
		{"stats", func() (func(), error) {
			return admin.Serve(ctx, "stats", []netip.AddrPort{p.cfg.Listen.Stats}, admin.Metrics(p.metrics(out)), log)
		}},
	} {
		w, err := s.start()
		if err != nil {
			return nil, err
		}
		waits = append(waits, w)
	}
	return func() {
		cancel()
		for _, w := range waits {
			w()
		}
	}, nil
}

// certificateWait bounds the wait for the pods' certificates before the agent
// hears of us: as long as a connection would wait for its own.
const certificateWait = 5 * time.Second

// talkToAgent begins only when the whole mesh is known: a pod that is served
// before would have its connections refused. The certificates are waited for too:
// the proxy that served the pods until now has them.
func (p *proxy) talkToAgent(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	select {
	case <-p.xds.Ready():
	case <-ctx.Done():
		return
	}
	p.ready.Set(taskState, true)
	p.awaitCertificates(ctx)
	_ = p.agent.Run(ctx)
}

// awaitCertificates returns when every identity of the node has a certificate,
// or the CA has failed to make one, but soon.
func (p *proxy) awaitCertificates(ctx context.Context) {
	if p.cfg.Node.Name == "" {
		return // Every workload of the mesh counts as local.
	}
	ctx, cancel := context.WithTimeout(ctx, certificateWait)
	defer cancel()
	for _, id := range p.store.Snapshot().LocalIdentities() {
		// Whoever needs it is told the error.
		_, _ = p.certs.Get(ctx, id, certs.Warmup)
	}
}

// end tells of a service that ended by itself.
func (p *proxy) end(what string, err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		p.log.Error("service ended", "service", what, "error", err)
	}
}

// waitForStop returns when the proxy is told to stop, or with the reason why it
// cannot go on.
func (p *proxy) waitForStop(signals <-chan os.Signal) error {
	select {
	case s := <-signals:
		p.log.Info("received signal", "signal", s.String())
	case <-p.quit:
		p.log.Info("told to stop by the admin server")
	case err := <-p.failed:
		return err
	}
	return nil
}

// stopGrace is what the end may take beyond the deadline; a pod's grace period
// is a second longer (config's drain).
const stopGrace = 4 * time.Second

// exitHung ends a process that cannot end by itself, before it is killed, and
// says where it hangs.
func (p *proxy) exitHung() {
	p.log.Error("the proxy does not end; what it does is on the error output", "deadline", p.cfg.DrainDeadline)
	stacks := make([]byte, 1<<20)
	_, _ = os.Stderr.Write(stacks[:runtime.Stack(stacks, true)])
	os.Exit(1)
}

// exitAtSecond ends the process at once when somebody presses Ctrl-C again.
func exitAtSecond(signals <-chan os.Signal) {
	for s := range signals {
		if s == syscall.SIGINT {
			os.Exit(0)
		}
	}
}
