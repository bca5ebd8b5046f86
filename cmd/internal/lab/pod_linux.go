package lab

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/ztun/ztun/cmd/internal/agent"
)

// A pod is a pod that runs.
type pod struct {
	// Set when it is made, read-only after.
	uid        string
	node       *node
	index      int
	space      *space
	hosts      string
	resolv     string
	cancel     context.CancelFunc
	ended      chan struct{} // Closed when its processes have.
	processes  []*process
	served     chan struct{} // Closed once it may start.
	serveOnce  sync.Once
	definition string // Its containers, as JSON.
	key        string

	spec atomic.Pointer[podSpec] // As the directory last said.
}

// runs says whether the pod is what p asks for; labels and annotations may
// differ, they do not need other processes.
func (p *pod) runs(spec *podSpec) bool {
	return p.node.name == spec.Node && p.definition == definition(spec)
}

func definition(p *podSpec) string {
	text, _ := json.Marshal(p.Pod.Spec)
	return string(text)
}

func (s *supervisor) snapshotPods() map[string]*pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	pods := map[string]*pod{}
	for k, p := range s.pods {
		pods[k] = p
	}
	return pods
}

func (s *supervisor) snapshotNodes() []*node {
	s.mu.Lock()
	defer s.mu.Unlock()
	var nodes []*node
	for _, n := range s.nodes {
		if n.space != nil {
			nodes = append(nodes, n)
		}
	}
	slices.SortFunc(nodes, func(a, b *node) int { return a.index - b.index })
	return nodes
}

// ensurePod makes a pod if it is not there, and tells those concerned how it
// is now.
func (s *supervisor) ensurePod(spec *podSpec, world *spec) error {
	s.mu.Lock()
	p, n := s.pods[spec.key()], s.nodes[spec.Node]
	s.mu.Unlock()
	fresh := p == nil
	if fresh {
		var err error
		if p, err = s.newPod(spec, n); err != nil {
			return fmt.Errorf("lab: pod %s: %w", spec.key(), err)
		}
	}
	// In place: it is mounted in the pod.
	if err := os.WriteFile(p.hosts, []byte(hostsFile(spec, world)), 0o644); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	p.spec.Store(spec)
	s.mu.Lock()
	s.pods[p.key] = p
	s.mu.Unlock()
	if spec.Enrolled {
		n.feed.set(agentPod(p, spec))
	} else {
		p.serveOnce.Do(func() { close(p.served) })
		if !fresh {
			ctx, cancel := context.WithTimeout(s.ctx, detachTimeout)
			defer cancel()
			if err := n.feed.remove(ctx, p.uid); err != nil {
				return err
			}
		}
	}
	if fresh {
		s.startPod(p, spec)
	}
	return nil
}

// newPod makes a pod's namespace and files.
func (s *supervisor) newPod(spec *podSpec, n *node) (*pod, error) {
	file := spec.Namespace + "_" + spec.Name
	p := &pod{
		uid: newUID(), key: spec.key(), node: n, served: make(chan struct{}), ended: make(chan struct{}), definition: definition(spec),
		hosts: filepath.Join(runtimeDir, "pods", file+".hosts"), resolv: filepath.Join(runtimeDir, "pods", file+".resolv"),
	}
	if err := os.WriteFile(p.resolv, []byte(resolvFile(spec)), 0o644); err != nil {
		return nil, err
	}
	if spec.hostNetwork() {
		p.space = n.space
		return p, nil
	}
	s.mu.Lock()
	index, err := n.indexOf(spec.key())
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	p.index = index
	p.space, err = s.network.addPod("pod-"+file, n.space, n.index, index)
	return p, err
}

// agentPod is a pod as the attach side is told of it.
func agentPod(p *pod, spec *podSpec) agent.Pod {
	annotations := spec.Pod.Annotations
	a := agent.Pod{
		UID: p.uid, Name: spec.Name, Namespace: spec.Namespace, ServiceAccount: spec.Account,
		Netns: p.space.path, Addresses: spec.Addrs,
		BypassInbound: annotations["ambient.istio.io/bypass-inbound-capture"] == "true",
		DNSCapture:    annotations["ambient.istio.io/dns-capture"] == "true",
	}
	for _, name := range strings.Split(annotations["istio.io/reroute-virtual-interfaces"], ",") {
		if name = strings.TrimSpace(name); name != "" {
			a.VirtualInterfaces = append(a.VirtualInterfaces, name)
		}
	}
	return a
}

// startPod starts a pod's containers, once it may: first the init containers,
// one after the other.
func (s *supervisor) startPod(p *pod, spec *podSpec) {
	ctx, cancel := context.WithCancel(s.ctx)
	p.cancel = cancel
	gate := make(chan struct{})
	var inits []*process
	for _, c := range spec.Pod.Spec.InitContainers {
		inits = append(inits, s.containerProcess(p, spec, c, restartOnFailure, nil))
	}
	var apps []*process
	policy := restartPolicy(spec.Pod.Spec.RestartPolicy)
	if policy == "" {
		policy = restartAlways
	}
	for _, c := range spec.Pod.Spec.Containers {
		apps = append(apps, s.containerProcess(p, spec, c, policy, gate))
	}
	s.mu.Lock()
	p.processes = slices.Concat(inits, apps)
	s.mu.Unlock()

	var all sync.WaitGroup
	all.Go(func() {
		select {
		case <-p.served:
		case <-ctx.Done():
			return
		}
		for _, c := range inits {
			all.Go(func() { c.run(ctx) })
			if c.await(ctx, func(s ProcessStatus) bool { return s.State == "ended" }) != nil {
				return
			}
		}
		close(gate)
	})
	for _, c := range apps {
		all.Go(func() { c.run(ctx) })
	}
	s.running.Go(func() {
		all.Wait()
		close(p.ended)
	})
}

func (s *supervisor) containerProcess(p *pod, spec *podSpec, c corev1.Container, policy restartPolicy, gate <-chan struct{}) *process {
	proc := &process{name: spec.key() + "/" + c.Name, kind: "container", policy: policy, space: p.space, gate: gate}
	proc.command = func() (*exec.Cmd, error) {
		env := s.environment(spec, c)
		var argv []string
		for _, a := range slices.Concat(c.Command, c.Args) {
			argv = append(argv, expand(a, env))
		}
		return s.containerCommand(p, spec, c, argv, true)
	}
	return proc
}

// containerCommand runs argv as container c of the pod would, with a PID
// namespace of its own if ownPIDs is set.
func (s *supervisor) containerCommand(p *pod, spec *podSpec, c corev1.Container, argv []string, ownPIDs bool) (*exec.Cmd, error) {
	o := containerOrder{
		Hostname: spec.Name, Hosts: p.hosts, Resolv: p.resolv, Dir: c.WorkingDir, Argv: argv,
		Env: s.environment(spec, c), Caps: capabilities(c.SecurityContext), OwnPIDs: ownPIDs,
	}
	if spec.hostNetwork() {
		o.Hostname = spec.Node
	}
	o.UID, o.GID = s.user(spec, c)
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", "lab", "container", string(text))
	cmd.Dir = "/"
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC, Setpgid: true}
	if ownPIDs {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWPID
	}
	return cmd, nil
}

// user is whom the securityContext asks for. In a lab of an ordinary user
// there is only that user, who is root there.
func (s *supervisor) user(spec *podSpec, c corev1.Container) (uid, gid int) {
	if !s.order.Users {
		return 0, 0
	}
	pick := func(of func(user, group *int64)) {
		if sc := spec.Pod.Spec.SecurityContext; sc != nil {
			of(sc.RunAsUser, sc.RunAsGroup)
		}
		if sc := c.SecurityContext; sc != nil {
			of(sc.RunAsUser, sc.RunAsGroup)
		}
	}
	pick(func(user, group *int64) {
		if user != nil {
			uid = int(*user)
		}
		if group != nil {
			gid = int(*group)
		}
	})
	return uid, gid
}

// capabilities are the default ones as the securityContext changes them.
func capabilities(sc *corev1.SecurityContext) []uint {
	keep := map[uint]bool{}
	for _, c := range defaultCaps {
		keep[c] = true
	}
	if sc != nil && sc.Capabilities != nil {
		for _, name := range sc.Capabilities.Drop {
			if name == "ALL" {
				clear(keep)
			}
			delete(keep, defaultCaps[string(name)])
		}
		for _, name := range sc.Capabilities.Add {
			if c, ok := defaultCaps[string(name)]; ok {
				keep[c] = true
			}
			if c, ok := extraCaps[string(name)]; ok {
				keep[c] = true
			}
		}
	}
	var caps []uint
	for c := range keep {
		caps = append(caps, c)
	}
	slices.Sort(caps)
	return caps
}

// environment is a container's env, with what every container has.
func (s *supervisor) environment(spec *podSpec, c corev1.Container) []string {
	env := []string{
		"PATH=" + filepath.Dir(s.order.Program) + ":" + defaultPath,
		"HOSTNAME=" + spec.Name, "HOME=/",
	}
	for _, e := range c.Env {
		value := expand(e.Value, env)
		if e.ValueFrom != nil && e.ValueFrom.FieldRef != nil {
			value = fieldOf(spec, e.ValueFrom.FieldRef.FieldPath)
		}
		env = append(env, e.Name+"="+value)
	}
	return env
}

// fieldOf resolves the downward API's usual fields.
func fieldOf(spec *podSpec, path string) string {
	switch path {
	case "metadata.name":
		return spec.Name
	case "metadata.namespace":
		return spec.Namespace
	case "spec.nodeName":
		return spec.Node
	case "spec.serviceAccountName":
		return spec.Account
	case "status.podIP":
		return spec.Addrs[0].String()
	case "status.podIPs":
		var ips []string
		for _, a := range spec.Addrs {
			ips = append(ips, a.String())
		}
		return strings.Join(ips, ",")
	}
	return ""
}

// expand replaces $(NAME) as Kubernetes does: unknown names stay, $$ is a $.
func expand(text string, env []string) string {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '$' || i+1 == len(text) {
			b.WriteByte(text[i])
			continue
		}
		end := strings.IndexByte(text[i:], ')')
		switch {
		case text[i+1] == '$':
			b.WriteByte('$')
			i++
		case text[i+1] == '(' && end > 0:
			whole := text[i : i+end+1]
			value := whole
			for _, kv := range env {
				if v, ok := strings.CutPrefix(kv, whole[2:len(whole)-1]+"="); ok {
					value = v
				}
			}
			b.WriteString(value)
			i += end
		default:
			b.WriteByte('$')
		}
	}
	return b.String()
}

// podServed lets a pod's containers start: its traffic is captured.
func (s *supervisor) podServed(uid string) {
	for _, p := range s.snapshotPods() {
		if p.uid == uid {
			p.serveOnce.Do(func() { close(p.served) })
		}
	}
}

// removePod stops a pod's containers, detaches it and takes its namespace away.
func (s *supervisor) removePod(ctx context.Context, p *pod) error {
	s.mu.Lock()
	delete(s.pods, p.key)
	s.mu.Unlock()
	p.cancel()
	select {
	case <-p.ended:
	case <-ctx.Done():
		return fmt.Errorf("lab: stop pod %s: %w", p.key, context.Cause(ctx))
	}
	limited, cancel := context.WithTimeout(ctx, detachTimeout)
	defer cancel()
	err := p.node.feed.remove(limited, p.uid)
	if p.space != p.node.space {
		err = errors.Join(err, p.space.close(), s.network.removePod(p.node.space, p.node.index, p.index))
	}
	return err
}

// awaitPods returns once every container has been started, or says which has
// not and why.
func (s *supervisor) awaitPods(ctx context.Context) error {
	var errs []error
	for _, p := range s.snapshotPods() {
		for _, c := range p.processes {
			err := c.await(ctx, func(s ProcessStatus) bool { return s.Starts > 0 })
			if err != nil {
				errs = append(errs, fmt.Errorf("%w; %s", err, s.whyNot(p)))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, p := range s.sortedPods() {
		mesh := "not in the mesh"
		if p.spec.Load().Enrolled {
			mesh = "in the mesh"
		}
		s.progress("pod  %-12s %s on %s, %s", p.key, p.spec.Load().Addrs[0], p.node.name, mesh)
	}
	return nil
}

// whyNot says how far a pod's way into the mesh has come.
func (s *supervisor) whyNot(p *pod) string {
	if !p.spec.Load().Enrolled {
		return "it needs no mesh"
	}
	state, ok := p.node.feed.state(p.uid)
	if !ok {
		return fmt.Sprintf("attach side has not heard of it: %s", p.node.attach.log.tail())
	}
	text := fmt.Sprintf("the pod is %s", state.Phase)
	if state.Error != "" {
		text += ": " + state.Error
	}
	if state.Phase == agent.Attached {
		text += "; proxy: " + p.node.proxy.log.tail()
	}
	return text
}

func (s *supervisor) sortedPods() []*pod {
	var pods []*pod
	for _, p := range s.snapshotPods() {
		pods = append(pods, p)
	}
	slices.SortFunc(pods, func(a, b *pod) int { return strings.Compare(a.key, b.key) })
	return pods
}

// newUID returns a random version 4 UUID.
func newUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}
