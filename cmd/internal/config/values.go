package config

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"math"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// parseBool takes only what ztunnel takes: nobody should believe that "yes" or
// "1" switched something on.
func parseBool(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither true nor false", s)
}

// parseDuration reads "10s", "5m", "24h", and also days: "1d".
func parseDuration(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return 0, fmt.Errorf("%q is not a duration like 10s, 5m or 24h", s)
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a duration like 10s, 5m or 24h", s)
	}
	return d, nil
}

// parseQuantity reads Kubernetes' CPU quantities ("2", "1.5", "500m") and
// rounds up to whole CPUs.
func parseQuantity(s string) (int, error) {
	unit := 1.0
	digits := s
	if m, ok := strings.CutSuffix(s, "m"); ok {
		digits, unit = m, 1000
	}
	v, err := strconv.ParseFloat(digits, 64)
	if err != nil || math.IsNaN(v) || math.IsInf(v, 0) || v <= 0 || v/unit > 1<<16 {
		return 0, fmt.Errorf("%q is not an amount of CPU like 2, 1.5 or 500m", s)
	}
	return int(math.Ceil(v / unit)), nil
}

// parseAddress adds the scheme that the chart leaves out.
func parseAddress(s string) (string, error) {
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return "", fmt.Errorf("%q is not a URL", s)
	case u.Scheme != "https":
		return "", fmt.Errorf("%q: only https is spoken to the control plane", s)
	case u.Hostname() == "":
		return "", fmt.Errorf("%q names no host", s)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "":
		return "", fmt.Errorf("a control plane's address is a host and a port, nothing more")
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return "", fmt.Errorf("%q: %q is not a port", s, p)
		}
	}
	return s, nil
}

// parseRoot reads a root CA: an existing file, the word SYSTEM, or PEM.
func parseRoot(s string) (Root, error) {
	if s == "SYSTEM" {
		return Root{System: true}, nil
	}
	if _, err := os.Stat(s); err == nil {
		return Root{File: s}, nil
	}
	if block, _ := pem.Decode([]byte(s)); block != nil && block.Type == "CERTIFICATE" {
		return Root{PEM: []byte(s)}, nil
	}
	if bytes.ContainsAny([]byte(s), "\n") || len(s) > 4096 {
		return Root{}, fmt.Errorf("the value holds no certificate in PEM")
	}
	return Root{}, fmt.Errorf("%q is neither a file, nor SYSTEM, nor certificates in PEM", s)
}

// validHeader reports whether a pair can travel as ASCII gRPC metadata.
func validHeader(name, value string) error {
	if name == "" {
		return fmt.Errorf("the header has no name")
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return fmt.Errorf("%q is not a name that gRPC metadata may have", name)
		}
	}
	if strings.HasPrefix(name, "grpc-") || strings.HasSuffix(name, "-bin") {
		return fmt.Errorf("%q is a name that gRPC keeps for itself", name)
	}
	for _, c := range []byte(value) {
		if c < 0x20 || c > 0x7e {
			return fmt.Errorf("the value of %q is not printable ASCII", name)
		}
	}
	return nil
}

func (u *Upstream) validate(env string) error {
	if u.Address == "" {
		return fmt.Errorf("config: %s_ADDRESS is empty: ztun-proxy needs a control plane (ztun control serves one from a folder of YAML)", env)
	}
	if _, err := parseAddress(u.Address); err != nil {
		return fmt.Errorf("config: %s_ADDRESS: %w", env, err)
	}
	return nil
}
