package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// serve answers clients until the listener fails.
func (s *supervisor) serve(listener net.Listener) error {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return fmt.Errorf("lab: control socket: %w", err)
		}
		go s.answer(conn.(*net.UnixConn))
	}
}

// answer serves one client: one request.
func (s *supervisor) answer(conn *net.UnixConn) {
	defer conn.Close()
	if err := sameUser(conn); err != nil {
		send(conn, reply{Error: err.Error()})
		return
	}
	var r request
	files, err := receive(conn, &r)
	defer func() { closeAll(files) }()
	if err == nil && len(files) != 3 {
		err = errors.New("lab: a request comes with three descriptors")
	}
	if err != nil {
		send(conn, reply{Error: err.Error()})
		return
	}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	answer, err := s.handle(ctx, cancel, conn, r, files)
	if err != nil {
		answer.Error = err.Error()
	}
	send(conn, answer)
	if r.Op == "down" && err == nil {
		s.stop()
	}
}

// sameUser refuses everybody but the user who started the lab, who is root in
// here in either case.
func sameUser(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("lab: control socket: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, credErr); err != nil {
		return fmt.Errorf("lab: control socket: %w", err)
	}
	if cred.Uid != 0 {
		return errors.New("lab: it belongs to another user")
	}
	return nil
}

func (s *supervisor) handle(ctx context.Context, cancel func(), conn *net.UnixConn, r request, files []*os.File) (reply, error) {
	switch r.Op {
	case "status":
		if err := json.NewEncoder(files[1]).Encode(s.status()); err != nil {
			return reply{}, fmt.Errorf("lab: status: %w", err)
		}
		return reply{}, nil
	case "exec":
		code, err := s.exec(conn, r, files)
		return reply{Code: code}, err
	case "logs":
		go func() { // The client says nothing more; its end is ours.
			var none struct{}
			receive(conn, &none)
			cancel()
		}()
		return reply{}, s.logs(ctx, r, files[1])
	case "kill":
		return reply{}, s.each(r.Target, func(p *process) error { return p.kill(syscall.Signal(r.Signal), r.Hold) })
	case "start":
		return reply{}, s.each(r.Target, func(p *process) error { p.release(); return nil })
	case "down":
		return reply{}, nil
	}
	return reply{}, fmt.Errorf("lab: unknown request %q", r.Op)
}

// processes returns all that run, the lab's own first.
func (s *supervisor) processes() []*process {
	var all []*process
	if s.control != nil {
		all = append(all, s.control.process)
	}
	for _, n := range s.snapshotNodes() {
		all = append(all, n.proxy, n.attach)
	}
	for _, p := range s.sortedPods() {
		s.mu.Lock()
		all = append(all, p.processes...)
		s.mu.Unlock()
	}
	return all
}

// each calls f with every process that target names: a process by its name, a
// pod (NAMESPACE/NAME, or NAME alone where it is the only one) by all its
// containers, a node's name by both its processes.
func (s *supervisor) each(target string, f func(*process) error) error {
	found := s.match(target)
	if len(found) == 0 {
		return fmt.Errorf("lab: there is no %q; ztun lab status shows what there is", target)
	}
	var errs []error
	for _, p := range found {
		errs = append(errs, f(p))
	}
	return errors.Join(errs...)
}

func (s *supervisor) match(target string) []*process {
	var found []*process
	for _, p := range s.processes() {
		kind, rest, _ := strings.Cut(p.name, "/")
		pod, container := path.Split(p.name)
		switch {
		case p.name == target,
			p.kind == "container" && strings.TrimSuffix(pod, "/") == target,
			p.kind == "container" && path.Base(strings.TrimSuffix(pod, "/")) == target,
			p.kind != "container" && kind != "control" && rest == target,
			p.kind == "container" && path.Base(strings.TrimSuffix(pod, "/"))+"/"+container == target:
			found = append(found, p)
		}
	}
	return found
}

// logs writes what processes said to out: of all of them when none is named.
func (s *supervisor) logs(ctx context.Context, r request, out *os.File) error {
	if r.Target == "lab" {
		return s.log.copyTo(ctx, out, "", r.Follow)
	}
	found := s.processes()
	if r.Target != "" {
		if found = s.match(r.Target); len(found) == 0 {
			return s.each(r.Target, nil)
		}
	}
	if len(found) == 1 {
		return found[0].log.copyTo(ctx, out, "", r.Follow)
	}
	var all sync.WaitGroup
	lines := &lineWriter{out: out}
	for _, p := range found {
		if !r.Follow {
			if err := p.log.copyTo(ctx, lines, p.name+" | ", false); err != nil {
				return err
			}
			continue
		}
		all.Go(func() { p.log.copyTo(ctx, lines, p.name+" | ", true) })
	}
	all.Wait()
	return nil
}

// A lineWriter lets several goroutines write whole lines.
type lineWriter struct {
	mu  sync.Mutex
	out *os.File
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(p)
}

// exec runs a command in a pod, or in the namespace of a node, the control
// plane or the fabric, with the client's descriptors, and returns its exit
// code.
func (s *supervisor) exec(conn *net.UnixConn, r request, files []*os.File) (int, error) {
	if len(r.Argv) == 0 {
		return 0, errors.New("lab: exec: no command")
	}
	cmd, space, err := s.execCommand(r)
	if err != nil {
		return 0, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = files[0], files[1], files[2]
	if err := space.start(cmd); err != nil {
		return 0, fmt.Errorf("lab: exec: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		for {
			var m signalling
			_, err := receive(conn, &m)
			select {
			case <-ended:
				return
			default:
			}
			if err != nil {
				m.Signal = int(syscall.SIGKILL)
			}
			syscall.Kill(-cmd.Process.Pid, syscall.Signal(m.Signal))
			if err != nil {
				return
			}
		}
	}()
	err = cmd.Wait()
	close(ended)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if exit.Sys().(syscall.WaitStatus).Signaled() {
			return 128 + int(exit.Sys().(syscall.WaitStatus).Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

func (s *supervisor) execCommand(r request) (*exec.Cmd, *space, error) {
	if space := s.machineSpace(r.Target); space != nil {
		path, err := lookPath(r.Argv[0], []string{"PATH=" + defaultPath})
		if err != nil {
			return nil, nil, err
		}
		cmd := exec.Command(path, r.Argv[1:]...)
		cmd.Env = []string{"PATH=" + defaultPath}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		return cmd, space, nil
	}
	name, container := r.Target, ""
	if strings.Count(name, "/") == 2 {
		name, container = path.Split(name)
		name = strings.TrimSuffix(name, "/")
	}
	var found []*pod
	for _, p := range s.sortedPods() {
		if p.key == name || path.Base(p.key) == name {
			found = append(found, p)
		}
	}
	if len(found) != 1 {
		return nil, nil, fmt.Errorf("lab: exec: %d pods are called %q; ztun lab status shows what there is", len(found), r.Target)
	}
	spec := found[0].spec.Load()
	containers := spec.Pod.Spec.Containers
	i := 0
	if container != "" {
		i = slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == container })
	}
	if i < 0 {
		return nil, nil, fmt.Errorf("lab: exec: pod %s has no container %s", name, container)
	}
	cmd, err := s.containerCommand(found[0], spec, containers[i], r.Argv, false)
	return cmd, found[0].space, err
}

// machineSpace returns the namespace of what is not a pod, nil if target is none.
func (s *supervisor) machineSpace(target string) *space {
	switch {
	case target == "fabric":
		return s.network.fabric
	case target == "control" && s.control != nil:
		return s.control.space
	}
	for _, n := range s.snapshotNodes() {
		if target == "node/"+n.name {
			return n.space
		}
	}
	return nil
}

// status describes the whole lab.
func (s *supervisor) status() Status {
	s.mu.Lock()
	st := Status{Name: s.order.Name, Dir: s.order.Dir, Config: configDir, Problem: s.problem}
	spec, control := s.spec, s.control
	s.mu.Unlock()
	if control != nil {
		st.Control = control.process.status()
	}
	for _, n := range s.snapshotNodes() {
		ns := NodeStatus{Name: n.name, Addresses: fabricAddrs(fabricNodes + n.index), Proxy: n.proxy.status(), Attach: n.attach.status()}
		ns.CapEff = effectiveCapabilities(ns.Proxy.PID)
		st.Nodes = append(st.Nodes, ns)
	}
	for _, p := range s.sortedPods() {
		spec := p.spec.Load()
		ps := PodStatus{Namespace: spec.Namespace, Name: spec.Name, Node: p.node.name, Addresses: spec.Addrs, Enrolled: spec.Enrolled, Netns: p.space.path}
		if state, ok := p.node.feed.state(p.uid); ok {
			ps.Phase, ps.Error = string(state.Phase), state.Error
		}
		s.mu.Lock()
		for _, c := range p.processes {
			ps.Containers = append(ps.Containers, c.status())
		}
		s.mu.Unlock()
		st.Pods = append(st.Pods, ps)
	}
	if spec != nil {
		for _, svc := range spec.world.Services() {
			st.Service = append(st.Service, ServiceStatus{Hostname: svc.Hostname, Addresses: svc.Addrs})
		}
	}
	return st
}

// effectiveCapabilities returns the CapEff line of a process, "" if it is gone.
func effectiveCapabilities(pid int) string {
	if pid == 0 {
		return ""
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(text) {
		if value, ok := bytes.CutPrefix(line, []byte("CapEff:")); ok {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}
