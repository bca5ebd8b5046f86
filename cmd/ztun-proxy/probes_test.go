package main

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"github.com/ztun/ztun/cmd/internal/owner"
	"github.com/ztun/ztun/cmd/internal/zds"
)

// said is an agent that says the same of every connection.
type said struct {
	owner owner.Owner
	err   error
	asked []owner.Question
}

func (s *said) Ask(q owner.Question, done func(owner.Owner, error)) {
	s.asked = append(s.asked, q)
	done(s.owner, s.err)
}

func TestProbeIsWhatTheAgentSays(t *testing.T) {
	node, pod := netip.MustParseAddrPort("10.0.0.254:40000"), netip.MustParseAddrPort("10.0.0.1:8080")
	other := netip.AddrPortFrom(pod.Addr(), 9)
	away := fmt.Errorf("%w: not there", owner.ErrAway)
	for _, tt := range []struct {
		name       string
		agent      said
		noFallback bool
		app        netip.AddrPort
		want       bool
		count      string
	}{
		{"the kubelet's", said{owner: owner.Kubelet}, false, pod, true, "kubelet"},
		{"the kubelet's, at a port that nobody named", said{owner: owner.Kubelet}, true, other, true, "kubelet"},
		{"nobody's", said{owner: owner.None}, false, pod, false, "none"},
		{"another process'", said{owner: owner.Local}, false, pod, false, "local"},
		{"some process'", said{owner: owner.Unknown}, false, pod, true, "unknown"},
		{"no agent, probed port", said{err: away}, false, pod, true, "fallback"},
		{"no agent, other port", said{err: away}, false, other, false, "away"},
		{"no agent, no fallback", said{err: away}, true, pod, false, "away"},
		{"too many", said{err: owner.ErrBusy}, false, pod, false, "busy"},
	} {
		var log strings.Builder
		p := &prober{agent: &tt.agent, noFallback: tt.noFallback, log: slog.New(slog.NewTextHandler(&log, nil)), answers: map[string]uint64{}}
		isProbe := p.forPod("uid", &zds.Device{NodeAddresses: []netip.Addr{node.Addr()}, ProbePorts: []uint16{pod.Port()}})
		for range 2 {
			answers := 0
			if !isProbe(node, tt.app, func(yes bool) {
				if answers++; yes != tt.want {
					t.Errorf("%s: %v, want %v", tt.name, yes, tt.want)
				}
			}) || answers != 1 {
				t.Errorf("%s: %d answers", tt.name, answers)
			}
		}
		if want := (map[string]uint64{tt.count: 2}); !maps.Equal(p.counts(), want) {
			t.Errorf("%s: counted %v, want %v", tt.name, p.counts(), want)
		}
		if tt.agent.asked[0] != (owner.Question{Node: node, App: tt.app, Pod: "uid"}) {
			t.Errorf("%s: asked %+v", tt.name, tt.agent.asked[0])
		}
		if lines := strings.Count(log.String(), "\n"); lines != 0 != (tt.count == "fallback") || lines > 1 {
			t.Errorf("%s: log: %s", tt.name, log.String())
		}
		if isProbe(netip.MustParseAddrPort("10.0.0.9:1"), tt.app, func(bool) { t.Error("answered") }) || len(tt.agent.asked) != 2 {
			t.Errorf("%s: a stranger's connection was asked about", tt.name)
		}
	}
}

func TestNoProbesWithoutTheNodesAddresses(t *testing.T) {
	p := &prober{agent: &said{err: errors.New("asked")}}
	if p.forPod("uid", &zds.Device{ProbePorts: []uint16{80}}) != nil {
		t.Error("a pod of a node without addresses has probes")
	}
	var none *prober
	if none.forPod("uid", &zds.Device{NodeAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}) != nil {
		t.Error("nobody has probes")
	}
}
