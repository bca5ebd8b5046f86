// Package config reads what ztun-proxy is told by its environment and by the
// mesh configuration file. The names are ztunnel's, so that its chart works.
//
// It is the only place that reads the environment. Everything else gets a
// Config, which does not change while the program runs.
package config

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"time"
)

// Config is everything that can be set on a proxy. The zero value of a field
// is the default named on it. Load fills every field.
type Config struct {
	Node Node
	XDS  Upstream // Where workloads, services and policies come from.
	CA   Upstream // Where certificates come from.
	Auth Auth     // Who the proxy is, towards both.

	Certs     Certs
	HBONE     HBONE
	Keepalive Keepalive
	Listen    Listen
	Log       Log

	// AgentSocket is where the node agent listens. /var/run/ztunnel/ztunnel.sock
	AgentSocket string
	// OwnerSocket is where it says whose a connection from the node is.
	// ztun-owner.sock beside AgentSocket
	OwnerSocket string
	// NoProbeFallback: while the agent does not say, no connection from the node
	// passes as a kubelet's probe. Else those to probed ports do.
	NoProbeFallback bool
	// Readers is how many threads read devices. 2, or as Load finds the machine
	Readers int
	// DrainDeadline is how long connections may go on after SIGTERM. 5s
	DrainDeadline time.Duration
	// TLS12 allows TLS 1.2 towards the control plane. Between workloads it is
	// never spoken.
	TLS12 bool
	// DNS says that the DNS queries which pods were told to send to the proxy are
	// to be answered by it. Until that is built they go on to the app's server.
	DNS bool
	// Args is the command line, as it is shown in the dump.
	Args []string
	// Notes tell of settings that were accepted and change nothing. They are
	// for the log.
	Notes []string
}

// Node is who and where the proxy is.
type Node struct {
	Name          string // The node's name. "": no workload is known as local.
	Network       string // The network the node is on. ""
	ClusterID     string // Kubernetes
	ClusterDomain string // cluster.local
	TrustDomain   string // Of the proxy's own identity. cluster.local
	InstanceIP    string // 1.1.1.1, as ztunnel says when nobody told it
	PodName       string // The proxy's own pod. ""
	PodNamespace  string // ""
	Account       string // The proxy's own service account. ""
	// Metadata is what the control plane is told about this proxy: strings.
	Metadata map[string]string
	// MetadataJSON is more of it, of any type that JSON has.
	MetadataJSON map[string]any
	// IPv4Only: the node has no IPv6.
	IPv4Only bool
}

// Announced is Metadata and what else istiod wants to know of a proxy: it finds
// the cluster and the network by it, holds the account against the token, and
// shows the version, here ours, in its list of proxies.
func (n *Node) Announced(version string) map[string]string {
	out := map[string]string{"ISTIO_VERSION": version, "CLUSTER_ID": n.ClusterID}
	if n.Account != "" {
		out["SERVICE_ACCOUNT"] = n.Account
	}
	if n.Network != "" {
		out["NETWORK"] = n.Network
	}
	maps.Copy(out, n.Metadata)
	return out
}

// Upstream is a gRPC server of the control plane.
type Upstream struct {
	// Address is an https URL. https://localhost:15012, in Kubernetes
	// https://istiod.istio-system.svc:15012
	Address string
	Root    Root
	// AltHostname is one more server name that is accepted. ""
	AltHostname string
	// Headers go with every call, in this order.
	Headers []Header
}

// Header is one entry of gRPC metadata. Its value is a secret.
type Header struct{ Name, Value string }

// Root says whom to believe as a server. The zero value is a file at
// DefaultRootFile.
type Root struct {
	File   string // Read again whenever it is needed.
	System bool   // The machine's own roots.
	PEM    []byte // As given.
}

// Source is r as the clients of the control plane take it: a path, SYSTEM, or PEM.
func (r Root) Source() string {
	switch {
	case r.System:
		return "SYSTEM"
	case r.PEM != nil:
		return string(r.PEM)
	}
	return r.File
}

// Pairs are the headers as the clients of the control plane take them.
func (u Upstream) Pairs() [][2]string {
	var out [][2]string
	for _, h := range u.Headers {
		out = append(out, [2]string{h.Name, h.Value})
	}
	return out
}

// Auth is how the proxy shows who it is. Zero: not at all.
type Auth struct {
	TokenFile string // Read again for each call.
	Token     string // A token that never changes. A secret.
}

// Certs is about the workloads' certificates.
type Certs struct {
	// TTL is how long they shall be valid. 24h
	TTL time.Duration
	// PostQuantumOnly leaves X25519MLKEM768 as the only key exchange.
	PostQuantumOnly bool
	// CRLPath is a file of certificates that their issuers have revoked. It is
	// read again when it changes, and need not be there. "": none
	CRLPath string
}

// HBONE is what ztun tells its peers, and the limits of the pool.
type HBONE struct {
	StreamWindow     uint32 // Bytes. 4194304
	ConnectionWindow uint32 // Bytes. 16777216
	FrameSize        uint32 // Bytes. 1048576
	MaxStreams       uint16 // Streams on one pooled connection. 100
	PoolIdle         time.Duration
	NoBaggage        bool // Neither send nor believe baggage.
	// NoJoin sends streams between pods of this node through tunnels too. They
	// are handed over in memory otherwise.
	NoJoin bool
}

// maxKeepalive is what kernels take (tcp(7)).
const maxKeepalive = 32767 * time.Second

// Keepalive is TCP keepalive on both legs.
type Keepalive struct {
	Off         bool
	Time        time.Duration // 180s
	Interval    time.Duration // 180s
	Retries     int           // 9
	UserTimeout bool          // Give up on unacknowledged data after Time + Retries*Interval.
}

// Listen is where the proxy's own HTTP servers listen.
type Listen struct {
	Admin     []netip.AddrPort // 127.0.0.1:15000 and [::1]:15000
	Stats     netip.AddrPort   // [::]:15020
	Readiness netip.AddrPort   // [::]:15021
}

// Log is how much is logged, and in which form.
type Log struct {
	JSON bool
	// Filter is a comma list of levels and target=level items. info
	Filter string
	// PolicyInfo logs policy decisions at info rather than debug.
	PolicyInfo bool
}

// What the environment leaves unsaid.
const (
	DefaultAgentSocket = "/var/run/ztunnel/ztunnel.sock"
	ownerSocketName    = "ztun-owner.sock" // As in package owner.
	DefaultRootFile    = "./var/run/secrets/istio/root-cert.pem"
	DefaultTokenFile   = "./var/run/secrets/tokens/istio-token"
	DefaultMeshFile    = "./etc/istio/config/mesh"

	defaultAdminPort     = 15000
	defaultStatsPort     = 15020
	defaultReadinessPort = 15021
)

// setDefaults gives every field that was left zero its default.
func (c *Config) setDefaults() {
	fill(&c.Node.ClusterID, "Kubernetes")
	fill(&c.Node.ClusterDomain, "cluster.local")
	fill(&c.Node.TrustDomain, "cluster.local")
	fill(&c.Node.InstanceIP, "1.1.1.1")
	for _, u := range []*Upstream{&c.XDS, &c.CA} {
		if u.Root.File == "" && !u.Root.System && u.Root.PEM == nil {
			u.Root.File = DefaultRootFile
		}
	}
	fill(&c.Certs.TTL, 24*time.Hour)
	fill(&c.HBONE.StreamWindow, 4<<20)
	fill(&c.HBONE.ConnectionWindow, 16<<20)
	fill(&c.HBONE.FrameSize, 1<<20)
	fill(&c.HBONE.MaxStreams, 100)
	fill(&c.HBONE.PoolIdle, 5*time.Minute)
	fill(&c.Keepalive.Time, 180*time.Second)
	fill(&c.Keepalive.Interval, 180*time.Second)
	fill(&c.Keepalive.Retries, 9)
	if len(c.Listen.Admin) == 0 {
		c.Listen.Admin = localhost(defaultAdminPort, c.Node.IPv4Only)
	}
	fill(&c.Listen.Stats, wildcard(defaultStatsPort, c.Node.IPv4Only))
	fill(&c.Listen.Readiness, wildcard(defaultReadinessPort, c.Node.IPv4Only))
	fill(&c.AgentSocket, DefaultAgentSocket)
	fill(&c.OwnerSocket, filepath.Join(filepath.Dir(c.AgentSocket), ownerSocketName))
	fill(&c.Readers, 2)
	fill(&c.DrainDeadline, 5*time.Second)
	fill(&c.Log.Filter, "info")
}

func fill[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func localhost(port uint16, v4only bool) []netip.AddrPort {
	addrs := []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)}
	if !v4only {
		addrs = append(addrs, netip.AddrPortFrom(netip.IPv6Loopback(), port))
	}
	return addrs
}

func wildcard(port uint16, v4only bool) netip.AddrPort {
	if v4only {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), port)
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), port)
}

// Validate says everything that is wrong with c, not only the first thing.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("config: "+format, args...)) }

	for _, u := range []struct {
		env string
		up  *Upstream
	}{{"XDS", &c.XDS}, {"CA", &c.CA}} {
		if err := u.up.validate(u.env); err != nil {
			errs = append(errs, err)
		}
	}
	// RFC 9113 section 6.5.2 bounds both.
	const maxWindow, minFrame, maxFrame = 1<<31 - 1, 1 << 14, 1<<24 - 1
	if w := c.HBONE.StreamWindow; w == 0 || w > maxWindow {
		bad("HTTP2_STREAM_WINDOW_SIZE %d is not in 1..%d", w, maxWindow)
	}
	if w := c.HBONE.ConnectionWindow; w < 65535 || w > maxWindow {
		bad("HTTP2_CONNECTION_WINDOW_SIZE %d is not in 65535..%d", w, maxWindow)
	}
	if f := c.HBONE.FrameSize; f < minFrame || f > maxFrame {
		bad("HTTP2_FRAME_SIZE %d is not in %d..%d", f, minFrame, maxFrame)
	}
	if c.HBONE.MaxStreams == 0 {
		bad("POOL_MAX_STREAMS_PER_CONNECTION is 0: no connection could ever be used")
	}
	if c.Certs.TTL < time.Minute {
		bad("SECRET_TTL %v is less than a minute", c.Certs.TTL)
	}
	if c.Readers < 1 || c.Readers > 1024 {
		bad("%d worker threads are not in 1..1024", c.Readers)
	}
	if c.DrainDeadline < 0 {
		bad("the drain deadline %v is negative", c.DrainDeadline)
	}
	if c.AgentSocket == "" {
		bad("INPOD_UDS is empty")
	} else if len(c.AgentSocket) > 107 {
		bad("INPOD_UDS is longer than the 107 bytes that a unix socket's path may have")
	}
	if len(c.OwnerSocket) > 107 {
		bad("ZTUN_OWNER_UDS is longer than the 107 bytes that a unix socket's path may have")
	}
	if _, err := netip.ParseAddr(c.Node.InstanceIP); err != nil {
		bad("INSTANCE_IP %q is not an address", c.Node.InstanceIP)
	}
	if k := c.Keepalive; min(k.Time, k.Interval) < time.Second || max(k.Time, k.Interval) > maxKeepalive || k.Retries < 1 || k.Retries > 127 {
		bad("keepalive needs 1s..%v of KEEPALIVE_TIME and KEEPALIVE_INTERVAL, and 1..127 KEEPALIVE_RETRIES", maxKeepalive)
	}
	return errors.Join(errs...)
}
