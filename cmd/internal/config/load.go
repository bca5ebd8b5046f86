package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

const (
	metaPrefix     = "ISTIO_META_"
	metaJSONPrefix = "ISTIO_METAJSON_"
)

// Source is where settings come from. Process is the usual one.
type Source struct {
	Environ []string // name=value
	Dir     string   // What the relative default paths are relative to.
	Args    []string // The command line without the program.
	CPUs    int      // How many CPUs there are, or a quota allows. 0: as the runtime sees it.
}

// Process is the running program's own environment.
func Process() Source {
	return Source{Environ: os.Environ(), Args: os.Args[1:]}
}

// Load reads a proxy's configuration and validates it. The error names every
// setting that is wrong.
func Load(src Source) (*Config, error) {
	l := loader{env: map[string]string{}, cfg: &Config{Args: src.Args}}
	for _, kv := range src.Environ {
		if k, v, ok := strings.Cut(kv, "="); ok {
			l.env[k] = v
		}
	}
	mesh, err := readMesh(filepath.Join(src.Dir, DefaultMeshFile))
	l.err(err)
	var over proxyConfig
	if text, ok := l.env["PROXY_CONFIG"]; ok {
		if err := yaml.Unmarshal([]byte(text), &over); err != nil {
			l.bad("PROXY_CONFIG", err)
		}
	}
	mesh.merge(over)

	l.node(mesh)
	l.upstreams(mesh, src.Dir)
	l.dataPlane()
	l.servers(mesh)
	l.readers(mesh, src.CPUs)
	l.drain()
	l.logging()
	l.refusals()
	l.unused()
	l.cfg.setDefaults()
	l.err(l.cfg.Validate())
	if err := errors.Join(l.errs...); err != nil {
		return nil, err
	}
	return l.cfg, nil
}

// A loader collects settings and everything that is wrong with them.
type loader struct {
	env  map[string]string
	cfg  *Config
	errs []error
}

func (l *loader) err(err error) {
	if err != nil {
		l.errs = append(l.errs, err)
	}
}

func (l *loader) bad(name string, err error) {
	l.err(fmt.Errorf("config: %s: %w", name, err))
}

func (l *loader) note(format string, args ...any) {
	l.cfg.Notes = append(l.cfg.Notes, fmt.Sprintf(format, args...))
}

// set parses the named variable into field, if it is there.
func set[T any](l *loader, name string, field *T, parse func(string) (T, error)) (found bool) {
	s, ok := l.env[name]
	if !ok {
		return false
	}
	v, err := parse(s)
	if err != nil {
		l.bad(name, err)
		return false
	}
	*field = v
	return true
}

// flag is a bool whose default is def.
func (l *loader) flag(name string, def bool) bool {
	set(l, name, &def, parseBool)
	return def
}

func parseString(s string) (string, error) { return s, nil }

func parseUint[T uint16 | uint32](bits int) func(string) (T, error) {
	return func(s string) (T, error) {
		n, err := strconv.ParseUint(s, 10, bits)
		if err != nil {
			return 0, fmt.Errorf("%q is not a number up to %d", s, uint64(1)<<bits-1)
		}
		return T(n), nil
	}
}

// nonZero refuses a zero, which in a Config would mean the default.
func nonZero[T comparable](parse func(string) (T, error)) func(string) (T, error) {
	return func(s string) (T, error) {
		v, err := parse(s)
		var zero T
		if err == nil && v == zero {
			err = fmt.Errorf("%q is not more than nothing", s)
		}
		return v, err
	}
}

func (l *loader) node(mesh proxyConfig) {
	n := &l.cfg.Node
	set(l, "NODE_NAME", &n.Name, parseString)
	set(l, "NETWORK", &n.Network, parseString)
	set(l, "CLUSTER_ID", &n.ClusterID, parseString)
	set(l, "ISTIO_META_CLUSTER_ID", &n.ClusterID, parseString)
	set(l, "CLUSTER_DOMAIN", &n.ClusterDomain, parseString)
	set(l, "TRUST_DOMAIN", &n.TrustDomain, parseString)
	set(l, "INSTANCE_IP", &n.InstanceIP, parseString)
	set(l, "POD_NAME", &n.PodName, parseString)
	set(l, "POD_NAMESPACE", &n.PodNamespace, parseString)
	set(l, "SERVICE_ACCOUNT", &n.Account, parseString)
	n.IPv4Only = !l.flag("IPV6_ENABLED", true)

	n.Metadata = mesh.metadata()
	for name, value := range l.env {
		if key, ok := strings.CutPrefix(name, metaPrefix); ok && key != "" {
			n.Metadata[key] = value
		}
		if key, ok := strings.CutPrefix(name, metaJSONPrefix); ok && key != "" {
			var v any
			if err := json.Unmarshal([]byte(value), &v); err != nil {
				l.note("%s is not JSON and is left out", name)
				continue
			}
			if n.MetadataJSON == nil {
				n.MetadataJSON = map[string]any{}
			}
			n.MetadataJSON[key] = v
		}
	}
	capture, said := n.Metadata["DNS_CAPTURE"]
	l.cfg.DNS = !said || strings.EqualFold(capture, "true")
	if addr, ok := n.Metadata["DNS_PROXY_ADDR"]; ok {
		if err := checkDNSAddr(addr); err != nil {
			l.bad("ISTIO_META_DNS_PROXY_ADDR", err)
		}
		l.note("ISTIO_META_DNS_PROXY_ADDR is not used: DNS is taken from the pod's device, no socket listens")
	}
}

// checkDNSAddr accepts localhost:PORT and ip:PORT.
func checkDNSAddr(s string) error {
	host, port, ok := strings.Cut(s, ":")
	if ok && host == "localhost" {
		if _, err := strconv.ParseUint(port, 10, 16); err == nil {
			return nil
		}
	}
	if _, err := netip.ParseAddrPort(s); err != nil {
		return fmt.Errorf("%q is neither localhost:PORT nor an address and a port", s)
	}
	return nil
}

func (l *loader) upstreams(mesh proxyConfig, dir string) {
	istiod := "https://localhost:15012"
	_, inPod := l.env["KUBERNETES_SERVICE_HOST"]
	if inPod {
		istiod = "https://istiod.istio-system.svc:15012"
	}
	l.cfg.XDS.Address, l.cfg.CA.Address = istiod, istiod
	l.cfg.TLS12 = l.env["TLS12_ENABLED"] == "true"
	if mesh.DiscoveryAddress != nil {
		l.cfg.XDS.Address = *mesh.DiscoveryAddress
	}
	for _, u := range []struct {
		env string
		up  *Upstream
	}{{"XDS", &l.cfg.XDS}, {"CA", &l.cfg.CA}} {
		set(l, u.env+"_ADDRESS", &u.up.Address, parseString)
		if u.up.Address != "" {
			if addr, err := parseAddress(u.up.Address); err == nil {
				u.up.Address = addr
			} // Validate says what is wrong with it.
		}
		set(l, "ALT_"+u.env+"_HOSTNAME", &u.up.AltHostname, parseString)
		u.up.Root = Root{File: filepath.Join(dir, DefaultRootFile)}
		set(l, u.env+"_ROOT_CA", &u.up.Root, parseRoot)
		u.up.Headers = l.headers(u.env + "_HEADER_")
	}
	token := filepath.Join(dir, DefaultTokenFile)
	if value, ok := l.env["AUTH_TOKEN"]; ok {
		if _, err := os.Stat(value); err == nil {
			l.cfg.Auth.TokenFile = value
		} else if value == "" {
			l.bad("AUTH_TOKEN", errors.New("the value is empty"))
		} else if strings.HasPrefix(value, "/") || strings.HasPrefix(value, "./") {
			// A path to nothing, sent as a token, is never what was meant.
			l.bad("AUTH_TOKEN", errors.New("the value looks like a path, but there is no such file"))
		} else {
			l.cfg.Auth.Token = value
		}
	} else if _, err := os.Stat(token); err == nil || inPod {
		// A pod that lacks the volume shall be told of the path at each attempt, and
		// not of a refusal of its requests without a token.
		l.cfg.Auth.TokenFile = token
	}
}

func (l *loader) headers(prefix string) []Header {
	var hs []Header
	for name, value := range l.env {
		key, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		key = strings.ToLower(key)
		if err := validHeader(key, value); err != nil {
			l.bad(name, err)
			continue
		}
		hs = append(hs, Header{Name: key, Value: value})
	}
	slices.SortFunc(hs, func(a, b Header) int { return strings.Compare(a.Name, b.Name) })
	return hs
}

func (l *loader) dataPlane() {
	c := l.cfg
	set(l, "INPOD_UDS", &c.AgentSocket, parseString)
	set(l, "ZTUN_OWNER_UDS", &c.OwnerSocket, parseString)
	c.NoProbeFallback = !l.flag("ZTUN_PROBE_FALLBACK", true)
	set(l, "SECRET_TTL", &c.Certs.TTL, nonZero(parseDuration))
	set(l, "CRL_PATH", &c.Certs.CRLPath, parseString)
	set(l, "HTTP2_STREAM_WINDOW_SIZE", &c.HBONE.StreamWindow, nonZero(parseUint[uint32](32)))
	set(l, "HTTP2_CONNECTION_WINDOW_SIZE", &c.HBONE.ConnectionWindow, nonZero(parseUint[uint32](32)))
	set(l, "HTTP2_FRAME_SIZE", &c.HBONE.FrameSize, nonZero(parseUint[uint32](32)))
	set(l, "POOL_MAX_STREAMS_PER_CONNECTION", &c.HBONE.MaxStreams, nonZero(parseUint[uint16](16)))
	set(l, "POOL_UNUSED_RELEASE_TIMEOUT", &c.HBONE.PoolIdle, nonZero(parseDuration))
	c.HBONE.NoBaggage = !l.flag("ENABLE_RESPONSE_BAGGAGE", true)
	c.HBONE.NoJoin = !l.flag("ZTUN_SAME_NODE_JOIN", true)

	c.Keepalive.Off = !l.flag("KEEPALIVE_ENABLED", true)
	set(l, "KEEPALIVE_TIME", &c.Keepalive.Time, nonZero(parseDuration))
	set(l, "KEEPALIVE_INTERVAL", &c.Keepalive.Interval, nonZero(parseDuration))
	var retries uint16
	if set(l, "KEEPALIVE_RETRIES", &retries, nonZero(parseUint[uint16](16))) {
		c.Keepalive.Retries = int(retries)
	}
	c.Keepalive.UserTimeout = l.flag("USER_TIMEOUT_ENABLED", false)

	switch policy := l.env["COMPLIANCE_POLICY"]; policy {
	case "":
	case "pqc":
		c.Certs.PostQuantumOnly = true
	default:
		l.bad("COMPLIANCE_POLICY", fmt.Errorf("%q is not known; pqc is", policy))
	}
}

func (l *loader) servers(mesh proxyConfig) {
	v4only := l.cfg.Node.IPv4Only
	if p := mesh.ProxyAdminPort; p != nil && *p != 0 {
		l.cfg.Listen.Admin = localhost(*p, v4only)
	}
	if p := mesh.StatsPort; p != nil && *p != 0 {
		l.cfg.Listen.Stats = wildcard(*p, v4only)
	}
}

// readers gives each of ztunnel's worker threads a device reader, but no more
// readers than there are CPUs: a reader spins while it is busy.
func (l *loader) readers(mesh proxyConfig, host int) {
	if host == 0 {
		host = runtime.GOMAXPROCS(0) // Follows the quota of the cgroup.
	}
	c := cpus{host: host}
	if s, ok := l.env["ZTUNNEL_CPU_LIMIT"]; ok {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			l.bad("ZTUNNEL_CPU_LIMIT", fmt.Errorf("%q is not a number", s))
		}
		c.count = int(n)
	}
	set(l, "ZTUNNEL_RESOURCE_CPU_LIMIT", &c.limit, parseQuantity)
	set(l, "ZTUNNEL_RESOURCE_CPU_REQUEST", &c.request, parseQuantity)
	n, err := workers(l.env["ZTUNNEL_WORKER_THREADS"], mesh.Concurrency, c)
	if err != nil {
		l.bad("ZTUNNEL_WORKER_THREADS", err)
		return
	}
	l.cfg.Readers = n
	if n > host {
		l.note("%d worker threads were asked for; %d CPUs can serve no more than that many device readers", n, host)
		l.cfg.Readers = host
	}
}

func (l *loader) drain() {
	const grace = "TERMINATION_GRACE_PERIOD_SECONDS"
	if s, ok := l.env[grace]; ok {
		n, err := strconv.ParseUint(s, 10, 31)
		switch {
		case err != nil:
			l.bad(grace, fmt.Errorf("%q is not a number of seconds", s))
		case n > 10:
			l.cfg.DrainDeadline = time.Duration(n-5) * time.Second
		default:
			l.cfg.DrainDeadline = time.Duration(max(n, 2)-1) * time.Second
		}
	}
	set(l, "CONNECTION_TERMINATION_DEADLINE", &l.cfg.DrainDeadline, nonZero(parseDuration))
}

func (l *loader) logging() {
	switch format := l.env["LOG_FORMAT"]; format {
	case "", "plain":
	case "json":
		l.cfg.Log.JSON = true
	default:
		l.bad("LOG_FORMAT", fmt.Errorf("%q is neither plain nor json", format))
	}
	set(l, "RUST_LOG", &l.cfg.Log.Filter, parseString)
	l.cfg.Log.PolicyInfo = l.flag("AUTHZ_POLICY_INFO_LOGGING", false)
}
