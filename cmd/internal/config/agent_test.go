package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func loadAgent(env ...string) (*Agent, error) {
	return LoadAgent(Source{Environ: append([]string{"NODE_NAME=na"}, env...)})
}

func TestAgentDefaults(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	want := &Agent{
		NodeName: "na", PodNamespace: "istio-system", SystemNamespace: "istio-system", DNSCapture: true,
		Install: Install{Binary: filepath.Join(filepath.Dir(self), "ztun-cni"), BinDir: "/host/opt/cni/bin", NetDir: "/host/etc/cni/net.d", OwnedName: "02-ztun-cni.conflist"},
		Host:    Host{Dir: "/host", Netns: "/host/proc/1/ns/net", NetnsDir: "/var/run/netns"},
		RunDir:  "/var/run/istio-cni", StateDir: "/var/run/ztun", Socket: "/var/run/ztunnel/ztunnel.sock",
		HealthPort: 8000, MonitoringPort: 15014, LogLevel: slog.LevelInfo,
	}
	// What a chart leaves empty is as if it were not there.
	for _, env := range [][]string{nil, {"CNI_CONF_NAME=", "MONITORING_PORT=", "POD_NAMESPACE="}} {
		got, err := loadAgent(env...)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", env, diff)
		}
	}
}

func TestAgentSettings(t *testing.T) {
	got, err := loadAgent("POD_NAME=istio-cni-node-1", "POD_NAMESPACE=mesh", "SYSTEM_NAMESPACE=mesh-2", "KUBECONFIG=/k",
		"EXCLUDE_NAMESPACES= kube-system ,, a", "AMBIENT_ENABLEMENT_SELECTOR=- podSelector: {}", "AMBIENT_DNS_CAPTURE=false",
		"AMBIENT_DISABLE_SAFE_UPGRADE=true", "ZTUN_CNI_BINARY=/p", "ZTUN_CNI_BIN_DIR=/b", "MOUNTED_CNI_NET_DIR=/n", "CNI_CONF_NAME=10-x.conf",
		"ISTIO_OWNED_CNI_CONFIG=true", "ISTIO_OWNED_CNI_CONFIG_FILENAME=00-a.conflist", "ISTIO_OWNED_CNI_CONF_FILENAME=01-b.conflist", "CNI_CONF_GROUP_READ=true",
		"CNI_AGENT_RUN_DIR=/r", "ZTUN_STATE_DIR=/s", "ZTUNNEL_UDS_ADDRESS=/z", "ZTUN_PROXY_UID=1337", "ZTUN_PROXY_GID=1338",
		"ZTUN_HEALTH_PORT=1", "MONITORING_PORT=2", "LOG_LEVEL=debug", "LOG_FORMAT=json", "ZTUN_HOST_DIR=/", "ZTUN_HOST_NETNS=/proc/self/ns/net", "ZTUN_HOST_NETNS_DIR=/n",
		"CURRENT_AGENT_VERSION=1", "AMBIENT_ENABLED=true", "AMBIENT_IPV6=true", "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP=true")
	if err != nil {
		t.Fatal(err)
	}
	want := &Agent{
		NodeName: "na", PodName: "istio-cni-node-1", PodNamespace: "mesh", SystemNamespace: "mesh-2", Kubeconfig: "/k",
		ExcludeNamespaces: []string{"kube-system", "a"}, Selectors: "- podSelector: {}", NoSafeUpgrade: true,
		Install: Install{Binary: "/p", BinDir: "/b", NetDir: "/n", ConfName: "10-x.conf", Owned: true, OwnedName: "00-a.conflist", GroupRead: true},
		Host:    Host{Dir: "/", Netns: "/proc/self/ns/net", NetnsDir: "/n"}, RunDir: "/r", StateDir: "/s", Socket: "/z", ProxyUID: 1337, ProxyGID: 1338,
		HealthPort: 1, MonitoringPort: 2, LogLevel: slog.LevelDebug, LogJSON: true,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got.Host.Root() != "" || got.Host.Path("/proc") != "/proc" || (Host{Dir: "/host/"}).Path("/proc") != "/host/proc" {
		t.Errorf("paths of the host: %q, %q", got.Host.Root(), got.Host.Path("/proc"))
	}
}

func TestAgentNotes(t *testing.T) {
	for _, name := range []string{"AMBIENT_IPV6=false", "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP=false", "ENABLE_AMBIENT_DETECTION_RETRY=true",
		"NATIVE_NFTABLES=true", "HOST_PROBE_SNAT_IP=1.2.3.4", "SKIP_TLS_VERIFY=true", "CNI_NETWORK_CONFIG={}"} {
		a, err := loadAgent(name)
		if err != nil || len(a.Notes) != 1 || !strings.HasPrefix(a.Notes[0], name[:strings.Index(name, "=")]+" is not used: ") {
			t.Errorf("%s: notes %q, %v", name, a.Notes, err)
		}
	}
}

func TestAgentRefuses(t *testing.T) {
	if _, err := LoadAgent(Source{}); err == nil || !strings.Contains(err.Error(), "NODE_NAME is not set") {
		t.Errorf("without a node: %v", err)
	}
	for _, tt := range []struct{ env, want string }{
		{"AMBIENT_ENABLED=false", "AMBIENT_ENABLED: false leaves nothing"},
		{"AMBIENT_DNS_CAPTURE=yes", "AMBIENT_DNS_CAPTURE: \"yes\" is neither"},
		{"AMBIENT_IPV6=yes", "AMBIENT_IPV6"},
		{"CHAINED_CNI_PLUGIN=1", "CHAINED_CNI_PLUGIN"},
		{"CNI_CONF_NAME=../10-x.conf", "CNI_CONF_NAME"},
		{"CNI_CONF_NAME=10-x.yaml", "CNI_CONF_NAME"},
		{"ISTIO_OWNED_CNI_CONFIG=true CHAINED_CNI_PLUGIN=false", "ISTIO_OWNED_CNI_CONFIG: true needs CHAINED_CNI_PLUGIN"},
		{"ISTIO_OWNED_CNI_CONFIG=true ISTIO_OWNED_CNI_CONFIG_FILENAME=02-x.conf", "ISTIO_OWNED_CNI_CONFIG_FILENAME"},
		{"MONITORING_PORT=x", "MONITORING_PORT"},
		{"MONITORING_PORT=0", "MONITORING_PORT"},
		{"MONITORING_PORT=8000", "MONITORING_PORT 8000 is also"},
		{"LOG_LEVEL=loud", "LOG_LEVEL"},
		{"LOG_FORMAT=xml", "LOG_FORMAT"},
		{"ZTUN_PROXY_UID=-1", "ZTUN_PROXY_UID"},
		{"CNI_AGENT_RUN_DIR=run", "CNI_AGENT_RUN_DIR: \"run\" is not an absolute path"},
		{"CNI_AGENT_RUN_DIR=/" + strings.Repeat("x", 100), "CNI_AGENT_RUN_DIR is too long"},
		{"ZTUNNEL_UDS_ADDRESS=/" + strings.Repeat("x", 107), "ZTUNNEL_UDS_ADDRESS is longer"},
		{"MONITORING_PORT=x LOG_LEVEL=loud", "LOG_LEVEL"}, // Both are named.
	} {
		_, err := loadAgent(strings.Fields(tt.env)...)
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(tt.env, "MONITORING_PORT=x") && !strings.Contains(err.Error(), "MONITORING_PORT") {
			t.Errorf("%s: error %v, want one that says %q", tt.env, err, tt.want)
		}
	}
}
