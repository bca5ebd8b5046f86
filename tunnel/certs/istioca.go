package certs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/ztun/ztun/tunnel/complaints"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/tunnel/token"
)

// IstioCAConfig configures an IstioCA. Address and RootCA are required.
type IstioCAConfig struct {
	Address     string      // https://HOST:PORT, or HOST:PORT
	RootCA      string      // a path (re-read at every request), SYSTEM, or PEM text
	AltHostname string      // a second name that the server's certificate may have
	Token       TokenSource // nil: none is sent
	ClusterID   string      // sent as "clusterid" beside a token
	Headers     [][2]string // more metadata, name and value
	Impersonate bool        // send the identity as ImpersonatedIdentity
	TLS12       bool        // allow TLS 1.2
	PQCOnly     bool        // X25519MLKEM768 is the only key exchange
	Log         *slog.Logger
}

// Validate returns all that is wrong with c.
func (c IstioCAConfig) Validate() error {
	var errs []error
	if _, _, err := c.hostPort(); err != nil {
		errs = append(errs, err)
	}
	if c.RootCA == "" {
		errs = append(errs, errors.New("no root CA"))
	}
	for _, h := range c.Headers {
		if !validName(h[0]) || !printable(h[1]) {
			// A header may hold a secret: only its name is told.
			errs = append(errs, fmt.Errorf("header %.64q: not a metadata name with a printable ASCII value", h[0]))
		}
	}
	if !printable(c.ClusterID) {
		errs = append(errs, fmt.Errorf("cluster id %.64q: not printable ASCII", c.ClusterID))
	}
	return errors.Join(errs...)
}

func (c IstioCAConfig) hostPort() (host, hostPort string, err error) {
	hostPort = c.Address
	if strings.Contains(hostPort, "://") {
		u, err := url.Parse(hostPort)
		if err != nil || u.Scheme != "https" || (u.Path != "" && u.Path != "/") || u.User != nil {
			return "", "", fmt.Errorf("address %.256q: want https://HOST:PORT", c.Address)
		}
		hostPort = u.Host
		if u.Port() == "" {
			hostPort = net.JoinHostPort(u.Hostname(), "443")
		}
	}
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil || host == "" || port == "" {
		return "", "", fmt.Errorf("address %.256q: want https://HOST:PORT", c.Address)
	}
	return host, hostPort, nil
}

// Bounds of a request.
const (
	caConnectTimeout = 5 * time.Second
	maxMessage       = 256 // bytes of a server's error text that are shown
	minSecret        = 8   // bytes of what we sent that are kept out of it
)

// IstioCA is a CA that speaks istio.v1.auth.IstioCertificateService. The
// server proves itself by TLS, we by a token; requests share one connection,
// which is made anew when it failed or the root certificates changed.
type IstioCA struct {
	cfg      IstioCAConfig
	host     string // for verification
	hostPort string

	// mu guards the fields below.
	mu     sync.Mutex
	link   *link  // nil: none yet, or the last one failed
	roots  string // of the last link
	told   complaints.Book
	closed bool
}

var _ CA = (*IstioCA)(nil)

// NewIstioCA checks cfg; it connects at the first Sign.
func NewIstioCA(cfg IstioCAConfig) (*IstioCA, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("certs: istio CA: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Headers = slices.Clone(cfg.Headers)
	c := &IstioCA{cfg: cfg}
	c.host, c.hostPort, _ = cfg.hostPort()
	return c, nil
}

// String names the CA for errors.
func (c *IstioCA) String() string { return "istio CA " + c.hostPort }

// Sign implements CA.
func (c *IstioCA) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	req := &securityv1alpha1.IstioCertificateRequest{Csr: string(csr), ValidityDuration: int64(ttl / time.Second)}
	if c.cfg.Impersonate {
		req.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{
			"ImpersonatedIdentity": structpb.NewStringValue(id.String()),
		}}
	}
	md, err := c.metadata()
	if err != nil {
		return nil, fmt.Errorf("certs: istio CA: %w", err)
	}
	l, err := c.acquire()
	if err != nil {
		return nil, fmt.Errorf("certs: istio CA %s: %w", c.hostPort, err)
	}
	client := securityv1alpha1.NewIstioCertificateServiceClient(l.conn)
	resp, err := client.CreateCertificate(metadata.NewOutgoingContext(ctx, md), req)
	code := status.Code(err)
	c.release(l, code == codes.Unavailable || code == codes.DeadlineExceeded)
	if err != nil {
		err = fmt.Errorf("certs: istio CA %s: %w", c.hostPort, clean(err, md))
		if auth := md.Get("authorization"); code == codes.Unauthenticated && len(auth) > 0 {
			// The server does not tell a token that it does not know from one that is
			// for somebody else.
			err = fmt.Errorf("%w (%s)", err, token.Describe(strings.TrimPrefix(auth[0], bearer), time.Now()))
		}
		return nil, err
	}
	out := make([][]byte, 0, len(resp.GetCertChain()))
	for _, cert := range resp.GetCertChain() {
		out = append(out, []byte(cert))
	}
	return out, nil
}

// metadata returns what goes with a request.
func (c *IstioCA) metadata() (metadata.MD, error) {
	md := metadata.MD{}
	for _, h := range c.cfg.Headers {
		md.Append(h[0], h[1])
	}
	if c.cfg.Token == nil {
		return md, nil
	}
	token, err := c.cfg.Token()
	if err != nil {
		return nil, err
	}
	if token == "" || !printable(token) {
		return nil, errors.New("token is empty, or not printable ASCII")
	}
	md.Set("authorization", bearer+token)
	if c.cfg.ClusterID != "" {
		md.Set("clusterid", c.cfg.ClusterID)
	}
	return md, nil
}

const bearer = "Bearer "

// clean keeps the code of a gRPC error and as much of its text as is fit to be
// shown: the text is the server's, which has seen what we sent.
func clean(err error, sent metadata.MD) error {
	s := status.Convert(err)
	text := s.Message()
	for name, values := range sent {
		for _, v := range values {
			if v = strings.TrimPrefix(v, bearer); len(v) >= minSecret {
				text = strings.ReplaceAll(text, v, "["+name+"]")
			}
		}
	}
	if len(text) > maxMessage {
		text = text[:maxMessage] + "..."
	}
	return status.Error(s.Code(), text)
}

// A link is a connection that requests share.
type link struct {
	conn  *grpc.ClientConn
	users int
	old   bool // not for new requests; closed when the last user is done
}

// acquire returns the connection for a request. If the roots have changed but
// can't be used, the earlier ones serve on.
func (c *IstioCA) acquire() (*link, error) {
	text, err := readRoots(c.cfg.RootCA)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.New("client is closed")
	}
	if err == nil {
		err = c.connectLocked(text)
	}
	if err == nil {
		c.told = complaints.Book{}
	} else {
		if c.roots == "" {
			return nil, err
		}
		if c.told.News(err, time.Now()) {
			c.cfg.Log.Warn("root certificates of the CA not reloaded; the earlier ones serve on", "error", err)
		}
		if err := c.connectLocked(c.roots); err != nil {
			return nil, err
		}
	}
	c.link.users++
	return c.link, nil
}

// connectLocked makes a connection that trusts roots the current one.
func (c *IstioCA) connectLocked(roots string) error {
	if c.link != nil && c.roots == roots {
		return nil
	}
	conn, err := c.dial(roots)
	if err != nil {
		return err
	}
	c.retireLocked()
	c.link, c.roots = &link{conn: conn}, roots
	return nil
}

// release ends the use of l. A connection that failed is not used again: a
// fresh one resolves the name anew, and does not wait out gRPC's own backoff
// on top of the Manager's.
func (c *IstioCA) release(l *link, failed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.users--
	if failed && c.link == l {
		c.retireLocked()
	}
	if l.old && l.users == 0 {
		_ = l.conn.Close()
	}
}

func (c *IstioCA) retireLocked() {
	l := c.link
	if l == nil {
		return
	}
	c.link = nil
	l.old = true
	if l.users == 0 {
		_ = l.conn.Close()
	}
}

// Close closes the connection once the requests on it have ended; later ones
// fail.
func (c *IstioCA) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.retireLocked()
	return nil
}

// printable reports whether s may be a metadata value.
func printable(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// validName reports whether s may be a metadata name of a text value; it may
// be written in upper case. https://grpc.io/docs/guides/metadata/
func validName(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i] | 0x20
		if !(c >= 'a' && c <= 'z' || s[i] >= '0' && s[i] <= '9' || s[i] == '-' || s[i] == '_' || s[i] == '.') {
			return false
		}
	}
	lower := strings.ToLower(s)
	return s != "" && !strings.HasPrefix(lower, "grpc-") && !strings.HasSuffix(lower, "-bin")
}
