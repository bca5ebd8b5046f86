package xds

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// Config is what a Client needs. Address, RootCA and at least one subscription
// are required; every other zero value is a usable default.
type Config struct {
	Address     string      // HOST:PORT, or https://HOST with :PORT unless it is 443
	RootCA      string      // A path (read again at each connect, the last usable one serves on), SYSTEM, or PEM text.
	AltHostname string      // A second name that the server's certificate may have.
	TLS12       bool        // Allow TLS 1.2.
	PQCOnly     bool        // X25519MLKEM768 is the only key exchange.
	Token       TokenSource // nil: none is sent.
	ClusterID   string      // Sent as "clusterid" beside a token.
	Headers     [][2]string // More metadata, name and value.

	Node          Node
	Subscriptions []Subscription // Asked for in this order.
	Limits        Limits
	Log           *slog.Logger // Default: nothing is logged.

	// Dial makes the connection under TLS. Default: TCP, 5 s to connect, keepalive;
	// a name is resolved at each attempt.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Answered is called by Run when a stream has had its first response: the
	// control plane is there. It must not wait. May be nil.
	Answered func()
}

// Limits bounds what one subscription may make us hold. What goes beyond is
// rejected, resource by resource.
type Limits struct {
	Resources     int // Names. Default 1,000,000.
	ResourceBytes int // One resource. Default 4 MiB.
	TotalBytes    int // Bodies of all resources as last accepted. Default 512 MiB.
}

const (
	maxMessage = 200 << 20
	// gRPC servers accept requests up to 4 MiB unless told otherwise.
	maxInitialVersions = 3 << 20
	maxName            = 4 << 10
	maxVersion         = 1 << 10
	maxNackMessage     = 16 << 10
	maxToken           = 64 << 10
	maxRoots           = 4 << 20
)

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s: over %d bytes", path, limit)
	}
	return b, err
}

// A TokenSource returns the bearer token for one request.
type TokenSource func() (string, error)

// TokenFile reads the token from a file at every request. White space around
// the token is dropped.
func TokenFile(path string) TokenSource {
	return func() (string, error) {
		b, err := readFile(path, maxToken)
		if err != nil {
			return "", fmt.Errorf("xds: read token: %w", err)
		}
		token := strings.TrimSpace(string(b))
		if token == "" {
			return "", fmt.Errorf("xds: read token: %s is empty", path)
		}
		return token, nil
	}
}

// StaticToken always returns token.
func StaticToken(token string) TokenSource {
	return func() (string, error) { return token, nil }
}

func (c *Config) setDefaults() {
	if host, ok := strings.CutPrefix(c.Address, "https://"); ok {
		c.Address = strings.TrimSuffix(host, "/")
		if u, err := url.Parse("https://" + c.Address); err == nil && u.Port() == "" && u.Hostname() != "" {
			c.Address = net.JoinHostPort(u.Hostname(), "443")
		}
	}
	if c.Limits.Resources == 0 {
		c.Limits.Resources = 1_000_000
	}
	if c.Limits.ResourceBytes == 0 {
		c.Limits.ResourceBytes = 4 << 20
	}
	if c.Limits.TotalBytes == 0 {
		c.Limits.TotalBytes = 512 << 20
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Dial == nil {
		c.Dial = dialTCP
	}
}

func (c *Config) validate() error {
	var problems []error
	if host, port, err := net.SplitHostPort(c.Address); err != nil {
		problems = append(problems, fmt.Errorf("address: %w", err))
	} else if _, err := strconv.ParseUint(port, 10, 16); err != nil || host == "" {
		problems = append(problems, fmt.Errorf("address %.256q: want https://HOST:PORT", c.Address))
	}
	if c.RootCA == "" {
		problems = append(problems, errors.New("no root CA"))
	}
	if len(c.Subscriptions) == 0 {
		problems = append(problems, errors.New("no subscription"))
	}
	seen := make(map[string]bool)
	for _, s := range c.Subscriptions {
		if s.Type == "" || s.Handler == nil || seen[s.Type] {
			problems = append(problems, fmt.Errorf("subscription %q: no handler, or given twice", s.Type))
		}
		seen[s.Type] = true
	}
	for _, h := range c.Headers {
		if err := checkHeader(h[0], h[1]); err != nil {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// checkHeader refuses what gRPC would fail every request for.
func checkHeader(name, value string) error {
	if name == "" || strings.HasPrefix(strings.ToLower(name), "grpc-") {
		return fmt.Errorf("header %q: reserved or empty name", name)
	}
	for _, r := range strings.ToLower(name) {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("-_.", r) {
			return fmt.Errorf("header %q: invalid name", name)
		}
	}
	for i := 0; i < len(value); i++ {
		if value[i] < ' ' || value[i] > '~' {
			return fmt.Errorf("header %q: value is not printable ASCII", name)
		}
	}
	return nil
}

func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{
		Timeout:         5 * time.Second,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 300 * time.Second, Interval: 75 * time.Second, Count: 9},
	}
	return d.DialContext(ctx, "tcp", address)
}

// connect prepares a connection that trusts roots; gRPC dials when the stream
// is opened.
func (c *Config) connect(roots *x509.CertPool) (*grpc.ClientConn, error) {
	tc, err := c.tls(roots)
	if err != nil {
		return nil, err
	}
	return grpc.NewClient("passthrough:///"+c.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(tc)),
		grpc.WithContextDialer(c.Dial),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		// The loop of Run spaces the attempts; a ClientConn makes only one.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: 10 * time.Second}),
		grpc.WithDisableServiceConfig(),
		grpc.WithUserAgent("ztun"),
	)
}

func (c *Config) tls(roots *x509.CertPool) (*tls.Config, error) {
	host, _, err := net.SplitHostPort(c.Address)
	if err != nil {
		return nil, fmt.Errorf("xds: address: %w", err)
	}
	tc := &tls.Config{ServerName: host, RootCAs: roots, MinVersion: tls.VersionTLS13}
	if c.TLS12 {
		tc.MinVersion = tls.VersionTLS12
	}
	if c.PQCOnly {
		tc.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	}
	if c.AltHostname != "" {
		// Verification is not skipped but done by verifyEither.
		tc.InsecureSkipVerify = true
		tc.VerifyConnection = verifyEither(roots, host, c.AltHostname)
	}
	return tc, nil
}

// verifyEither checks the server's chain as crypto/tls would, for the first
// name or else the second.
func verifyEither(roots *x509.CertPool, names ...string) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return errors.New("xds: server without certificate")
		}
		opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
		for _, cert := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(cert)
		}
		var first error
		for _, name := range names {
			opts.DNSName = name
			_, err := cs.PeerCertificates[0].Verify(opts)
			if err == nil {
				return nil
			}
			if first == nil {
				first = err
			}
		}
		return first
	}
}

// loadRoots returns nil for the roots of the system.
func loadRoots(source string) (*x509.CertPool, error) {
	if source == "SYSTEM" {
		return nil, nil
	}
	pem, place := []byte(source), "the setting"
	if !strings.Contains(source, "-----BEGIN") {
		var err error
		if pem, err = readFile(source, maxRoots); err != nil {
			return nil, fmt.Errorf("xds: read root CA: %w", err)
		}
		place = source
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("xds: root CA: no certificate in %s", place)
	}
	return pool, nil
}
