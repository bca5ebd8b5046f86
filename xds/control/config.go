package control

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"
)

// Config says what to serve, as whom, and within which bounds. Zero values
// mean the defaults named on the fields.
type Config struct {
	// Dir is the directory of YAML to serve. Exactly one of Dir and Static.
	Dir string
	// Static is a directory held in memory, for tests and embedders.
	Static *Static

	// State is the directory for the CA, the token key and root-cert.pem. It is
	// made with mode 0700 when missing. Empty: everything is kept in memory and
	// lost with the process.
	State string
	// CACert, CAKey and CARoot name PEM files of a CA made elsewhere, instead of
	// the one in State. CACert holds the signing certificate first, then its
	// intermediates; CARoot the roots, and may be empty if CACert ends in one.
	CACert, CAKey, CARoot string

	Mesh   Mesh
	Limits Limits

	// Hosts are the names and addresses of the server's own certificate besides
	// localhost, 127.0.0.1, ::1 and the address it listens on.
	Hosts []string

	// Debounce is how long the directory must be quiet before it is read. 100 ms.
	Debounce time.Duration
	// Rescan is how often the directory is read without being told. 15 s.
	Rescan time.Duration
	// OnLoad is told of each reading of the directory that found something new.
	// It is called from one goroutine and must not block.
	OnLoad func(Report)
	// PodAddrs gives the addresses of pods whose YAML has none. May be nil.
	PodAddrs func(namespace, name string) []netip.Addr

	Log *slog.Logger
	// Now is the clock of tokens and certificates. time.Now.
	Now func() time.Time
}

// Mesh is what the directory does not say about the mesh it describes.
type Mesh struct {
	TrustDomain   string // cluster.local
	ClusterDomain string // cluster.local
	ClusterID     string // Kubernetes
	RootNamespace string // istio-system
	// Network of every pod. Empty: the root namespace's label
	// topology.istio.io/network, or the default network.
	Network string
	// ServiceRanges give Services without a clusterIP their addresses, at most
	// one range a family; the first one's family is the primary one.
	// 10.96.0.0/16 and fd00:96::/112.
	ServiceRanges []netip.Prefix
	// ExcludeNamespaces are never enrolled. kube-system.
	ExcludeNamespaces []string
}

// Limits bound what clients may ask for.
type Limits struct {
	CertTTL        time.Duration // longest validity of a workload certificate, and the default: 24 h
	Connections    int           // TCP connections at a time: 1024
	StreamsPerNode int           // ADS streams of one node at a time: 8
	Names          int           // names one stream may subscribe to: 100,000
}

// withDefaults returns c with every unset field filled in.
func (c Config) withDefaults() Config {
	setDefault(&c.Debounce, 100*time.Millisecond)
	setDefault(&c.Rescan, 15*time.Second)
	setDefault(&c.Limits.CertTTL, 24*time.Hour)
	setDefault(&c.Limits.Connections, 1024)
	setDefault(&c.Limits.StreamsPerNode, 8)
	setDefault(&c.Limits.Names, 100_000)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	c.Mesh = c.Mesh.withDefaults()
	return c
}

func (m Mesh) withDefaults() Mesh {
	setDefault(&m.TrustDomain, "cluster.local")
	setDefault(&m.ClusterDomain, "cluster.local")
	setDefault(&m.ClusterID, "Kubernetes")
	setDefault(&m.RootNamespace, "istio-system")
	if m.ServiceRanges == nil {
		m.ServiceRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")}
	}
	if m.ExcludeNamespaces == nil {
		m.ExcludeNamespaces = []string{"kube-system"}
	}
	return m
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate names everything that is wrong with c at once.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if (c.Dir == "") == (c.Static == nil) {
		bad("control: exactly one of Dir and Static must be set")
	}
	if (c.CACert == "") != (c.CAKey == "") {
		bad("control: CACert and CAKey go together")
	}
	if c.CARoot != "" && c.CACert == "" {
		bad("control: CARoot needs CACert")
	}
	for name, d := range sorted(map[string]time.Duration{"Debounce": c.Debounce, "Rescan": c.Rescan, "Limits.CertTTL": c.Limits.CertTTL}) {
		if d < 0 {
			bad("control: %s %v is negative", name, d)
		}
	}
	if c.Limits.Connections < 0 || c.Limits.StreamsPerNode < 0 || c.Limits.Names < 0 {
		bad("control: a limit is negative")
	}
	errs = append(errs, c.Mesh.validate()...)
	return errors.Join(errs...)
}
