package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Cluster is a running one. It ends with the process that everything ends with.
type Cluster struct {
	Prepared
	*Client
	Nodes  []*Node
	istiod *process
}

// users of the apiserver: name, and what a line of its token file says of it.
var users = map[string]string{
	"admin": `admin,admin,"system:masters"`,
	"node1": `system:node:node1,node1,"system:nodes"`,
	"node2": `system:node:node2,node2,"system:nodes"`,
	"kcm":   "system:kube-controller-manager,kcm",
	"sched": "system:kube-scheduler,sched",
	"proxy": "system:kube-proxy,proxy",
}

func token(user string) string { return user + "-token" }

func kubeconfig(user string) string { return filepath.Join(workDir, user+".kubeconfig") }

// Up starts control plane, nodes and istiod, and returns once both nodes are ready.
func Up(ctx context.Context, p Prepared) (*Cluster, error) {
	c := &Cluster{Prepared: p}
	begin := time.Now()
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"network", c.bridge},
		{"control plane", c.control},
		{"nodes started", c.nodes},
		{"nodes ready", c.nodesReady},
		{"names", c.names},
		{"istiod", c.StartIstiod},
	}
	for _, s := range steps {
		if err := s.do(ctx); err != nil {
			return nil, fmt.Errorf("%w\ne2e: logs are in %s", err, p.LogDir)
		}
		progress("%-14s %4.1f s", s.name, time.Since(begin).Seconds())
	}
	return c, nil
}

func (c *Cluster) bridge(context.Context) error {
	if err := linkUp("lo"); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("e2e: bridge: %w", err)
	}
	l, err := netlink.LinkByName("br0")
	if err != nil {
		return err
	}
	if err := addAddresses(l, hostAddresses); err != nil {
		return fmt.Errorf("e2e: bridge: %w", err)
	}
	return forward()
}

// control starts etcd, the apiserver, its controllers and the scheduler.
func (c *Cluster) control(ctx context.Context) error {
	if err := c.credentials(); err != nil {
		return err
	}
	tool := func(name string) string { return filepath.Join(c.Tools, name) }
	if _, err := start(c.LogDir, "etcd", nil, tool("etcd"),
		"--data-dir="+workDir+"/etcd", "--unsafe-no-fsync", "--log-level=warn"); err != nil {
		return err
	}
	apiserver, err := start(c.LogDir, "kube-apiserver", nil, tool("kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address="+hostAddress, "--advertise-address="+hostAddress,
		"--secure-port=6443", "--cert-dir="+workDir+"/pki", "--service-cluster-ip-range="+serviceNetworks,
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+workDir+"/sa.pub",
		"--service-account-signing-key-file="+workDir+"/sa.key", "--token-auth-file="+workDir+"/tokens.csv",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--kubelet-preferred-address-types=InternalIP")
	if err != nil {
		return err
	}
	if c.Client, err = newClient(); err != nil {
		return err
	}
	if err := c.until(ctx, "the apiserver", time.Minute, func(ctx context.Context) error {
		if err := apiserver.died(); err != nil {
			return err
		}
		return c.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	}); err != nil {
		return err
	}
	if _, err := start(c.LogDir, "kube-controller-manager", nil, tool("kube-controller-manager"),
		"--kubeconfig="+kubeconfig("kcm"), "--bind-address=127.0.0.1", "--service-account-private-key-file="+workDir+"/sa.key",
		"--root-ca-file="+workDir+"/pki/apiserver.crt", "--use-service-account-credentials", "--leader-elect=false"); err != nil {
		return err
	}
	_, err = start(c.LogDir, "kube-scheduler", nil, tool("kube-scheduler"),
		"--kubeconfig="+kubeconfig("sched"), "--bind-address=127.0.0.1", "--leader-elect=false")
	return err
}

// until bounds a wait.
func (c *Cluster) until(ctx context.Context, what string, most time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, most, fmt.Errorf("after %v", most))
	defer cancel()
	return poll(ctx, what, f)
}

func (c *Cluster) credentials() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	files := map[string][]byte{
		"sa.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		"sa.pub": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}),
	}
	for user, line := range users {
		files["tokens.csv"] = fmt.Appendf(files["tokens.csv"], "%s,%s\n", token(user), line)
		files[user+".kubeconfig"] = fmt.Appendf(nil, kubeconfigFile, hostAddress, token(user))
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(workDir, name), content, 0o600); err != nil {
			return fmt.Errorf("e2e: %w", err)
		}
	}
	return nil
}

const kubeconfigFile = `apiVersion: v1
kind: Config
clusters: [{name: e2e, cluster: {server: "https://%s:6443", insecure-skip-tls-verify: true}}]
users: [{name: e2e, user: {token: %s}}]
contexts: [{name: e2e, context: {cluster: e2e, user: e2e}}]
current-context: e2e
`

// nodes starts both, joined by the bridge, all steps side by side.
func (c *Cluster) nodes(context.Context) error {
	var configs []nodeConfig
	for i, mode := range c.Modes {
		number := byte(i + 1)
		configs = append(configs, nodeConfig{
			Prepared: c.Prepared, Name: fmt.Sprintf("node%d", number), Mode: mode,
			Addresses: nodeAddresses(number), Pods: nodePods(number), Routes: map[netip.Prefix]netip.Addr{},
		})
	}
	for i, cfg := range configs {
		for _, other := range configs {
			if other.Name == cfg.Name {
				continue
			}
			for family, pods := range other.Pods {
				cfg.Routes[pods] = other.Addresses[family].Addr()
			}
		}
		for family, pods := range cfg.Pods {
			if err := addRoute(pods, cfg.Addresses[family].Addr()); err != nil {
				return fmt.Errorf("e2e: %w", err)
			}
		}
		n, err := startNode(cfg)
		if err != nil {
			return err
		}
		c.Nodes = append(c.Nodes, n)
		if err := n.plug(fmt.Sprintf("v%d", i+1)); err != nil {
			return err
		}
	}
	for _, n := range c.Nodes {
		if err := n.expect("started"); err != nil {
			return err
		}
	}
	return nil
}

// plug gives the node eth0, whose other end is a port of the bridge.
func (n *Node) plug(port string) error {
	bridge, err := netlink.LinkByName("br0")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = port, bridge.Attrs().Index
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsPid(n.pid)}); err != nil {
		return fmt.Errorf("e2e: %s: eth0: %w", n.Name, err)
	}
	if err := linkUp(port); err != nil {
		return err
	}
	_, err = n.stdin.Write([]byte("eth0\n"))
	return err
}

func (c *Cluster) nodesReady(ctx context.Context) error {
	return c.until(ctx, "the nodes to be ready", 90*time.Second, func(ctx context.Context) error {
		for _, n := range c.Nodes {
			if err := n.process.died(); err != nil {
				return err
			}
			o, err := c.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, cond := range o.Status.Conditions {
				if cond.Type == corev1.NodeReady && cond.Status != corev1.ConditionTrue {
					return errors.New(n.Name + ": " + cond.Message)
				}
			}
			if len(o.Status.Conditions) == 0 {
				return errors.New(n.Name + " has said nothing yet")
			}
		}
		return nil
	})
}

//go:embed system.yaml
var systemObjects string

// names defines what istiod and names need, and starts the cluster's DNS.
func (c *Cluster) names(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("after a minute"))
	defer cancel()
	for file := range tools.files {
		text, err := os.ReadFile(filepath.Join(c.Tools, file))
		if err != nil {
			return fmt.Errorf("e2e: %w", err)
		}
		if err := c.Apply(ctx, string(text)); err != nil {
			return err
		}
	}
	if err := c.Apply(ctx, systemObjects); err != nil {
		return err
	}
	return serveNames(c.Client, net.JoinHostPort(hostAddress, "53"))
}

// StartIstiod starts an unmodified istiod, ambient on, and waits until it is ready.
func (c *Cluster) StartIstiod(ctx context.Context) error {
	mesh := filepath.Join(workDir, "mesh.yaml")
	if err := os.WriteFile(mesh, []byte("trustDomain: cluster.local\nrootNamespace: istio-system\n"), 0o644); err != nil {
		return err
	}
	env := []string{
		"POD_NAME=istiod-1", "POD_NAMESPACE=istio-system", "SERVICE_ACCOUNT=istiod", "CLUSTER_ID=Kubernetes", "REVISION=default",
		"PILOT_CERT_PROVIDER=istiod", "PILOT_ENABLE_AMBIENT=true", "CA_TRUSTED_NODE_ACCOUNTS=istio-system/ztunnel",
		"VALIDATION_WEBHOOK_CONFIG_NAME=", "INJECTION_WEBHOOK_CONFIG_NAME=", "ISTIO_DUAL_STACK=true",
	}
	var err error
	c.istiod, err = start(c.LogDir, "istiod", env, filepath.Join(c.Tools, "pilot-discovery"), "discovery",
		"--kubeconfig="+kubeconfig("admin"), "--meshConfig="+mesh, "--networksConfig=/dev/null", "--registries=Kubernetes",
		"--grpcAddr=", "--secureGRPCAddr=:15012", "--httpAddr=127.0.0.1:18080", "--httpsAddr=127.0.0.1:15017",
		"--monitoringAddr=127.0.0.1:15014", "--ctrlz_port=0")
	if err != nil {
		return err
	}
	return c.until(ctx, "istiod", time.Minute, func(ctx context.Context) error {
		if err := c.istiod.died(); err != nil {
			return err
		}
		_, err := Fetch(ctx, "http://127.0.0.1:18080/ready")
		return err
	})
}

// StopIstiod ends istiod at once, as a crash does.
func (c *Cluster) StopIstiod() {
	_ = c.istiod.cmd.Process.Kill()
	<-c.istiod.done
}

// Istiod asks istiod's debug interface, such as /debug/syncz.
func (c *Cluster) Istiod(ctx context.Context, path string) (string, error) {
	return Fetch(ctx, "http://127.0.0.1:18080"+path)
}

// Fetch gets what answers with 200, from the cluster's outer network.
func Fetch(ctx context.Context, url string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := readSome(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: status %d: %s", url, resp.StatusCode, body)
	}
	return body, err
}
