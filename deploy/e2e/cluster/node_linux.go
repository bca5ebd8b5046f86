package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodeConfig is all that a node's process is told.
type nodeConfig struct {
	Prepared
	Name    string
	Address netip.Addr
	Pods    netip.Prefix                // the node's own pods
	Routes  map[netip.Prefix]netip.Addr // other nodes' pods -> the node
}

const (
	hostAddress = "172.31.250.254" // of the control plane, on the bridge
	wireBits    = 24
	podNetwork  = "10.244.0.0/16"
	dnsService  = "10.96.0.10"
)

// containerd's defaults, each in the node's own mounts.
const (
	criSocket = "/run/containerd/containerd.sock"
	cniConfig = "/etc/cni/net.d"
	cniBin    = "/opt/cni/bin"
)

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
	for _, plugin := range []string{"bridge", "host-local", "loopback", "portmap"} {
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
	if err := netlink.AddrAdd(eth, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(c.Address, wireBits))}); err != nil {
		return fmt.Errorf("address %v: %w", c.Address, err)
	}
	if err := linkUp("eth0"); err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(hostAddress)}); err != nil {
		return fmt.Errorf("default route: %w", err)
	}
	for pods, node := range c.Routes {
		if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(pods), Gw: node.AsSlice()}); err != nil {
			return fmt.Errorf("route to %v: %w", pods, err)
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// daemons starts containerd, gives it the images, then starts kubelet and kube-proxy.
func (c *nodeConfig) daemons() ([]*process, error) {
	cgroup := fmt.Sprintf("%s%d-%s", cgroupPrefix, c.Owner, c.Name)
	if err := makeCgroup(cgroup); err != nil {
		return nil, err
	}
	bin := func(name string) string { return filepath.Join(c.Debian, "usr/bin", name) }
	env := []string{
		"PATH=" + filepath.Join(c.Debian, "usr/bin") + ":" + filepath.Join(c.Debian, "usr/sbin") + ":" + os.Getenv("PATH"),
		"LD_LIBRARY_PATH=" + strings.Join(libraryDirs(c.Debian), ":"),
	}
	for path, content := range map[string]string{
		"/etc/e2e/containerd.toml":        containerdConfig,
		cniConfig + "/10-bridge.conflist": fmt.Sprintf(bridgeConfig, c.Pods),
		"/etc/e2e/kubelet.yaml":           fmt.Sprintf(kubeletConfig, criSocket, cgroup, c.Address, dnsService),
		"/etc/e2e/kube-proxy.yaml":        fmt.Sprintf(proxyConfig, c.Mode, c.Address, podNetwork, c.Name, kubeconfig("proxy")),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	containerd, err := start(c.LogDir, "containerd-"+c.Name, env, bin("containerd"), "-c", "/etc/e2e/containerd.toml")
	if err != nil {
		return nil, err
	}
	ctr := func(args ...string) error {
		cmd := exec.Command(bin("ctr"), append([]string{"-a", criSocket, "-n", "k8s.io"}, args...)...)
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("ctr %v: %w: %s", args, err, out)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := poll(ctx, "containerd of "+c.Name, func(context.Context) error {
		if err := containerd.died(); err != nil {
			return err
		}
		return ctr("version")
	}); err != nil {
		return nil, err
	}
	for _, image := range c.Images {
		if err := ctr("images", "import", image); err != nil {
			return nil, err
		}
	}
	kubelet, err := start(c.LogDir, "kubelet-"+c.Name, env, filepath.Join(c.Tools, "kubelet"),
		"--config=/etc/e2e/kubelet.yaml", "--kubeconfig="+kubeconfig(c.Name), "--node-ip="+c.Address.String(),
		"--hostname-override="+c.Name, "--v=2")
	if err != nil {
		return nil, err
	}
	proxy, err := start(c.LogDir, "kube-proxy-"+c.Name, env, filepath.Join(c.Tools, "kube-proxy"), "--config=/etc/e2e/kube-proxy.yaml")
	if err != nil {
		return nil, err
	}
	return []*process{containerd, kubelet, proxy}, nil
}

// libraryDirs are where Debian's packages have shared libraries.
func libraryDirs(root string) []string {
	dirs, _ := filepath.Glob(filepath.Join(root, "usr/lib/*-linux-gnu*"))
	return dirs
}

const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
`

// %s: the node's pods.
const bridgeConfig = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
`

// Runtime's socket, cgroup, address, DNS. Anyone on this private network may ask the kubelet.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%s
cgroupDriver: cgroupfs
cgroupRoot: /%s
failCgroupV1: false
authentication: {anonymous: {enabled: true}}
authorization: {mode: AlwaysAllow}
address: %s
healthzBindAddress: 127.0.0.1
clusterDomain: cluster.local
clusterDNS: [%s]
failSwapOn: false
makeIPTablesUtilChains: false
evictionHard: {nodefs.available: "1%%", imagefs.available: "1%%", memory.available: "50Mi"}
imageGCHighThresholdPercent: 100
maxPods: 300
resolvConf: ""
volumePluginDir: /var/lib/kubelet/volplugins
`

const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
bindAddress: %s
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
clusterCIDR: %s
hostnameOverride: %s
clientConnection: {kubeconfig: %s}
conntrack: {maxPerCore: 0, min: 0}
`

// A Node is one machine of the cluster, as its processes see it.
type Node struct {
	Name    string
	Address netip.Addr
	pid     int // of process 1 of its namespaces, as the tests see it
	process *process
	lines   *bufio.Scanner
	stdin   io.WriteCloser
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
	n := &Node{Name: c.Name, Address: c.Address, lines: bufio.NewScanner(out)}
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
