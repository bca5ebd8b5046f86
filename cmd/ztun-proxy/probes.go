package main

import (
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/ztun/ztun/cmd/internal/owner"
	"github.com/ztun/ztun/cmd/internal/zds"
)

// A prober finds out which connections from the node are the kubelet's probes:
// the agent is asked. While it does not say, the address and the port must do.
type prober struct {
	agent interface {
		Ask(q owner.Question, done func(owner.Owner, error))
	}
	noFallback bool
	log        *slog.Logger
	warned     sync.Once

	// mu guards the fields below.
	mu sync.Mutex
	// answers counts connections by what the agent said ("none", "local",
	// "kubelet", "unknown"), or else what was done without it: "fallback" let one
	// pass, "away" did not, nor did "busy", with too many questions.
	answers map[string]uint64
}

func newProber(agent *owner.Client, noFallback bool, log *slog.Logger) *prober {
	return &prober{agent: agent, noFallback: noFallback, log: log, answers: map[string]uint64{}}
}

// forPod is the pod's netstack.StackConfig.IsProbe. A nil prober has none.
func (p *prober) forPod(uid string, d *zds.Device) func(src, dst netip.AddrPort, answer func(bool)) bool {
	if p == nil || len(d.NodeAddresses) == 0 {
		return nil
	}
	nodes, ports := slices.Clone(d.NodeAddresses), slices.Clone(d.ProbePorts)
	return func(src, dst netip.AddrPort, answer func(bool)) bool {
		if !slices.Contains(nodes, src.Addr()) {
			return false
		}
		probed := slices.Contains(ports, dst.Port())
		p.agent.Ask(owner.Question{Node: src, App: dst, Pod: uid}, func(o owner.Owner, err error) {
			answer(p.judge(o, err, probed))
		})
		return true
	}
}

// judge says whether a connection passes as a probe. What does not is plaintext
// like any.
func (p *prober) judge(o owner.Owner, err error, probed bool) (pass bool) {
	what := o.String()
	pass = o.MayProbe()
	switch {
	case errors.Is(err, owner.ErrBusy): // A flood must not get what it did not earn.
		what, pass = "busy", false
	case err != nil && probed && !p.noFallback:
		what, pass = "fallback", true
		p.warned.Do(func() {
			p.log.Warn("the node agent does not say which connections are the kubelet's; those from the node to probed ports pass", "error", err)
		})
	case err != nil:
		what, pass = "away", false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answers[what]++
	return pass
}

// counts are those of answers.
func (p *prober) counts() map[string]uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.answers)
}
