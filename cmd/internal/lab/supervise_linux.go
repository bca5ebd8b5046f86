package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/ztun/ztun/xds/control"
)

// runtimeDir is where a lab's files are, in its own mount namespace.
const runtimeDir = runtimeMount + "/ztun"

// proxyUser is who the proxies are where there is more than one user: the
// customary "nonroot" of images.
const proxyUser = 65532

// configDir is what the control plane reads.
const configDir = runtimeDir + "/config"

// A supervisor is the process that makes and keeps a lab.
type supervisor struct {
	// Set by newSupervisor, read-only after.
	order   instructions
	mesh    control.Mesh
	network *network
	log     ring // Its own; `ztun lab logs lab` shows it.
	ctx     context.Context
	stop    context.CancelFunc
	running sync.WaitGroup
	tell    func(report)

	loaded  string // Fingerprint of what begin has read; follow goes on from it.
	copying sync.Mutex
	copied  string // The copy of ztun-proxy that is current; guarded by copying.

	// applying makes one apply follow the other.
	applying sync.Mutex

	mu sync.Mutex
	// mu guards the fields below. Only apply changes them.
	spec    *spec
	control *machine
	nodes   map[string]*node
	pods    map[string]*pod
	problem string // Why the directory as it is now is not in force.
}

// A machine is a namespace on the fabric with one process of the lab's own.
type machine struct {
	space   *space
	process *process
}

// runSupervise makes the lab that order describes and serves it until it is
// told to end.
func runSupervise(text string) error {
	progress := json.NewEncoder(os.NewFile(progressFD, "progress"))
	var open sync.Mutex
	tell := func(r report) {
		open.Lock()
		defer open.Unlock()
		progress.Encode(r) // Nobody listens any more: nothing to be done.
	}
	err := supervise(text, tell)
	if err != nil {
		tell(report{Error: err.Error()})
	}
	return err
}

func supervise(text string, tell func(report)) error {
	var order instructions
	if err := json.Unmarshal([]byte(text), &order); err != nil {
		return fmt.Errorf("lab: supervise: %w", err)
	}
	listener, err := net.FileListener(os.NewFile(listenerFD, "socket"))
	if err != nil {
		return fmt.Errorf("lab: control socket: %w", err)
	}
	s, err := newSupervisor(order, tell)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- s.serve(listener) }()
	// Sooner than the starter gives up: it is to hear why.
	ctx, cancel := context.WithTimeout(s.ctx, startTimeout-5*time.Second)
	defer cancel()
	if err := s.begin(ctx); err != nil {
		return err
	}
	tell(report{Ready: true})
	go s.follow()
	// The kernel clears up behind this process, better than it could itself.
	select {
	case <-s.ctx.Done():
		return nil
	case err := <-served:
		return err
	}
}

func newSupervisor(order instructions, tell func(report)) (*supervisor, error) {
	for _, dir := range []string{runtimeDir, configDir, filepath.Join(runtimeDir, "nodes"), filepath.Join(runtimeDir, "pods")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("lab: %w", err)
		}
	}
	if order.Files != nil {
		order.Dir = filepath.Join(runtimeDir, "source")
		if err := writeFiles(order.Dir, order.Files); err != nil {
			return nil, err
		}
	}
	network, err := newNetwork(filepath.Join(runtimeDir, "netns"))
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	return &supervisor{
		order: order, network: network, tell: tell, ctx: ctx, stop: stop,
		nodes: map[string]*node{}, pods: map[string]*pod{},
	}, nil
}

// begin reads the directory, brings everything up and waits for it.
func (s *supervisor) begin(ctx context.Context) error {
	s.loaded = fingerprint(s.order.Dir)
	first, err := load(s.order.Dir, s.mesh, s.address)
	if err != nil {
		return err
	}
	if err := s.startControl(ctx, first); err != nil {
		return err
	}
	s.progress("control plane  https://%s", netip.AddrPortFrom(fabricAddrs(fabricControl)[0], controlPort))
	if err := s.apply(ctx, first); err != nil {
		return err
	}
	return s.awaitPods(ctx)
}

func (s *supervisor) progress(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	fmt.Fprintln(&s.log, line)
	s.tell(report{Line: line})
}

// run keeps a process until ctx ends.
func (s *supervisor) run(ctx context.Context, p *process) {
	s.running.Go(func() { p.run(ctx) })
}

// address gives pods their addresses: a node's next free ones, or the node's
// own on its network.
func (s *supervisor) address(p *podSpec) ([]netip.Addr, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodeLocked(p.Node)
	addrs := fabricAddrs(fabricNodes + n.index)
	if !p.hostNetwork() {
		index, err := n.indexOf(p.key())
		if err != nil {
			return nil, err
		}
		if addrs, err = podAddrs(n.index, index); err != nil {
			return nil, err
		}
	}
	if !s.network.ipv6 {
		addrs = addrs[:1]
	}
	return addrs, nil
}

// apply makes the lab what next says: nodes are added, pods that are gone or
// run something else are removed, new ones are made.
func (s *supervisor) apply(ctx context.Context, next *spec) error {
	s.applying.Lock()
	defer s.applying.Unlock()
	if err := s.publish(next); err != nil {
		return err
	}
	for _, name := range next.nodes {
		if err := s.ensureNode(ctx, name); err != nil {
			return err
		}
	}
	wanted := map[string]*podSpec{}
	for _, p := range next.pods {
		wanted[p.key()] = p
	}
	var going []*pod
	for key, have := range s.snapshotPods() {
		if p := wanted[key]; p == nil || !have.runs(p) {
			going = append(going, have)
		}
	}
	errs := s.removePods(ctx, going)
	s.mu.Lock()
	s.spec = next
	for _, n := range s.nodes {
		n.forget(func(key string) bool { return wanted[key] == nil && s.pods[key] == nil })
	}
	s.mu.Unlock()
	for _, p := range next.pods {
		if err := s.ensurePod(p, next); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removing is how many pods are removed at a time: each waits for its attach side.
const removing = 16

func (s *supervisor) removePods(ctx context.Context, pods []*pod) []error {
	errs := make([]error, len(pods))
	slots := make(chan struct{}, removing)
	var all sync.WaitGroup
	for i, p := range pods {
		slots <- struct{}{}
		all.Go(func() {
			errs[i] = s.removePod(ctx, p)
			<-slots
		})
	}
	all.Wait()
	return errs
}

// publish hands a spec to the control plane.
func (s *supervisor) publish(next *spec) error {
	return replaceFile(filepath.Join(configDir, renderedFile), next.rendered, 0o644, 0)
}

// follow applies the directory again whenever it changes, until the lab ends.
func (s *supervisor) follow() {
	last := s.loaded
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		now := fingerprint(s.order.Dir)
		if now == last {
			continue
		}
		last = now
		next, err := load(s.order.Dir, s.mesh, s.address)
		if err == nil {
			ctx, cancel := context.WithTimeout(s.ctx, startTimeout)
			err = s.apply(ctx, next)
			cancel()
		}
		s.mu.Lock()
		s.problem = ""
		if err != nil {
			s.problem = err.Error()
		}
		s.mu.Unlock()
		if err != nil {
			fmt.Fprintf(&s.log, "%s changed and is not in force: %v\n", s.order.Dir, err)
		} else {
			fmt.Fprintf(&s.log, "%s changed: %d pods on %d nodes\n", s.order.Dir, len(next.pods), len(next.nodes))
		}
	}
}

// fingerprint changes when the YAML below dir does.
func fingerprint(dir string) string {
	var text []byte
	filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return nil
		}
		if info, err := os.Stat(path); err == nil {
			text = fmt.Appendf(text, "%s %d %d\n", path, info.Size(), info.ModTime().UnixNano())
		}
		return nil
	})
	return string(text)
}

// replaceFile writes a file so that readers see the old or the new content.
func replaceFile(path string, content []byte, mode os.FileMode, uid int) error {
	temporary := path + ".new"
	if err := os.WriteFile(temporary, content, mode); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := os.Chown(temporary, uid, uid); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := os.Rename(temporary, path); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

func writeFiles(dir string, files map[string]string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	for name, content := range files {
		if !filepath.IsLocal(name) || filepath.Base(name) != name {
			return fmt.Errorf("lab: files: %q is no file name", name)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	return nil
}
