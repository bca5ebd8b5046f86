package config

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Agent is everything that can be set on the node agent. LoadAgent fills every
// field. The variables are those of Istio's node agent; ours begin with ZTUN_.
type Agent struct {
	NodeName        string // NODE_NAME. Required.
	PodName         string // POD_NAME, of the agent. ""
	PodNamespace    string // POD_NAMESPACE, of the agent. istio-system
	SystemNamespace string // SYSTEM_NAMESPACE, where proxies are. istio-system
	Kubeconfig      string // KUBECONFIG, outside of a cluster. ""

	// ExcludeNamespaces have no pod in the mesh. EXCLUDE_NAMESPACES, a comma
	// list. None
	ExcludeNamespaces []string
	// Selectors is YAML. AMBIENT_ENABLEMENT_SELECTOR. "": Istio's own
	Selectors  string
	DNSCapture bool // AMBIENT_DNS_CAPTURE. true
	// NoSafeUpgrade removes the plugin at every stop. AMBIENT_DISABLE_SAFE_UPGRADE
	NoSafeUpgrade bool

	Install Install
	Host    Host

	RunDir   string // Holds the plugin's socket. CNI_AGENT_RUN_DIR. /var/run/istio-cni
	StateDir string // Remembers what was done to pods. ZTUN_STATE_DIR. /var/run/ztun
	// Socket is where proxies connect. ZTUNNEL_UDS_ADDRESS.
	// /var/run/ztunnel/ztunnel.sock
	Socket string
	// ProxyUID and ProxyGID own Socket. ZTUN_PROXY_UID, ZTUN_PROXY_GID. The
	// agent's
	ProxyUID, ProxyGID int

	HealthPort     uint16     // ZTUN_HEALTH_PORT. 8000
	MonitoringPort uint16     // MONITORING_PORT. 15014
	LogLevel       slog.Level // LOG_LEVEL. info
	LogJSON        bool       // LOG_FORMAT=json

	// Notes tell of settings that were accepted and change nothing.
	Notes []string
}

// Install is how the CNI plugin is installed.
type Install struct {
	Binary    string // ZTUN_CNI_BINARY. ztun-cni beside the program
	BinDir    string // ZTUN_CNI_BIN_DIR. opt/cni/bin of the host
	NetDir    string // MOUNTED_CNI_NET_DIR. etc/cni/net.d of the host
	ConfName  string // CNI_CONF_NAME. "": the one that the runtime takes
	Unchained bool   // CHAINED_CNI_PLUGIN=false
	Owned     bool   // ISTIO_OWNED_CNI_CONFIG
	OwnedName string // ISTIO_OWNED_CNI_CONFIG_FILENAME. 02-ztun-cni.conflist
	GroupRead bool   // CNI_CONF_GROUP_READ
}

// Host is where the node shows in the agent's files.
type Host struct {
	Dir string // ZTUN_HOST_DIR. /host
	// Netns is the host's network namespace. ZTUN_HOST_NETNS, for nodes whose
	// first process is in another. That of process 1
	Netns string
	// NetnsDir is the host's directory of network namespaces, which is mounted at
	// /var/run/netns below Dir. ZTUN_HOST_NETNS_DIR. /var/run/netns
	NetnsDir string
}

// Root is what is put before a path of the host's: "" on the host itself.
func (h Host) Root() string { return strings.TrimSuffix(h.Dir, "/") }

// Path is where a path of the host's is.
func (h Host) Path(name string) string { return h.Root() + name }

// LoadAgent reads the node agent's configuration. The error names every
// setting that is wrong.
func LoadAgent(src Source) (*Agent, error) {
	l := &loader{env: map[string]string{}, cfg: &Config{}}
	for _, kv := range src.Environ {
		if k, v, ok := strings.Cut(kv, "="); ok && v != "" { // A chart sets what a user left out to nothing.
			l.env[k] = v
		}
	}
	a := &Agent{
		PodNamespace: "istio-system", SystemNamespace: "istio-system", Host: Host{Dir: "/host", NetnsDir: "/var/run/netns"},
		RunDir: "/var/run/istio-cni", StateDir: "/var/run/ztun", Socket: DefaultAgentSocket,
		HealthPort: 8000, MonitoringPort: 15014,
	}
	l.agent(a)
	a.Host.Netns = a.Host.Path("/proc/1/ns/net")
	set(l, "ZTUN_HOST_NETNS", &a.Host.Netns, parseString)
	set(l, "ZTUN_HOST_NETNS_DIR", &a.Host.NetnsDir, parseString)
	l.agentInstall(&a.Install, a.Host)
	l.agentUnused()
	a.Notes = l.cfg.Notes
	l.err(a.validate())
	if err := errors.Join(l.errs...); err != nil {
		return nil, err
	}
	return a, nil
}

func (l *loader) agent(a *Agent) {
	for name, field := range map[string]*string{
		"NODE_NAME": &a.NodeName, "POD_NAME": &a.PodName, "POD_NAMESPACE": &a.PodNamespace, "SYSTEM_NAMESPACE": &a.SystemNamespace,
		"KUBECONFIG": &a.Kubeconfig, "AMBIENT_ENABLEMENT_SELECTOR": &a.Selectors,
		"CNI_AGENT_RUN_DIR": &a.RunDir, "ZTUN_STATE_DIR": &a.StateDir, "ZTUNNEL_UDS_ADDRESS": &a.Socket, "ZTUN_HOST_DIR": &a.Host.Dir,
	} {
		set(l, name, field, parseString)
	}
	set(l, "EXCLUDE_NAMESPACES", &a.ExcludeNamespaces, parseList)
	a.DNSCapture = l.flag("AMBIENT_DNS_CAPTURE", true)
	a.NoSafeUpgrade = l.flag("AMBIENT_DISABLE_SAFE_UPGRADE", false)
	set(l, "ZTUN_HEALTH_PORT", &a.HealthPort, nonZero(parseUint[uint16](16)))
	set(l, "MONITORING_PORT", &a.MonitoringPort, nonZero(parseUint[uint16](16)))
	for name, field := range map[string]*int{"ZTUN_PROXY_UID": &a.ProxyUID, "ZTUN_PROXY_GID": &a.ProxyGID} {
		var id uint32
		if set(l, name, &id, parseUint[uint32](31)) {
			*field = int(id)
		}
	}
	set(l, "LOG_LEVEL", &a.LogLevel, parseLevel)
	switch format := l.env["LOG_FORMAT"]; format {
	case "", "plain":
	case "json":
		a.LogJSON = true
	default:
		l.bad("LOG_FORMAT", fmt.Errorf("%q is neither plain nor json", format))
	}
	if !l.flag("AMBIENT_ENABLED", true) {
		l.bad("AMBIENT_ENABLED", errors.New("false leaves nothing to do: there are no sidecars here"))
	}
}

func (l *loader) agentInstall(in *Install, h Host) {
	in.BinDir, in.NetDir, in.OwnedName = h.Path("/opt/cni/bin"), h.Path("/etc/cni/net.d"), "02-ztun-cni.conflist"
	if self, err := os.Executable(); err == nil {
		in.Binary = filepath.Join(filepath.Dir(self), "ztun-cni")
	}
	// The stock chart gives the name under the first variable, Istio's program
	// reads the second.
	for _, name := range []string{"ISTIO_OWNED_CNI_CONF_FILENAME", "ISTIO_OWNED_CNI_CONFIG_FILENAME"} {
		set(l, name, &in.OwnedName, parseConfName)
	}
	set(l, "CNI_CONF_NAME", &in.ConfName, parseConfName)
	set(l, "ZTUN_CNI_BINARY", &in.Binary, parseString)
	set(l, "ZTUN_CNI_BIN_DIR", &in.BinDir, parseString)
	set(l, "MOUNTED_CNI_NET_DIR", &in.NetDir, parseString)
	in.Unchained = !l.flag("CHAINED_CNI_PLUGIN", true)
	in.Owned = l.flag("ISTIO_OWNED_CNI_CONFIG", false)
	in.GroupRead = l.flag("CNI_CONF_GROUP_READ", false)
	if in.Owned && in.Unchained {
		l.bad("ISTIO_OWNED_CNI_CONFIG", errors.New("true needs CHAINED_CNI_PLUGIN: a list of the agent's own is a chain"))
	}
	if in.Owned && filepath.Ext(in.OwnedName) != ".conflist" {
		l.bad("ISTIO_OWNED_CNI_CONFIG_FILENAME", fmt.Errorf("%q does not end in .conflist", in.OwnedName))
	}
}

// agentUnused are settings of Istio's agent that change nothing here.
func (l *loader) agentUnused() {
	for _, s := range []struct {
		name  string
		usual string // The value that asks for nothing.
		why   string
	}{
		{"AMBIENT_IPV6", "true", "what a pod has of IPv6 is always captured: leaving it out would let it past the mesh"},
		{"AMBIENT_RECONCILE_POD_RULES_ON_STARTUP", "true", "what is in pods is always kept as it must be"},
		{"ENABLE_AMBIENT_DETECTION_RETRY", "false", "the plugin never guesses: without an answer the pod waits"},
	} {
		if v, ok := l.env[s.name]; ok {
			l.flag(s.name, true)
			if v != s.usual {
				l.note("%s is not used: %s", s.name, s.why)
			}
		}
	}
	for _, s := range []struct{ names, why string }{
		{"CNI_NETWORK_CONFIG CNI_NETWORK_CONFIG_FILE", "the plugin's entry in the chain is always the agent's"},
		{"KUBECONFIG_MODE KUBE_CA_FILE SKIP_TLS_VERIFY", "the plugin does not talk to Kubernetes"},
		{"NATIVE_NFTABLES FORCE_IPTABLES_BINARY AMBIENT_USE_SCOPED_XTABLES_LOCKING", "there are no iptables or nftables rules"},
		{"HOST_PROBE_SNAT_IP HOST_PROBE_SNAT_IPV6", "the source of probes is not translated"},
		{"AMBIENT_ENABLE_AWS_BRANCH_ENI_PROBE", "the host's routing is left alone"},
		{"REPAIR_ENABLED REPAIR_REPAIR_PODS REPAIR_DELETE_PODS REPAIR_LABEL_PODS REPAIR_RUN_AS_DAEMON", "there are no sidecars to repair"},
	} {
		for _, name := range strings.Fields(s.names) {
			if _, ok := l.env[name]; ok {
				l.note("%s is not used: %s", name, s.why)
			}
		}
	}
}

func (a *Agent) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("config: "+format, args...)) }
	if a.NodeName == "" {
		bad("NODE_NAME is not set: the agent does not know which pods are its own (the chart takes it from spec.nodeName)")
	}
	for _, p := range []struct{ name, path string }{
		{"CNI_AGENT_RUN_DIR", a.RunDir}, {"ZTUN_STATE_DIR", a.StateDir}, {"ZTUNNEL_UDS_ADDRESS", a.Socket}, {"ZTUN_HOST_DIR", a.Host.Dir},
		{"ZTUN_HOST_NETNS", a.Host.Netns}, {"ZTUN_HOST_NETNS_DIR", a.Host.NetnsDir},
		{"MOUNTED_CNI_NET_DIR", a.Install.NetDir}, {"ZTUN_CNI_BIN_DIR", a.Install.BinDir}, {"ZTUN_CNI_BINARY", a.Install.Binary},
	} {
		if !filepath.IsAbs(p.path) {
			bad("%s: %q is not an absolute path", p.name, p.path)
		}
	}
	if len(a.Socket) > 107 {
		bad("ZTUNNEL_UDS_ADDRESS is longer than the 107 bytes that a unix socket's path may have")
	}
	if len(a.RunDir)+len("/pluginevent.sock") > 107 {
		bad("CNI_AGENT_RUN_DIR is too long: a unix socket's path may have 107 bytes")
	}
	if a.HealthPort == a.MonitoringPort {
		bad("MONITORING_PORT %d is also the port of health checks", a.MonitoringPort)
	}
	return errors.Join(errs...)
}

// parseList reads a comma list. Blanks around items and empty ones are dropped.
func parseList(s string) ([]string, error) {
	items := strings.Split(s, ",")
	for i := range items {
		items[i] = strings.TrimSpace(items[i])
	}
	return slices.DeleteFunc(items, func(s string) bool { return s == "" }), nil
}

func parseConfName(s string) (string, error) {
	if ext := filepath.Ext(s); s != filepath.Base(s) || ext != ".conf" && ext != ".conflist" && ext != ".json" || s == ext {
		return "", fmt.Errorf("%q is not the name of a .conf or .conflist file", s)
	}
	return s, nil
}

func parseLevel(s string) (slog.Level, error) {
	var level slog.Level
	switch s {
	case "warning":
		s = "warn"
	case "fatal", "none": // Istio has them.
		s = "error"
	}
	if level.UnmarshalText([]byte(s)) != nil {
		return 0, fmt.Errorf("%q is none of debug, info, warn and error", s)
	}
	return level, nil
}
