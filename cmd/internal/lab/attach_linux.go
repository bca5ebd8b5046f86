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

// An AttachSide is the privileged half of a node: it makes sure that what the
// node's pods send and get passes through the node's proxy. *agent.Agent is one.
type AttachSide interface {
	// Set wants a pod in the mesh, as it says now. It does not wait.
	Set(agent.Pod) error
	// Delete undoes that, and waits. An unknown UID is no error.
	Delete(ctx context.Context, uid string) error
	// Status tells of every pod. Containers start once theirs is served.
	Status() []agent.Status
	// Run works until ctx ends.
	Run(ctx context.Context) error
}

// An AttachOrder is what a node's attach side is started with.
type AttachOrder struct {
	StateDir      string       `json:"stateDir"`
	Socket        string       `json:"socket"`
	SocketUID     int          `json:"socketUID"`
	SocketGID     int          `json:"socketGID"`
	NodeAddresses []netip.Addr `json:"nodeAddresses"`
}

const (
	// statesFD takes a line with the status of every pod when one changed.
	statesFD = 3
	// statesEvery is how often that is looked at, at first and when something
	// has changed; the longer nothing does, the seldomer, to statesAtLeast, or
	// what keeps the look at many pods to one part in statesShare of the time.
	statesEvery   = 50 * time.Millisecond
	statesAtLeast = 400 * time.Millisecond
	statesShare   = 200
	// detachTimeout bounds how long a pod's plumbing may take to go.
	detachTimeout = 10 * time.Second
)

// runAttach is the attach side of a node of ztun's.
func runAttach(text string) error {
	return RunAttach(text, func(o AttachOrder, log *slog.Logger) (AttachSide, error) {
		return agent.New(agent.Config{
			StateDir: o.StateDir, Socket: o.Socket, SocketUID: o.SocketUID, SocketGID: o.SocketGID,
			NodeAddresses: o.NodeAddresses, Log: log,
		})
	})
}

// RunAttach is the main part of a program that is a node's attach side. The
// lab starts it with text, the order; open makes of it the side, which is told
// its pods on standard input, a JSON list a line, until that ends.
func RunAttach(text string, open func(AttachOrder, *slog.Logger) (AttachSide, error)) error {
	var o AttachOrder
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return fmt.Errorf("lab: attach: %w", err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	a, err := open(o, log)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	reported, told := make(chan struct{}), make(chan struct{}, 1)
	go func() {
		defer close(reported)
		reportStates(ctx, a, told)
	}()
	go func() {
		defer cancel()
		wanted := map[string]agent.Pod{}
		err := decodeLines(os.Stdin, func(pods []agent.Pod) {
			want(ctx, a, wanted, pods, log)
			select {
			case told <- struct{}{}:
			default:
			}
		})
		if err != nil {
			log.Error("no more pods", "error", err)
		}
	}()
	err = a.Run(ctx)
	cancel()
	<-reported
	return err
}

// want makes the side want pods and nothing else. wanted is what it was told
// before.
func want(ctx context.Context, a AttachSide, wanted map[string]agent.Pod, pods []agent.Pod, log *slog.Logger) {
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

// reportStates writes the side's status to statesFD, first and whenever it
// changed, until ctx ends. It looks again at once when it is told something.
func reportStates(ctx context.Context, a AttachSide, told <-chan struct{}) {
	out := os.NewFile(statesFD, "states")
	defer out.Close()
	var last string
	for wait, seldom := statesEvery, statesAtLeast; ; wait = min(2*wait, seldom) {
		began := time.Now()
		if text, err := json.Marshal(a.Status()); err == nil && string(text) != last {
			last, wait = string(text), statesEvery
			if _, err := fmt.Fprintln(out, last); err != nil {
				return
			}
		}
		seldom = max(statesAtLeast, statesShare*time.Since(began))
		select {
		case <-told:
			wait = statesEvery / 2
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}
