package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// A TokenSource returns the bearer token for one request. Its errors do not
// hold it.
type TokenSource func() (string, error)

// maxToken and maxRootsFile bound what is read from a file.
const (
	maxToken     = 64 << 10
	maxRootsFile = 4 << 20
)

// TokenFile reads the token from a file at every request, without the white
// space around it.
func TokenFile(path string) TokenSource {
	return func() (string, error) {
		text, err := readFile(path, maxToken)
		if err != nil {
			return "", fmt.Errorf("read token: %w", err)
		}
		token := strings.TrimSpace(text)
		if token == "" {
			return "", fmt.Errorf("read token: %s is empty", path)
		}
		return token, nil
	}
}

// StaticToken always returns token.
func StaticToken(token string) TokenSource { return func() (string, error) { return token, nil } }

// systemRoots as RootCA means the roots of the operating system.
const systemRoots = "SYSTEM"

// readRoots returns the PEM text that source (see IstioCAConfig.RootCA) means.
func readRoots(source string) (string, error) {
	if source == systemRoots || strings.Contains(source, "-----BEGIN") {
		return source, nil
	}
	text, err := readFile(source, maxRootsFile)
	if err == nil && !strings.Contains(text, "-----BEGIN CERTIFICATE") {
		err = fmt.Errorf("%s: no certificate in it", source)
	}
	if err != nil {
		return "", fmt.Errorf("read root certificates: %w", err)
	}
	return text, nil
}

// parseRoots makes a pool of what readRoots returned; nil means the system's.
func parseRoots(text string) (*x509.CertPool, error) {
	if text == systemRoots {
		return nil, nil
	}
	certs, _ := parsePEM([]byte(text))
	if len(certs) == 0 {
		return nil, errors.New("no certificate in the root certificates")
	}
	pool := x509.NewCertPool()
	for _, cert := range certs {
		pool.AddCert(cert)
	}
	return pool, nil
}

func readFile(path string, limit int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return "", err
	}
	if int64(len(text)) > limit {
		return "", fmt.Errorf("%s: over %d bytes", path, limit)
	}
	return string(text), nil
}

// dial makes a connection that trusts the roots in text. It connects when it
// is first used.
func (c *IstioCA) dial(text string) (*grpc.ClientConn, error) {
	roots, err := parseRoots(text)
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{
		Timeout:         caConnectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 300 * time.Second, Interval: 75 * time.Second, Count: 9},
	}
	return grpc.NewClient("dns:///"+c.hostPort,
		grpc.WithTransportCredentials(credentials.NewTLS(c.tlsConfig(roots))),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", addr)
		}),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: 2 * caConnectTimeout}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(2*maxChainBytes)),
	)
}

// tlsConfig authenticates the server only.
func (c *IstioCA) tlsConfig(roots *x509.CertPool) *tls.Config {
	cfg := &tls.Config{RootCAs: roots, ServerName: c.host, MinVersion: tls.VersionTLS13}
	if c.cfg.TLS12 {
		cfg.MinVersion = tls.VersionTLS12
	}
	if c.cfg.PQCOnly {
		cfg.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	}
	if c.cfg.AltHostname == "" {
		return cfg
	}
	// crypto/tls checks for one name only: VerifyConnection does it for two.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return errors.New("certs: verify CA server: no certificate")
		}
		opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), DNSName: c.host}
		for _, cert := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(cert)
		}
		_, err := cs.PeerCertificates[0].Verify(opts)
		if err != nil {
			opts.DNSName = c.cfg.AltHostname
			_, err = cs.PeerCertificates[0].Verify(opts)
		}
		if err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
		}
		return nil
	}
	return cfg
}
