// Package identity is the value that says who a workload is: a SPIFFE ID of
// the form Istio uses, spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT.
//
// Istio's grammar is not SPIFFE's, so go-spiffe's spiffeid cannot be the type:
// the text has exactly five parts separated by '/' after the scheme, namespace
// and service account may be empty, and nothing else is asked of them, where
// SPIFFE forbids empty segments and "." and "..", knows only the characters
// [a-zA-Z0-9._-], and wants the trust domain in lower case. Every valid SPIFFE
// ID of this shape is an ID here with the same text (a test holds the two
// against each other); an ID here need not be a valid SPIFFE ID. What both
// share, and this package asks for too: a trust domain, printable ASCII, and
// at most MaxLength bytes.
package identity

import (
	"errors"
	"fmt"
	"strings"
)

const scheme = "spiffe://"

// MaxLength is the greatest length of an ID's text, in bytes.
// "SPIFFE implementations MUST support SPIFFE URIs up to 2048 bytes in length
// and SHOULD NOT generate URIs of length greater than 2048 bytes."
// https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md#23-maximum-spiffe-id-length
const MaxLength = 2048

// An ID is the identity of a workload. IDs are comparable: equal IDs have the
// same trust domain, namespace and service account, byte for byte. The zero
// ID is nobody.
type ID struct {
	uri string // with the scheme; "" for the zero ID
}

var (
	errScheme = errors.New("no spiffe:// in front")
	errShape  = errors.New("not of the form TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")
	errDomain = errors.New("empty trust domain")
	errBytes  = errors.New("a byte that is not printable ASCII")
	errLength = errors.New("too long")
	errSlash  = errors.New("a part contains '/'")
)

// New returns the ID of a service account. Namespace and service account may
// be empty, the trust domain may not; none may contain '/'.
func New(trustDomain, namespace, serviceAccount string) (ID, error) {
	for _, part := range []string{trustDomain, namespace, serviceAccount} {
		if strings.IndexByte(part, '/') >= 0 {
			return ID{}, fmt.Errorf("identity: new %.64q: %w", part, errSlash)
		}
	}
	return Parse(scheme + trustDomain + "/ns/" + namespace + "/sa/" + serviceAccount)
}

// Parse reads spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT. Any text
// that it accepts is what String returns.
func Parse(s string) (ID, error) {
	if err := check(s); err != nil {
		return ID{}, fmt.Errorf("identity: parse %.64q: %w", s, err)
	}
	return ID{uri: s}, nil
}

// MustParse is Parse for constants; it panics where Parse fails.
func MustParse(s string) ID {
	id, err := Parse(s)
	if err != nil {
		panic(err)
	}
	return id
}

func check(s string) error {
	if len(s) > MaxLength {
		return errLength
	}
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok {
		return errScheme
	}
	for i := 0; i < len(rest); i++ {
		if rest[i] <= ' ' || rest[i] > '~' {
			return errBytes
		}
	}
	td, rest, _ := strings.Cut(rest, "/")
	ns, rest, _ := strings.Cut(rest, "/")
	_, rest, _ = strings.Cut(rest, "/")
	sa, name, five := strings.Cut(rest, "/")
	switch {
	case !five || ns != "ns" || sa != "sa" || strings.IndexByte(name, '/') >= 0:
		return errShape
	case td == "":
		return errDomain
	}
	return nil
}

// IsZero reports whether id is the zero ID, nobody.
func (id ID) IsZero() bool { return id.uri == "" }

// String is the ID as a URI, "" for the zero ID.
func (id ID) String() string { return id.uri }

// Principal is the ID without spiffe://, as authorization policies write it.
func (id ID) Principal() string {
	if id.IsZero() {
		return ""
	}
	return id.uri[len(scheme):]
}

// TrustDomain is the first part, such as cluster.local.
func (id ID) TrustDomain() string { return id.part(0) }

// Namespace is the Kubernetes namespace; it may be empty.
func (id ID) Namespace() string { return id.part(2) }

// ServiceAccount is the name of the Kubernetes service account; it may be empty.
func (id ID) ServiceAccount() string { return id.part(4) }

func (id ID) part(n int) string {
	rest := id.Principal()
	for range n {
		_, rest, _ = strings.Cut(rest, "/")
	}
	part, _, _ := strings.Cut(rest, "/")
	return part
}

// MarshalText is String, for JSON and logs.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.uri), nil }

// UnmarshalText is Parse; empty text gives the zero ID.
func (id *ID) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = ID{}
		return nil
	}
	parsed, err := Parse(string(text))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}
