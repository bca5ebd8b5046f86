package cluster

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodeConfig is all that a node's process is told.
type nodeConfig struct {
	Prepared
	Name      string
	Mode      string                      // kube-proxy's
	Addresses pair[netip.Prefix]          // on the wire
	Pods      pair[netip.Prefix]          // the node's own pods
	Routes    map[netip.Prefix]netip.Addr // other nodes' pods -> the node
}

// containerd's defaults, each in the node's own mounts.
const (
	criSocket = "/run/containerd/containerd.sock"
	cniConfig = "/etc/cni/net.d"
	cniBin    = "/opt/cni/bin"
)

// plugins are those of CNI that a node has.
var plugins = []string{"bridge", "host-local", "loopback", "portmap"}

// nodeRole is a node: its mounts and network, then its daemons. It says "mounted" once the cluster may give it eth0, and waits for a line.
func nodeRole() error {
	var c nodeConfig
	if err := json.Unmarshal([]byte(os.Getenv(configVar)), &c); err != nil {
		return err
	}
	if err := c.mounts(); err != nil {
		return err
	}
	fmt.Println("mounted")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return fmt.Errorf("wait for eth0: %w", err)
	}
	if err := c.network(); err != nil {
		return err
	}
	daemons, err := c.daemons()
	if err != nil {
		return err
	}
	fmt.Println("started")
	for {
		for _, d := range daemons {
			if err := d.died(); err != nil {
				return err
			}
		}
		time.Sleep(time.Second)
	}
}

// mounts gives the node directories that look like the machine's and that it may write.
func (c *nodeConfig) mounts() error {
	// Containers get their parts of /run and /var/lib/kubelet with propagation.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return err
	}
	own := filepath.Join(workDir, c.Name)
	for _, dir := range []string{"etc", "opt", "var"} {
		upper, work := filepath.Join(own, dir), filepath.Join(own, dir+".work")
		for _, d := range []string{upper, work} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		options := fmt.Sprintf("lowerdir=/%s,upperdir=%s,workdir=%s", dir, upper, work)
		if err := unix.Mount("overlay", "/"+dir, "overlay", 0, options); err != nil {
			return fmt.Errorf("mount over /%s: %w", dir, err)
		}
	}
	for _, dir := range []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/lib/cni", "/run"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	for _, dir := range []string{"/run/netns", cniBin} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// A machine's own chain must not be taken for the node's.
	if err := os.RemoveAll(cniConfig); err != nil {
		return err
	}
	if err := os.MkdirAll(cniConfig, 0o755); err != nil {
		return err
	}
	for _, plugin := range plugins {
		if err := copyFile(filepath.Join(c.Debian, "usr/lib/cni", plugin), filepath.Join(cniBin, plugin)); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o755)
}

func (c *nodeConfig) network() error {
	if err := linkUp("lo"); err != nil {
		return err
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("eth0: %w", err)
	}
	if err := addAddresses(eth, c.Addresses); err != nil {
		return err
	}
	for _, host := range hostAddresses {
		if err := addRoute(netip.PrefixFrom(unspecified(host.Addr()), 0), host.Addr()); err != nil {
			return err
		}
	}
	for pods, node := range c.Routes {
		if err := addRoute(pods, node); err != nil {
			return err
		}
	}
	return forward()
}

// A Node is one machine of the cluster, as its processes see it.
type Node struct {
	Name     string
	Mode     string     // kube-proxy's: nftables or iptables
	Address  netip.Addr // IPv4
	Address6 netip.Addr
	pid      int // of process 1 of its namespaces, as the tests see it
	process  *process
	lines    *bufio.Scanner
	stdin    io.WriteCloser
}

// Root is the node's file system, for reading and writing.
func (n *Node) Root() string { return fmt.Sprintf("/proc/%d/root", n.pid) }

// NetNS is the file of the node's network namespace.
func (n *Node) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", n.pid) }

// startNode starts the process and waits for its mounts.
func startNode(c nodeConfig) (*Node, error) {
	cmd, err := again("machine", c)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(c.LogDir, c.Name+".log"))
	if err != nil {
		return nil, fmt.Errorf("e2e: %w", err)
	}
	defer log.Close()
	cmd.Stderr = log
	cmd.SysProcAttr = nodeAttributes()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	n := &Node{
		Name: c.Name, Mode: c.Mode, Address: c.Addresses.v4().Addr(), Address6: c.Addresses.v6().Addr(),
		lines: bufio.NewScanner(out),
	}
	if n.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("e2e: %s: %w", c.Name, err)
	}
	n.pid = cmd.Process.Pid
	n.process = &process{name: c.Name, cmd: cmd, done: make(chan struct{})}
	go n.process.wait()
	return n, n.expect("mounted")
}

// expect reads the next line of a node's process.
func (n *Node) expect(want string) error {
	if !n.lines.Scan() || n.lines.Text() != want {
		return fmt.Errorf("e2e: %s ended before it was %s; see its log", n.Name, want)
	}
	return nil
}
