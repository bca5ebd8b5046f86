package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"reflect"
	"time"

	"github.com/ztun/ztun/cmd/internal/agent"
)

// An attachOrder is what `ztun lab attach` is started with.
type attachOrder struct {
	StateDir      string       `json:"stateDir"`
	Socket        string       `json:"socket"`
	SocketUID     int          `json:"socketUID"`
	SocketGID     int          `json:"socketGID"`
	NodeAddresses []netip.Addr `json:"nodeAddresses"`
}

const (
	// statesFD takes a line with the status of every pod when one changed.
	statesFD = 3
	// statesEvery is how often that is looked at.
	statesEvery = 50 * time.Millisecond
	// detachTimeout bounds how long a pod's plumbing may take to go.
	detachTimeout = 10 * time.Second
)

// runAttach is a node's attach side: an agent that is told its pods on
// standard input, a JSON list a line, until that ends.
func runAttach(text string) error {
	var o attachOrder
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return fmt.Errorf("lab: attach: %w", err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	a, err := agent.New(agent.Config{
		StateDir: o.StateDir, Socket: o.Socket, SocketUID: o.SocketUID, SocketGID: o.SocketGID,
		NodeAddresses: o.NodeAddresses, Log: log,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	reported := make(chan struct{})
	go func() {
		defer close(reported)
		reportStates(ctx, a)
	}()
	go func() {
		defer cancel()
		wanted := map[string]agent.Pod{}
		err := decodeLines(os.Stdin, func(pods []agent.Pod) { want(ctx, a, wanted, pods, log) })
		if err != nil {
			log.Error("no more pods", "error", err)
		}
	}()
	err = a.Run(ctx)
	cancel()
	<-reported
	return err
}

// want makes the agent want pods and nothing else. wanted is what it was told
// before.
func want(ctx context.Context, a *agent.Agent, wanted map[string]agent.Pod, pods []agent.Pod, log *slog.Logger) {
	now := map[string]bool{}
	for _, p := range pods {
		now[p.UID] = true
		if reflect.DeepEqual(wanted[p.UID], p) {
			continue
		}
		wanted[p.UID] = p
		if err := a.Set(p); err != nil {
			log.Error("pod", "namespace", p.Namespace, "name", p.Name, "error", err)
		}
	}
	// Also what a former agent left.
	for _, s := range a.Status() {
		if uid := s.Pod.UID; !now[uid] {
			delete(wanted, uid)
			limited, cancel := context.WithTimeout(ctx, detachTimeout)
			if err := a.Delete(limited, uid); err != nil {
				log.Error("detach", "namespace", s.Pod.Namespace, "name", s.Pod.Name, "error", err)
			}
			cancel()
		}
	}
}

// reportStates writes the agent's status to statesFD, first and whenever it
// changed, until ctx ends.
func reportStates(ctx context.Context, a *agent.Agent) {
	out := os.NewFile(statesFD, "states")
	defer out.Close()
	tick := time.NewTicker(statesEvery)
	defer tick.Stop()
	var last string
	for {
		if text, err := json.Marshal(a.Status()); err == nil && string(text) != last {
			last = string(text)
			if _, err := fmt.Fprintln(out, last); err != nil {
				return
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
