package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// redacted stands for a secret in a dump.
const redacted = "<redacted>"

// Dump is the configuration under ztunnel's names and in its shapes, as the
// admin server shows it. It holds no secret: neither tokens, nor the values of
// headers, nor those of metadata whose names say that they are secret.
type Dump struct {
	Proxy                  bool              `json:"proxy"`
	DNSProxy               bool              `json:"dnsProxy"` // Nothing answers yet.
	WindowSize             uint32            `json:"windowSize"`
	ConnectionWindowSize   uint32            `json:"connectionWindowSize"`
	FrameSize              uint32            `json:"frameSize"`
	PoolMaxStreamsPerConn  uint16            `json:"poolMaxStreamsPerConn"`
	PoolUnusedRelease      duration          `json:"poolUnusedReleaseTimeout"`
	AdminAddr              any               `json:"adminAddr"`
	StatsAddr              any               `json:"statsAddr"`
	ReadinessAddr          any               `json:"readinessAddr"`
	IllegalPorts           []int             `json:"illegalPorts"`
	Network                string            `json:"network"`
	LocalNode              *string           `json:"localNode"`
	ProxyMode              string            `json:"proxyMode"`
	ClusterID              string            `json:"clusterId"`
	ClusterDomain          string            `json:"clusterDomain"`
	CAAddress              string            `json:"caAddress"`
	CARootCert             any               `json:"caRootCert"`
	AltCAHostname          *string           `json:"altCaHostname"`
	XDSAddress             string            `json:"xdsAddress"`
	XDSRootCert            any               `json:"xdsRootCert"`
	AltXDSHostname         *string           `json:"altXdsHostname"`
	SecretTTL              duration          `json:"secretTtl"`
	XDSOnDemand            bool              `json:"xdsOnDemand"`
	FakeCA                 bool              `json:"fakeCa"`
	SelfTermination        duration          `json:"selfTerminationDeadline"`
	ProxyMetadata          map[string]string `json:"proxyMetadata"`
	NumWorkerThreads       int               `json:"numWorkerThreads"`
	RequireOriginalSource  *bool             `json:"requireOriginalSource"`
	ProxyArgs              string            `json:"proxyArgs"`
	InpodUDS               string            `json:"inpodUds"`
	SocketConfig           socketConfig      `json:"socketConfig"`
	XDSHeaders             [][2]string       `json:"xdsHeaders"`
	CAHeaders              [][2]string       `json:"caHeaders"`
	ZtunnelIdentity        *string           `json:"ztunnelIdentity"`
	ZtunnelWorkload        *ownWorkload      `json:"ztunnelWorkload"`
	IPv6Enabled            bool              `json:"ipv6Enabled"`
	CRLPath                *string           `json:"crlPath"`
	EnableEnhancedBaggage  bool              `json:"enableEnhancedBaggage"`
	PostQuantumKeyExchange string            `json:"postQuantumKeyExchange"` // Ours: "preferred" or "only".
	SameNodeJoin           bool              `json:"sameNodeJoin"`           // Ours.
}

type socketConfig struct {
	KeepaliveTime      duration `json:"keepaliveTime"`
	KeepaliveInterval  duration `json:"keepaliveInterval"`
	KeepaliveRetries   int      `json:"keepaliveRetries"`
	KeepaliveEnabled   bool     `json:"keepaliveEnabled"`
	UserTimeoutEnabled bool     `json:"userTimeoutEnabled"`
}

type ownWorkload struct {
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

// duration is printed as ztunnel prints it: {"secs":5,"nanos":0}.
type duration time.Duration

func (d duration) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, `{"secs":%d,"nanos":%d}`,
		time.Duration(d)/time.Second, time.Duration(d)%time.Second), nil
}

// Dump shows c without its secrets.
func (c *Config) Dump() Dump {
	d := Dump{
		Proxy:                 true,
		WindowSize:            c.HBONE.StreamWindow,
		ConnectionWindowSize:  c.HBONE.ConnectionWindow,
		FrameSize:             c.HBONE.FrameSize,
		PoolMaxStreamsPerConn: c.HBONE.MaxStreams,
		PoolUnusedRelease:     duration(c.HBONE.PoolIdle),
		AdminAddr:             map[string]any{"Localhost": []any{!c.Node.IPv4Only, c.adminPort()}},
		StatsAddr:             socketAddr(c.Listen.Stats),
		ReadinessAddr:         socketAddr(c.Listen.Readiness),
		IllegalPorts:          []int{15008, 15006, 15001},
		Network:               c.Node.Network,
		LocalNode:             optional(c.Node.Name),
		ProxyMode:             "Shared",
		ClusterID:             c.Node.ClusterID,
		ClusterDomain:         c.Node.ClusterDomain,
		CAAddress:             c.CA.Address,
		CARootCert:            c.CA.Root.dump(),
		AltCAHostname:         optional(c.CA.AltHostname),
		XDSAddress:            c.XDS.Address,
		XDSRootCert:           c.XDS.Root.dump(),
		AltXDSHostname:        optional(c.XDS.AltHostname),
		SecretTTL:             duration(c.Certs.TTL),
		SelfTermination:       duration(c.DrainDeadline),
		ProxyMetadata:         redactMetadata(c.Node.Metadata),
		NumWorkerThreads:      c.Readers,
		ProxyArgs:             strings.Join(c.Args, " "),
		InpodUDS:              c.AgentSocket,
		SocketConfig: socketConfig{
			KeepaliveTime:      duration(c.Keepalive.Time),
			KeepaliveInterval:  duration(c.Keepalive.Interval),
			KeepaliveRetries:   c.Keepalive.Retries,
			KeepaliveEnabled:   !c.Keepalive.Off,
			UserTimeoutEnabled: c.Keepalive.UserTimeout,
		},
		XDSHeaders:             redactHeaders(c.XDS.Headers),
		CAHeaders:              redactHeaders(c.CA.Headers),
		IPv6Enabled:            !c.Node.IPv4Only,
		CRLPath:                optional(c.Certs.CRLPath),
		EnableEnhancedBaggage:  !c.HBONE.NoBaggage,
		PostQuantumKeyExchange: "preferred",
		SameNodeJoin:           !c.HBONE.NoJoin,
	}
	if c.Certs.PostQuantumOnly {
		d.PostQuantumKeyExchange = "only"
	}
	if n := c.Node; n.PodName != "" && n.PodNamespace != "" && n.Account != "" {
		d.ZtunnelWorkload = &ownWorkload{Name: n.PodName, Namespace: n.PodNamespace, ServiceAccount: n.Account}
		d.ZtunnelIdentity = optional(fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", n.TrustDomain, n.PodNamespace, n.Account))
	}
	return d
}

// String is the Dump as JSON, and thus safe to log.
func (c *Config) String() string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(c.Dump()); err != nil {
		return "config: " + err.Error()
	}
	return strings.TrimSpace(b.String())
}

// Format keeps secrets out of every verb, %#v too.
func (c *Config) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(c.String())) }

func (c *Config) adminPort() uint16 {
	if len(c.Listen.Admin) == 0 {
		return 0
	}
	return c.Listen.Admin[0].Port()
}

func socketAddr(a netip.AddrPort) any { return map[string]string{"SocketAddr": a.String()} }

func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func (r Root) dump() any {
	switch {
	case r.System:
		return "Default"
	case r.PEM != nil:
		return "Static"
	}
	return map[string]string{"File": r.File}
}

func redactHeaders(hs []Header) [][2]string {
	out := make([][2]string, 0, len(hs))
	for _, h := range hs {
		out = append(out, [2]string{h.Name, redacted})
	}
	return out
}

func redactMetadata(m map[string]string) map[string]string {
	out := make(map[string]string, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out[k] = m[k]
		for _, word := range []string{"TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "PRIVATE"} {
			if strings.Contains(strings.ToUpper(k), word) {
				out[k] = redacted
			}
		}
	}
	return out
}
