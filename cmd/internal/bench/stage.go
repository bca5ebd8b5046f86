package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ztun/ztun/cmd/internal/lab"
)

// A stage is what trials need in the lab beside the legs' own pods. It stands
// for all rounds: pods take long to come and go.
type stage struct {
	// clients and servers are how many more pods each leg has at its ends.
	clients, servers int
	// leave undoes what the trials left, besides the pods. May be nil.
	leave func(ctx context.Context, b *bench) error
}

// The ends of a leg.
const (
	clientEnd = "client"
	serverEnd = "server"
)

// more is the i-th pod that a stage adds at an end of the leg. Legs that begin
// or end at the same place share them.
func (l *leg) more(end string, i int) *benchPod {
	own := l.client
	if end == serverEnd {
		own = l.server
	}
	return &benchPod{namespace: own.namespace, name: fmt.Sprintf("%s-%s-%d", end, own.node, i), node: own.node}
}

// redirects says that the leg's proxy is the bench's own, which only the leg's
// own client has.
func (l *leg) redirects() bool { return slices.Contains(l.proxies, redirector) }

// pods are those that a stage adds for the legs that its trials measure.
func (s *stage) pods(legs []*leg, trials []trial) []*benchPod {
	var pods []*benchPod
	seen := map[string]bool{}
	add := func(p *benchPod) {
		if !seen[p.key()] {
			seen[p.key()] = true
			pods = append(pods, p)
		}
	}
	for _, l := range legs {
		wanted := func(t trial) bool { return !t.skips(l) }
		if l.missing != "" || l.redirects() || !slices.ContainsFunc(trials, wanted) {
			continue
		}
		for i := range s.clients {
			add(l.more(clientEnd, i))
		}
		for i := range s.servers {
			add(l.more(serverEnd, i))
		}
	}
	return pods
}

// on runs f with a stage set for trials, nil for none.
func (b *bench) on(ctx context.Context, s *stage, trials []trial, f func() error) error {
	if s == nil {
		return f()
	}
	pods := s.pods(b.legs, trials)
	err := b.addPods(ctx, pods)
	if err == nil {
		err = f()
	}
	if s.leave != nil && ctx.Err() == nil {
		err = errors.Join(err, s.leave(ctx, b))
	}
	return errors.Join(err, b.removePods(ctx, pods))
}

// learn keeps where pods are.
func (b *bench) learn(status *lab.Status) {
	for _, p := range status.Pods {
		key := p.Namespace + "/" + p.Name
		b.addrs[key], b.spaces[key] = p.Addresses[0], p.Netns
	}
}

// moreFile is the file of the pods that come and go.
const moreFile = "more.yaml"

// addPods makes pods and returns once each is there, and served if it is in
// the mesh. They go with removePods.
func (b *bench) addPods(ctx context.Context, pods []*benchPod) error {
	if len(pods) == 0 {
		return nil
	}
	if err := b.tell(ctx, filepath.Join(b.dir, moreFile), podsYAML(pods)); err != nil {
		return err
	}
	return b.awaitPods(ctx, pods, true)
}

// removePods takes pods away again, and waits.
func (b *bench) removePods(ctx context.Context, pods []*benchPod) error {
	if len(pods) == 0 || ctx.Err() != nil {
		return nil
	}
	if err := b.tell(ctx, filepath.Join(b.dir, moreFile), ""); err != nil {
		return err
	}
	return b.awaitPods(ctx, pods, false)
}

// tell writes a file that the lab or its control plane reads; empty text takes
// it away.
func (b *bench) tell(ctx context.Context, file, text string) error {
	_, err := b.agents[meterAt].ask(ctx, order{Do: "write", File: file, Text: text}, connectTimeout)
	return err
}

// Each pod takes a tenth of a second to come or go where nothing else runs.
const (
	podsPatience = 60 * time.Second
	podPatience  = 500 * time.Millisecond
)

// awaitPods returns once all pods are there and their containers run, or none
// is there any more.
func (b *bench) awaitPods(ctx context.Context, pods []*benchPod, there bool) error {
	ctx, cancel := context.WithTimeout(ctx, podsPatience+time.Duration(len(pods))*podPatience)
	defer cancel()
	for {
		status, err := b.site.Status(ctx)
		if err != nil {
			return err
		}
		have := map[string]lab.PodStatus{}
		for _, p := range status.Pods {
			have[p.Namespace+"/"+p.Name] = p
		}
		missed, why := 0, status.Problem
		for _, p := range pods {
			s, ok := have[p.key()]
			if ok && there && !isUp(s) || ok != there {
				missed++
			}
			if s.Error != "" {
				why = s.Error
			}
		}
		if missed == 0 {
			b.learn(status)
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond+time.Duration(len(pods))*time.Millisecond/2); err != nil {
			done := map[bool]string{true: "come", false: "gone"}[there]
			return fmt.Errorf("%w: %d of %d pods have not %s: %s", err, missed, len(pods), done, why)
		}
	}
}

// isUp says whether a pod is captured, if it is to be, and runs.
func isUp(p lab.PodStatus) bool {
	waits := func(c lab.ProcessStatus) bool { return c.State != "running" }
	return (!p.Enrolled || p.Phase == "served") && !slices.ContainsFunc(p.Containers, waits)
}

// podsYAML describes pods.
func podsYAML(pods []*benchPod) string {
	var b strings.Builder
	for _, p := range pods {
		p.write(&b)
	}
	return b.String()
}
