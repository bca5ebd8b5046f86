package certs

import (
	"context"
	"log/slog"
	"time"

	"github.com/ztun/ztun/tunnel/identity"
)

// A TokenSource returns the bearer token for one request.
type TokenSource func() (string, error)

// TokenFile reads the token from a file at every request.
func TokenFile(path string) TokenSource { panic("certs: being written") }

// StaticToken always returns token.
func StaticToken(token string) TokenSource { return func() (string, error) { return token, nil } }

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

// IstioCA is a CA that speaks istio.v1.auth.IstioCertificateService.
type IstioCA struct{}

var _ CA = (*IstioCA)(nil)

// NewIstioCA checks cfg; it connects at the first Sign.
func NewIstioCA(cfg IstioCAConfig) (*IstioCA, error) { panic("certs: being written") }

// Sign implements CA.
func (c *IstioCA) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	panic("certs: being written")
}

// Close closes the connection to the CA.
func (c *IstioCA) Close() error { panic("certs: being written") }
