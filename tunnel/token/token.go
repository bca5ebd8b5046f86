// Package token reads what the bearer token of a service account says of
// itself, for the error when somebody refuses it: a server that does so does not
// say why. Nothing is verified, and no part of the token that proves anything is
// told.
package token

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// maxToken bounds what is decoded, in bytes.
const maxToken = 64 << 10

// Describe says whose token it is, for which audience and until when, as far as
// it is a JWT (RFC 7519) and says so itself; else that it is none.
func Describe(token string, now time.Time) string {
	parts := strings.Split(token, ".")
	if len(token) > maxToken || len(parts) != 3 {
		return "the token is no JWT"
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Audience audiences `json:"aud"`
		Subject  string    `json:"sub"`
		Expiry   float64   `json:"exp"` // Seconds; "non-integer values can be represented".
	}
	if err == nil {
		err = json.Unmarshal(text, &claims)
	}
	if err != nil {
		return "the token is no JWT"
	}
	said := fmt.Sprintf("the token is for audience %.256q and of %.256q", strings.Join(claims.Audience, " "), claims.Subject)
	const year10000 = 253402300800
	if claims.Expiry <= 0 || claims.Expiry >= year10000 {
		return said
	}
	expiry := time.Unix(int64(claims.Expiry), 0).UTC()
	verb := "expires"
	if !now.Before(expiry) {
		verb = "has expired"
	}
	return fmt.Sprintf("%s, and %s at %s", said, verb, expiry.Format(time.RFC3339))
}

// audiences is one string, or several.
// https://www.rfc-editor.org/rfc/rfc7519#section-4.1.3
type audiences []string

func (a *audiences) UnmarshalJSON(text []byte) error {
	var one string
	if json.Unmarshal(text, &one) == nil {
		*a = audiences{one}
		return nil
	}
	return json.Unmarshal(text, (*[]string)(a))
}
