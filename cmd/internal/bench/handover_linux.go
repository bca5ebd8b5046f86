package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	nodeagent "github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/lab"
	"github.com/ztun/ztun/cmd/internal/zds"
)

// A handover is the attach side of a node whose proxy lives on kernel sockets
// in its pods, as a stock ztunnel does: what istio-cni is to it. Each pod gets
// rules that redirect its TCP, and the proxy the pod's network namespace, over
// stock ZDS.
type handover struct {
	server *zds.Server
	socket *net.UnixListener
	log    *slog.Logger

	mu sync.Mutex
	// mu guards the fields below.
	pods map[string]handedPod // By UID.
}

type handedPod struct {
	nodeagent.Pod
	problem string // Why there are no rules; the proxy has not heard of it then.
}

// runHandover is `bench attach`.
func runHandover(order string) error {
	return lab.RunAttach(order, func(o lab.AttachOrder, log *slog.Logger) (lab.AttachSide, error) {
		return newHandover(o.Socket, log)
	})
}

// newHandover makes the socket, in the place of a former one's.
func newHandover(socket string, log *slog.Logger) (*handover, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("bench: %w", err)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("bench: %w", err)
	}
	return &handover{server: zds.NewServer(zds.ServerConfig{Log: log}), socket: l, log: log, pods: map[string]handedPod{}}, nil
}

func (h *handover) Run(ctx context.Context) error { return h.server.Serve(ctx, h.socket) }

// Set redirects a pod and hands it over. Without rules it is as if it were not
// in the mesh; Status says why.
func (h *handover) Set(p nodeagent.Pod) error {
	handed := handedPod{Pod: p}
	err := redirectPod(p.Netns)
	if err == nil {
		err = h.hand(p)
	}
	if err != nil {
		handed.problem = err.Error()
		h.log.Error("pod is not redirected", "namespace", p.Namespace, "name", p.Name, "error", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pods[p.UID] = handed
	return nil
}

func (h *handover) hand(p nodeagent.Pod) error {
	netns, err := os.Open(p.Netns)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	// Without a Device it is a stock message, whose one descriptor is a
	// network namespace.
	w := zds.Workload{UID: p.UID, Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount}
	return h.server.Set(w, zds.Files{Device: netns})
}

// Delete takes the pod from the proxy. Its rules go with its namespace.
func (h *handover) Delete(ctx context.Context, uid string) error {
	if err := h.server.Delete(ctx, uid); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.pods, uid)
	return nil
}

// Status tells of every pod. One without rules is served too: its containers
// may start, and the rest of the lab is not held up.
func (h *handover) Status() []nodeagent.Status {
	h.mu.Lock()
	pods := slices.SortedFunc(maps.Values(h.pods), func(a, b handedPod) int { return strings.Compare(a.UID, b.UID) })
	h.mu.Unlock()
	all := []nodeagent.Status{}
	for _, p := range pods {
		s := nodeagent.Status{Pod: p.Pod, Phase: nodeagent.Served, Addresses: p.Addresses, Error: p.problem}
		if state := h.server.State(p.UID); p.problem == "" && !state.Served {
			s.Phase = nodeagent.Attached
			if state.Err != nil {
				s.Error = state.Err.Error()
			}
		}
		all = append(all, s)
	}
	return all
}
