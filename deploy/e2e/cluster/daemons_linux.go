package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// daemons starts containerd, gives it the images, then starts kubelet and kube-proxy.
func (c *nodeConfig) daemons() ([]*process, error) {
	cgroup := fmt.Sprintf("%s%d-%s", cgroupPrefix, c.Owner, c.Name)
	if err := makeCgroup(cgroup); err != nil {
		return nil, err
	}
	address := c.Addresses.v4().Addr()
	bin := func(name string) string { return filepath.Join(c.Debian, "usr/bin", name) }
	env := []string{
		"PATH=" + filepath.Join(c.Debian, "usr/bin") + ":" + filepath.Join(c.Debian, "usr/sbin") + ":" + os.Getenv("PATH"),
		"LD_LIBRARY_PATH=" + strings.Join(libraryDirs(c.Debian), ":"),
	}
	for path, content := range map[string]string{
		"/etc/e2e/containerd.toml":        containerdConfig,
		cniConfig + "/10-bridge.conflist": fmt.Sprintf(bridgeConfig, c.Pods.v4(), c.Pods.v6()),
		"/etc/e2e/kubelet.yaml":           fmt.Sprintf(kubeletConfig, criSocket, cgroup, address, dnsService),
		"/etc/e2e/kube-proxy.yaml":        fmt.Sprintf(proxyConfig, c.Mode, address, podNetworks, c.Name, kubeconfig("proxy")),
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
		"--config=/etc/e2e/kubelet.yaml", "--kubeconfig="+kubeconfig(c.Name), "--node-ip="+address.String()+","+c.Addresses.v6().Addr().String(),
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
  sandbox_image = "` + AppImage + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
`

// %s: the node's pods, of either family.
const bridgeConfig = `{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}], [{"subnet": "%s"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
`

// Runtime's socket, cgroup, address, DNS service. Anyone on this private network may ask the kubelet.
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
clusterCIDR: "%s"
hostnameOverride: %s
clientConnection: {kubeconfig: %s}
conntrack: {maxPerCore: 0, min: 0}
`
