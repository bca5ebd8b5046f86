package config

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// load reads a configuration from env in an empty directory with 8 CPUs.
func load(t *testing.T, env ...string) (*Config, error) {
	t.Helper()
	return Load(Source{Environ: env, Dir: t.TempDir(), Args: []string{"proxy", "ztunnel"}, CPUs: 8})
}

func mustLoad(t *testing.T, env ...string) *Config {
	t.Helper()
	c, err := load(t, env...)
	if err != nil {
		t.Fatalf("Load(%q) = %v", env, err)
	}
	return c
}

func TestDefaults(t *testing.T) {
	dir := t.TempDir()
	got, err := Load(Source{Dir: dir, CPUs: 8})
	if err != nil {
		t.Fatal(err)
	}
	root := Root{File: filepath.Join(dir, "var/run/secrets/istio/root-cert.pem")}
	want := &Config{
		Node: Node{ClusterID: "Kubernetes", ClusterDomain: "cluster.local", TrustDomain: "cluster.local",
			InstanceIP: "1.1.1.1", Metadata: map[string]string{}},
		XDS:         Upstream{Address: "https://localhost:15012", Root: root},
		CA:          Upstream{Address: "https://localhost:15012", Root: root},
		Certs:       Certs{TTL: 24 * time.Hour},
		HBONE:       HBONE{StreamWindow: 4194304, ConnectionWindow: 16777216, FrameSize: 1048576, MaxStreams: 100, PoolIdle: 5 * time.Minute},
		Keepalive:   Keepalive{Time: 180 * time.Second, Interval: 180 * time.Second, Retries: 9},
		AgentSocket: "/var/run/ztunnel/ztunnel.sock",
		OwnerSocket: "/var/run/ztunnel/ztun-owner.sock",
		Listen: Listen{
			Admin:     []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15000"), netip.MustParseAddrPort("[::1]:15000")},
			Stats:     netip.MustParseAddrPort("[::]:15020"),
			Readiness: netip.MustParseAddrPort("[::]:15021"),
		},
		Log:           Log{Filter: "info"},
		Readers:       2,
		DrainDeadline: 5 * time.Second,
		DNS:           true,
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("defaults (-want +got):\n%s", diff)
	}
}

// What a proxy in a pod tells istiod, with and without the variables that say so.
func TestAnnounced(t *testing.T) {
	for _, tt := range []struct {
		env  []string
		want map[string]string
	}{
		{nil, map[string]string{"ISTIO_VERSION": "ztun-1", "CLUSTER_ID": "Kubernetes"}},
		{[]string{"CLUSTER_ID=east", "SERVICE_ACCOUNT=ztunnel", "NETWORK=n1", "ISTIO_META_ENABLE_HBONE=true"},
			map[string]string{"ISTIO_VERSION": "ztun-1", "CLUSTER_ID": "east", "SERVICE_ACCOUNT": "ztunnel", "NETWORK": "n1", "ENABLE_HBONE": "true"}},
		{[]string{"ISTIO_META_CLUSTER_ID=west", "ISTIO_META_ISTIO_VERSION=1.31.0", "ISTIO_META_NETWORK=n2", "NETWORK=n1"},
			map[string]string{"ISTIO_VERSION": "1.31.0", "CLUSTER_ID": "west", "NETWORK": "n2"}},
	} {
		c := mustLoad(t, tt.env...)
		before := len(c.Node.Metadata)
		if diff := cmp.Diff(tt.want, c.Node.Announced("ztun-1")); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tt.env, diff)
		}
		if len(c.Node.Metadata) != before {
			t.Errorf("%q: the metadata was changed", tt.env)
		}
	}
}

// In a pod the token's volume may be missing by mistake, never on purpose.
func TestTokenInAPod(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, DefaultTokenFile)
	c, err := Load(Source{Environ: []string{"KUBERNETES_SERVICE_HOST=10.96.0.1"}, Dir: dir, CPUs: 8})
	if err != nil || c.Auth.TokenFile != path {
		t.Errorf("token file in a pod without one = %q, %v, want %q", c.Auth.TokenFile, err, path)
	}
	if c := mustLoad(t); c.Auth.TokenFile != "" {
		t.Errorf("token file elsewhere = %q, want none", c.Auth.TokenFile)
	}
}

func TestKubernetesFindsIstiod(t *testing.T) {
	c := mustLoad(t, "KUBERNETES_SERVICE_HOST=10.96.0.1")
	const want = "https://istiod.istio-system.svc:15012"
	if c.XDS.Address != want || c.CA.Address != want {
		t.Errorf("addresses = %q, %q, want %q", c.XDS.Address, c.CA.Address, want)
	}
}

// TestChart loads what ztunnel's Helm chart sets.
func TestChart(t *testing.T) {
	c := mustLoad(t, "CA_ADDRESS=istiod.istio-system.svc:15012", "XDS_ADDRESS=istiod.istio-system.svc:15012",
		"LOG_FORMAT=json", "NETWORK=network-1", "RUST_LOG=info", "RUST_BACKTRACE=1", "INPOD_ENABLED=true",
		"ISTIO_META_CLUSTER_ID=east", "TERMINATION_GRACE_PERIOD_SECONDS=30", "POD_NAME=ztunnel-x",
		"POD_NAMESPACE=istio-system", "NODE_NAME=na", "INSTANCE_IP=10.0.0.9", "SERVICE_ACCOUNT=ztunnel",
		"ZTUNNEL_CPU_LIMIT=8", "CRL_PATH=/nowhere/ca-crl.pem", "ISTIO_META_ENABLE_HBONE=true")
	if c.XDS.Address != "https://istiod.istio-system.svc:15012" || !c.Log.JSON || c.Node.Network != "network-1" ||
		c.Node.ClusterID != "east" || c.DrainDeadline != 25*time.Second || c.Node.Name != "na" {
		t.Errorf("chart: %v", c)
	}
	want := map[string]string{"CLUSTER_ID": "east", "ENABLE_HBONE": "true"}
	if diff := cmp.Diff(want, c.Node.Metadata); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
	d := c.Dump()
	if d.ZtunnelIdentity == nil || *d.ZtunnelIdentity != "spiffe://cluster.local/ns/istio-system/sa/ztunnel" {
		t.Errorf("identity in the dump = %v", d.ZtunnelIdentity)
	}
	if d.CRLPath == nil || *d.CRLPath != "/nowhere/ca-crl.pem" || c.Certs.CRLPath != *d.CRLPath {
		t.Errorf("CRL path = %q, in the dump %v", c.Certs.CRLPath, d.CRLPath)
	}
}

func TestMeshFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, DefaultMeshFile)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	const mesh = `
rootNamespace: istio-system
defaultConfig:
  discoveryAddress: istiod-a.istio-system.svc:15012
  proxyAdminPort: 15099
  statsPort: 15888
  concurrency: 3
  holdApplicationUntilProxyStarts: true
  proxyMetadata:
    ISTIO_META_A: file
    ISTIO_META_B: file
    PLAIN: file
`
	if err := os.WriteFile(file, []byte(mesh), 0o644); err != nil {
		t.Fatal(err)
	}
	env := []string{
		"PROXY_CONFIG={discoveryAddress: istiod-b:15012, proxyMetadata: {ISTIO_META_B: config, ISTIO_META_C: config}}",
		"ISTIO_META_C=env", "A=not prefixed",
	}
	c, err := Load(Source{Environ: env, Dir: dir, CPUs: 8})
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen.Admin[0].Port() != 15099 || c.Listen.Stats.Port() != 15888 || c.Listen.Readiness.Port() != 15021 {
		t.Errorf("Listen = %v", c.Listen)
	}
	if c.Readers != 3 || c.XDS.Address != "https://istiod-b:15012" {
		t.Errorf("Readers = %d, XDS = %q", c.Readers, c.XDS.Address)
	}
	want := map[string]string{"A": "file", "B": "config", "C": "env", "PLAIN": "file"}
	if diff := cmp.Diff(want, c.Node.Metadata); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
	if err := os.WriteFile(file, []byte("defaultConfig: ["), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(Source{Dir: dir, CPUs: 8}); err == nil {
		t.Error("a broken mesh file was accepted")
	}
}

func TestWorkers(t *testing.T) {
	two, zero := 2, 0
	for _, tt := range []struct {
		setting     string
		concurrency *int
		cpus        cpus
		want        int
	}{
		{"4", nil, cpus{host: 8}, 4},
		{"50%", nil, cpus{host: 8}, 4},
		{"30%", nil, cpus{host: 16}, 5},
		{"10%", nil, cpus{host: 4}, 1},
		{"0", nil, cpus{host: 8}, 8},
		{"", nil, cpus{host: 64, limit: 16}, 16},
		{"", nil, cpus{host: 64, limit: 1}, 1},
		{"", nil, cpus{host: 64, count: 32}, 8},
		{"", nil, cpus{host: 64, count: 32, request: 10}, 10},
		{"", nil, cpus{host: 64, limit: 2, request: 4}, 4},
		{"", nil, cpus{host: 2}, 1},
		{"", nil, cpus{host: 3}, 2},
		{"", nil, cpus{host: 64}, 16},
		{"", &two, cpus{host: 64, limit: 16}, 2},
		{"", &zero, cpus{host: 64, limit: 16}, 16},
		{"7", &two, cpus{host: 8}, 7},
	} {
		got, err := workers(tt.setting, tt.concurrency, tt.cpus)
		if err != nil || got != tt.want {
			t.Errorf("workers(%q, %v, %+v) = %d, %v, want %d", tt.setting, tt.concurrency, tt.cpus, got, err, tt.want)
		}
	}
	for _, s := range []string{"-1", "0%", "101%", "x", "4.5", "50 %", ""} {
		if got, err := parseWorkers(s, 8); err == nil {
			t.Errorf("parseWorkers(%q) = %d, want an error", s, got)
		}
	}
}

func TestReadersNeverExceedCPUs(t *testing.T) {
	c := mustLoad(t, "ZTUNNEL_WORKER_THREADS=64")
	if c.Readers != 8 || len(c.Notes) == 0 {
		t.Errorf("Readers = %d with notes %q, want 8 and a note", c.Readers, c.Notes)
	}
}

func TestQuantity(t *testing.T) {
	for s, want := range map[string]int{"2": 2, "1.5": 2, "500m": 1, "2500m": 3, "16": 16, "0.1": 1} {
		if got, err := parseQuantity(s); err != nil || got != want {
			t.Errorf("parseQuantity(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "0", "-1", "NaN", "Inf", "x", "5k", "0m", "1e300"} {
		if got, err := parseQuantity(s); err == nil {
			t.Errorf("parseQuantity(%q) = %d, want an error", s, got)
		}
	}
}

func TestWhomToAskAboutProbes(t *testing.T) {
	for env, want := range map[string]struct {
		socket string
		no     bool
	}{
		"INPOD_UDS=/run/x/agent.sock": {"/run/x/ztun-owner.sock", false},
		"ZTUN_OWNER_UDS=/run/y.sock":  {"/run/y.sock", false},
		"ZTUN_PROBE_FALLBACK=false":   {"/var/run/ztunnel/ztun-owner.sock", true},
		"ZTUN_PROBE_FALLBACK=true":    {"/var/run/ztunnel/ztun-owner.sock", false},
	} {
		if c := mustLoad(t, env); c.OwnerSocket != want.socket || c.NoProbeFallback != want.no {
			t.Errorf("%s: %s, %v, want %+v", env, c.OwnerSocket, c.NoProbeFallback, want)
		}
	}
}

func TestSameNodeJoin(t *testing.T) {
	for value, want := range map[string]bool{"": true, "ZTUN_SAME_NODE_JOIN=true": true, "ZTUN_SAME_NODE_JOIN=false": false} {
		if c := mustLoad(t, value); c.HBONE.NoJoin == want || c.Dump().SameNodeJoin != want {
			t.Errorf("%q: NoJoin = %v, in the dump %v", value, c.HBONE.NoJoin, c.Dump().SameNodeJoin)
		}
	}
	if _, err := load(t, "ZTUN_SAME_NODE_JOIN=perhaps"); err == nil {
		t.Error("nonsense was accepted")
	}
}

func TestDrain(t *testing.T) {
	for _, tt := range []struct {
		env  []string
		want time.Duration
	}{
		{[]string{"TERMINATION_GRACE_PERIOD_SECONDS=30"}, 25 * time.Second},
		{[]string{"TERMINATION_GRACE_PERIOD_SECONDS=11"}, 6 * time.Second},
		{[]string{"TERMINATION_GRACE_PERIOD_SECONDS=10"}, 9 * time.Second},
		{[]string{"TERMINATION_GRACE_PERIOD_SECONDS=1"}, time.Second},
		{[]string{"TERMINATION_GRACE_PERIOD_SECONDS=0"}, time.Second},
		{[]string{"TERMINATION_GRACE_PERIOD_SECONDS=30", "CONNECTION_TERMINATION_DEADLINE=7s"}, 7 * time.Second},
	} {
		if c := mustLoad(t, tt.env...); c.DrainDeadline != tt.want {
			t.Errorf("%q: DrainDeadline = %v, want %v", tt.env, c.DrainDeadline, tt.want)
		}
	}
}

func TestRefused(t *testing.T) {
	for _, tt := range []struct{ env, want string }{
		{"PROXY_MODE=dedicated", "not supported"},
		{"PROXY_MODE=other", "neither shared nor dedicated"},
		{"ENABLE_PROXY=false", "nothing to do"},
		{"ENABLE_PROXY=yes", "neither true nor false"},
		{"FAKE_CA=true", "no built-in CA"},
		{"LOCAL_XDS_PATH=/x.yaml", "not read"},
		{"XDS_ON_DEMAND=true", "DNS capture"},
		{"UNSTABLE_ENABLE_SOCKS5=true", "SOCKS5"},
		{"XDS_ADDRESS=", "needs a control plane"},
		{"CA_ADDRESS=", "needs a control plane"},
		{"XDS_ADDRESS=http://istiod:15010", "only https"},
		{"XDS_ADDRESS=https://user:hunter2@istiod:15012", "nothing more"},
		{"XDS_ADDRESS=istiod:99999", "not a port"},
		{"ISTIO_META_DNS_PROXY_ADDR=nonsense", "DNS_PROXY_ADDR"},
		{"XDS_HEADER_=x", "no name"},
		{"XDS_HEADER_a b=x", "not a name"},
		{"CA_HEADER_x=\x01", "not printable"},
		{"SECRET_TTL=0s", "SECRET_TTL"},
		{"SECRET_TTL=soon", "SECRET_TTL"},
		{"HTTP2_FRAME_SIZE=100", "HTTP2_FRAME_SIZE"},
		{"HTTP2_STREAM_WINDOW_SIZE=4294967295", "HTTP2_STREAM_WINDOW_SIZE"},
		{"POOL_MAX_STREAMS_PER_CONNECTION=70000", "POOL_MAX_STREAMS"},
		{"ZTUNNEL_RESOURCE_CPU_LIMIT=0", "amount of CPU"},
		{"ZTUNNEL_CPU_LIMIT=x", "not a number"},
		{"PACKET_MARK=0x539", "32 bits"},
		{"INSTANCE_IP=here", "not an address"},
		{"LOG_FORMAT=xml", "neither plain nor json"},
		{"COMPLIANCE_POLICY=fips", "not known"},
		{"AUTH_TOKEN=/no/such/token", "no such file"},
		{"XDS_ROOT_CA=/no/such/root", "neither a file"},
		{"KEEPALIVE_TIME=1ms", "keepalive"},
		{"KEEPALIVE_INTERVAL=40000s", "keepalive"},
		{"INPOD_UDS=" + strings.Repeat("x", 108), "107"},
		{"ZTUN_OWNER_UDS=" + strings.Repeat("x", 108), "ZTUN_OWNER_UDS"},
		{"ZTUN_PROBE_FALLBACK=perhaps", "ZTUN_PROBE_FALLBACK"},
	} {
		_, err := load(t, tt.env)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want one that says %q", tt.env, err, tt.want)
		}
	}
}

func TestErrorsAreJoined(t *testing.T) {
	_, err := load(t, "PROXY_MODE=dedicated", "SECRET_TTL=soon", "LOG_FORMAT=xml", "HTTP2_FRAME_SIZE=1")
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"PROXY_MODE", "SECRET_TTL", "LOG_FORMAT", "HTTP2_FRAME_SIZE"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, err)
		}
	}
}

func TestHeadersAndTokens(t *testing.T) {
	c := mustLoad(t, "XDS_HEADER_X-B=2", "XDS_HEADER_X-A=1", "CA_HEADER_authorization=hunter2",
		"AUTH_TOKEN=tok-hunter2", "ISTIO_META_API_TOKEN=hunter2", "ISTIO_METAJSON_N=[1]", "ISTIO_METAJSON_BAD={")
	if want := []Header{{"x-a", "1"}, {"x-b", "2"}}; !slices.Equal(c.XDS.Headers, want) {
		t.Errorf("XDS headers = %v, want %v", c.XDS.Headers, want)
	}
	if c.Auth.Token != "tok-hunter2" || len(c.Node.MetadataJSON) != 1 {
		t.Errorf("token %q, metadata %v", c.Auth.Token, c.Node.MetadataJSON)
	}
	text, err := json.Marshal(c.Dump())
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{string(text), c.String(), fmt.Sprintf("%v %+v %#v %s", c, c, c, c)} {
		if strings.Contains(shown, "hunter2") {
			t.Errorf("a secret is shown: %s", shown)
		}
	}
}

func TestRoots(t *testing.T) {
	file := filepath.Join(t.TempDir(), "root.pem")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	const inline = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	for value, want := range map[string]Root{file: {File: file}, "SYSTEM": {System: true}, inline: {PEM: []byte(inline)}} {
		c := mustLoad(t, "XDS_ROOT_CA="+value)
		if diff := cmp.Diff(want, c.XDS.Root); diff != "" {
			t.Errorf("root %.20q (-want +got):\n%s", value, diff)
		}
	}
}

// goldenLacks are keys of ztunnel's dump for sockets that ztun does not have.
var goldenLacks = []string{"dnsProxyAddr", "dnsResolverCfg", "dnsResolverOpts", "fakeSelfInbound", "inboundAddr",
	"inboundPlaintextAddr", "inpodPortReuse", "localhostAppTunnel", "outboundAddr", "packetMark",
	"preferedServiceNamespace", "proxyWorkloadInformation", "socks5Addr"}

// goldenConfig are the keys of `config` in a stock ztunnel's config_dump.
var goldenConfig = []string{"adminAddr", "altCaHostname", "altXdsHostname", "caAddress", "caHeaders", "caRootCert",
	"clusterDomain", "clusterId", "connectionWindowSize", "crlPath", "dnsProxy", "dnsProxyAddr", "dnsResolverCfg",
	"dnsResolverOpts", "enableEnhancedBaggage", "fakeCa", "fakeSelfInbound", "frameSize", "illegalPorts",
	"inboundAddr", "inboundPlaintextAddr", "inpodPortReuse", "inpodUds", "ipv6Enabled", "localNode",
	"localhostAppTunnel", "network", "numWorkerThreads", "outboundAddr", "packetMark", "poolMaxStreamsPerConn",
	"poolUnusedReleaseTimeout", "preferedServiceNamespace", "proxy", "proxyArgs", "proxyMetadata", "proxyMode",
	"proxyWorkloadInformation", "readinessAddr", "requireOriginalSource", "secretTtl", "selfTerminationDeadline",
	"socketConfig", "socks5Addr", "statsAddr", "windowSize", "xdsAddress", "xdsHeaders", "xdsOnDemand",
	"xdsRootCert", "ztunnelIdentity", "ztunnelWorkload"}

func TestDumpHasZtunnelsKeys(t *testing.T) {
	text, err := json.Marshal(mustLoad(t, "NODE_NAME=na").Dump())
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]json.RawMessage
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	for _, key := range goldenConfig {
		if _, ok := got[key]; !ok && !slices.Contains(goldenLacks, key) {
			t.Errorf("the dump lacks %q", key)
		}
	}
	for key, want := range map[string]string{
		"adminAddr":               `{"Localhost":[true,15000]}`,
		"statsAddr":               `{"SocketAddr":"[::]:15020"}`,
		"secretTtl":               `{"secs":86400,"nanos":0}`,
		"selfTerminationDeadline": `{"secs":5,"nanos":0}`,
		"illegalPorts":            `[15008,15006,15001]`,
		"proxyArgs":               `"proxy ztunnel"`,
		"localNode":               `"na"`,
		"altCaHostname":           `null`,
	} {
		if string(got[key]) != want {
			t.Errorf("dump %s = %s, want %s", key, got[key], want)
		}
	}
}
