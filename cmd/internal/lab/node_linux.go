package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// controlPort is istiod's.
	controlPort = 15012
	// tokenEvery is how often nodes get a new token; one is good for longer.
	tokenEvery = time.Hour
	rootsEvery = 2 * time.Second
	// systemNamespace is where a mesh's own parts are.
	systemNamespace = "istio-system"
)

// A node is one machine of the cluster: pods, a proxy and an attach side.
type node struct {
	// Set when it is made, read-only after.
	name   string
	index  int
	dir    string // Token, root certificate and the agent's socket.
	space  *space
	feed   *feed
	proxy  *process
	attach *process
	// Guarded by the supervisor's mu.
	pods []string // Keys of the pods that have an address; "" is free.
}

// indexOf returns the place of a pod on the node, and gives it one if it has none.
func (n *node) indexOf(key string) (int, error) {
	if i := slices.Index(n.pods, key); i >= 0 {
		return i, nil
	}
	if i := slices.Index(n.pods, ""); i >= 0 {
		n.pods[i] = key
		return i, nil
	}
	if len(n.pods) == maxPodsPerNode {
		return 0, fmt.Errorf("lab: node %s is full: %d pods", n.name, maxPodsPerNode)
	}
	n.pods = append(n.pods, key)
	return len(n.pods) - 1, nil
}

// forget frees the places of pods that are gone.
func (n *node) forget(gone func(key string) bool) {
	for i, key := range n.pods {
		if gone(key) {
			n.pods[i] = ""
		}
	}
}

// nodeLocked returns the node of that name, made known if it is new.
func (s *supervisor) nodeLocked(name string) *node {
	n := s.nodes[name]
	if n == nil {
		n = &node{name: name, index: len(s.nodes), dir: filepath.Join(runtimeDir, "nodes", name)}
		s.nodes[name] = n
	}
	return n
}

// ensureNode makes the node and starts its two processes, if that has not
// been done.
func (s *supervisor) ensureNode(ctx context.Context, name string) error {
	s.mu.Lock()
	n := s.nodeLocked(name)
	s.mu.Unlock()
	if n.space != nil {
		return nil
	}
	if n.index >= maxNodes {
		return fmt.Errorf("lab: more than %d nodes", maxNodes)
	}
	if err := os.MkdirAll(filepath.Join(n.dir, "agent"), 0o711); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := s.credentials(ctx, n); err != nil {
		return err
	}
	space, err := s.network.addNode(name, n.index)
	if err != nil {
		return err
	}
	feed := newFeed(s.podServed)
	attach := &process{name: "attach/" + name, kind: "attach", policy: restartAlways, space: space}
	attach.command = func() (*exec.Cmd, error) { return s.attachCommand(n, attach) }
	proxy := &process{name: "proxy/" + name, kind: "proxy", policy: restartAlways, space: space}
	proxy.command = func() (*exec.Cmd, error) { return s.proxyCommand(n) }

	s.mu.Lock()
	n.space, n.feed, n.attach, n.proxy = space, feed, attach, proxy
	s.mu.Unlock()
	s.run(s.ctx, attach)
	s.run(s.ctx, proxy)
	s.progress("node %-12s %s, pods in %s", name, fabricAddrs(fabricNodes + n.index)[0], podSubnets(n.index)[0])
	return nil
}

// proxyUID is the user of the proxies: an ordinary one where there are others
// than the lab's own.
func (s *supervisor) proxyUID() int {
	if s.order.Users {
		return proxyUser
	}
	return 0
}

// credentials writes a node's token and the roots it is to trust.
func (s *supervisor) credentials(ctx context.Context, n *node) error {
	out, err := s.controlTool(ctx, "token", "--node", n.name)
	if err != nil {
		return fmt.Errorf("lab: token of node %s: %w", n.name, err)
	}
	if err := replaceFile(filepath.Join(n.dir, "token"), out, 0o600, s.proxyUID()); err != nil {
		return err
	}
	return s.trust(n)
}

// trust gives a node the roots as they are now.
func (s *supervisor) trust(n *node) error {
	roots, err := os.ReadFile(filepath.Join(controlState, "root-cert.pem"))
	if err != nil {
		return fmt.Errorf("lab: roots: %w", err)
	}
	path := filepath.Join(n.dir, "root-cert.pem")
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, roots) {
		return nil
	}
	return replaceFile(path, roots, 0o644, 0)
}

// renewCredentials gives every node a new token from time to time, and roots
// that were rotated soon.
func (s *supervisor) renewCredentials() {
	tokens, roots := time.NewTicker(tokenEvery), time.NewTicker(rootsEvery)
	defer tokens.Stop()
	defer roots.Stop()
	for {
		renew := s.trust
		select {
		case <-tokens.C:
			renew = func(n *node) error { return s.credentials(s.ctx, n) }
		case <-roots.C:
		case <-s.ctx.Done():
			return
		}
		for _, n := range s.snapshotNodes() {
			if err := renew(n); err != nil {
				fmt.Fprintf(&s.log, "%v\n", err)
			}
		}
	}
}

// proxyCommand is a node's ztun-proxy, or another in its place.
func (s *supervisor) proxyCommand(n *node) (*exec.Cmd, error) {
	if other := s.order.Nodes[n.name].Proxy; other != "" {
		// It gets the PID that the lab knows: shell and env are gone then.
		cmd := exec.Command("/bin/sh", "-c", "exec env "+other)
		cmd.Dir = n.dir
		cmd.Env = append(s.proxyEnv(n), "PATH="+defaultPath, "PROXY_MODE=shared", "CLUSTER_ID=Kubernetes")
		return cmd, nil
	}
	program, err := s.proxyProgram()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program)
	cmd.Dir = n.dir
	cmd.Env = s.proxyEnv(n)
	if uid := s.proxyUID(); uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	return cmd, nil
}

// proxyEnv tells a proxy what ztunnel's chart would.
func (s *supervisor) proxyEnv(n *node) []string {
	address := fabricAddrs(fabricNodes + n.index)[0]
	control := "https://" + netip.AddrPortFrom(fabricAddrs(fabricControl)[0], controlPort).String()
	env := []string{
		"XDS_ADDRESS=" + control,
		"CA_ADDRESS=" + control,
		"XDS_ROOT_CA=" + filepath.Join(n.dir, "root-cert.pem"),
		"CA_ROOT_CA=" + filepath.Join(n.dir, "root-cert.pem"),
		"AUTH_TOKEN=" + filepath.Join(n.dir, "token"),
		"INPOD_UDS=" + n.socket(),
		"NODE_NAME=" + n.name,
		"INSTANCE_IP=" + address.String(),
		"POD_NAME=ztunnel-" + n.name,
		"POD_NAMESPACE=" + systemNamespace,
		"TERMINATION_GRACE_PERIOD_SECONDS=5",
	}
	if !s.network.ipv6 {
		env = append(env, "IPV6_ENABLED=false")
	}
	return env
}

// proxyProgram copies ztun-proxy, if it has changed, to where the proxies'
// user can reach it: it may lie below a directory closed to others.
func (s *supervisor) proxyProgram() (string, error) {
	s.copying.Lock()
	defer s.copying.Unlock()
	info, err := os.Stat(s.order.Proxy)
	if err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	path := filepath.Join(runtimeDir, fmt.Sprintf("ztun-proxy-%d", info.ModTime().UnixNano()))
	if s.copied == path {
		return path, nil
	}
	content, err := os.ReadFile(s.order.Proxy)
	if err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	if err := replaceFile(path, content, 0o755, 0); err != nil {
		return "", err
	}
	if s.copied != "" {
		os.Remove(s.copied) // Those that run it keep it.
	}
	s.copied = path
	return path, nil
}

func (n *node) socket() string { return filepath.Join(n.dir, "agent.sock") }

// attachCommand is a node's attach side, with a feed at its other end.
func (s *supervisor) attachCommand(n *node, p *process) (*exec.Cmd, error) {
	addrs := slices.Concat(fabricAddrs(fabricNodes+n.index), gateways(n.index))
	if !s.network.ipv6 {
		addrs = slices.DeleteFunc(addrs, netip.Addr.Is6)
	}
	text, err := json.Marshal(AttachOrder{
		StateDir: filepath.Join(n.dir, "agent"), Socket: n.socket(),
		SocketUID: s.proxyUID(), SocketGID: s.proxyUID(), NodeAddresses: addrs,
	})
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	argv := []string{"/proc/self/exe", "lab", "attach"}
	if other := s.order.Nodes[n.name].Attach; len(other) > 0 {
		argv = other
	}
	cmd := exec.Command(argv[0], append(slices.Clone(argv[1:]), string(text))...)
	cmd.Env = []string{}
	cmd.Dir = n.dir
	start, err := n.feed.connect(cmd)
	if err != nil {
		return nil, err
	}
	p.started = func(int) { start() }
	return cmd, nil
}

// controlState is where the control plane keeps its CA, for itself alone.
const controlState = runtimeDir + "/control"

// startControl starts the control plane and waits until it listens.
func (s *supervisor) startControl(ctx context.Context, first *spec) error {
	if err := s.publish(first); err != nil {
		return err
	}
	space, err := s.network.addMachine("control", fabricControl)
	if err != nil {
		return err
	}
	listen := netip.AddrPortFrom(fabricAddrs(fabricControl)[0], controlPort).String()
	p := &process{name: "control", kind: "control", policy: restartAlways, space: space, command: func() (*exec.Cmd, error) {
		cmd := exec.Command("/proc/self/exe", "control", "--dir", configDir, "--state", controlState, "--listen", listen)
		cmd.Env = []string{}
		return cmd, nil
	}}
	s.mu.Lock()
	s.control = &machine{space: space, process: p}
	s.mu.Unlock()
	s.run(s.ctx, p)
	if err := awaitListener(ctx, space, listen); err != nil {
		return errors.Join(err, fmt.Errorf("control plane: %s", p.log.tail()))
	}
	go s.renewCredentials()
	return nil
}

// controlTool runs `ztun control` with arguments and returns what it prints.
func (s *supervisor) controlTool(ctx context.Context, args ...string) ([]byte, error) {
	args = append([]string{"control"}, args...)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append(args, "--state", controlState)...)
	cmd.Env = []string{}
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil, fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	return out, err
}

// awaitListener returns once something accepts connections at address.
func awaitListener(ctx context.Context, space *space, address string) error {
	for {
		err := space.do(func() error {
			conn, err := net.DialTimeout("tcp", address, time.Second)
			if err == nil {
				conn.Close()
			}
			return err
		})
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("lab: reach %s: %w", address, err)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("lab: nothing listens at %s: %w", address, context.Cause(ctx))
		}
	}
}
