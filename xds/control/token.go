package control

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"k8s.io/apimachinery/pkg/util/validation"
)

const (
	tokenIssuer     = "ztun-control"
	tokenAudience   = "istio-ca" // what istiod's tokens say, so that nobody has to be told
	defaultTokenTTL = 12 * time.Hour
	maxTokenTTL     = 365 * 24 * time.Hour
	maxTokenBytes   = 8 << 10
)

// nodeClaims are what a node token says.
type nodeClaims struct {
	Node string `json:"node"`
	jwt.RegisteredClaims
}

// MintToken makes a node token with the key of a state directory, making the
// key on first use. A ttl of 0 means 12 hours.
func MintToken(dir, node string, ttl time.Duration, now time.Time) (string, error) {
	s := stateDir{dir: dir}
	var token string
	err := s.locked(func() error {
		key, err := s.loadTokenKey()
		if err != nil {
			return err
		}
		token, err = mintToken(key, node, ttl, now)
		return err
	})
	return token, err
}

func mintToken(key ed25519.PrivateKey, node string, ttl time.Duration, now time.Time) (string, error) {
	setDefault(&ttl, defaultTokenTTL)
	if msgs := validation.IsDNS1123Subdomain(node); len(msgs) > 0 {
		return "", fmt.Errorf("control: %q is no node: %s", node, strings.Join(msgs, "; "))
	}
	if ttl < time.Second || ttl > maxTokenTTL {
		return "", fmt.Errorf("control: a token cannot be valid for %v: 1s to %v", ttl, maxTokenTTL)
	}
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return "", fmt.Errorf("control: make a token: %w", err)
	}
	token, err := jwt.NewWithClaims(jwt.SigningMethodEdDSA, nodeClaims{
		Node: node,
		RegisteredClaims: jwt.RegisteredClaims{
			Issuer:    tokenIssuer,
			Audience:  jwt.ClaimStrings{tokenAudience},
			IssuedAt:  jwt.NewNumericDate(now),
			ExpiresAt: jwt.NewNumericDate(now.Add(ttl)),
			ID:        hex.EncodeToString(id[:]),
		},
	}).SignedString(key)
	if err != nil {
		return "", fmt.Errorf("control: make a token: %w", err)
	}
	return token, nil
}

// verifyToken returns the node that a token speaks for, and how long. The
// error may be told to the caller: it holds nothing of the token.
func verifyToken(key ed25519.PublicKey, token string, now time.Time) (node string, expires time.Time, err error) {
	if len(token) > maxTokenBytes {
		return "", time.Time{}, errors.New("the token is too long")
	}
	var claims nodeClaims
	_, err = jwt.ParseWithClaims(token, &claims, func(*jwt.Token) (any, error) { return key, nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodEdDSA.Alg()}),
		jwt.WithIssuer(tokenIssuer),
		jwt.WithAudience(tokenAudience),
		jwt.WithExpirationRequired(),
		jwt.WithTimeFunc(func() time.Time { return now }),
	)
	switch {
	case err == nil:
	case errors.Is(err, jwt.ErrTokenExpired):
		return "", time.Time{}, fmt.Errorf("the token expired at %s", claims.ExpiresAt.UTC().Format(time.DateTime))
	case errors.Is(err, jwt.ErrTokenInvalidAudience):
		return "", time.Time{}, fmt.Errorf("the token is meant for others than %s", tokenAudience)
	case errors.Is(err, jwt.ErrTokenInvalidIssuer):
		return "", time.Time{}, fmt.Errorf("the token was not issued by %s", tokenIssuer)
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return "", time.Time{}, errors.New("the token was not signed by this control plane")
	default:
		return "", time.Time{}, errors.New("the token is malformed")
	}
	if len(validation.IsDNS1123Subdomain(claims.Node)) > 0 {
		return "", time.Time{}, errors.New("the token names no node")
	}
	return claims.Node, claims.ExpiresAt.Time, nil
}
