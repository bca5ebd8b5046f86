package token_test

import (
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/ztun/ztun/tunnel/token"
)

const signature = "c2lnbmF0dXJl"

func jwt(claims string) string {
	return "eyJhbGciOiJub25lIn0." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + "." + signature
}

func TestDescribe(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	const none = "the token is no JWT"
	for given, want := range map[string]string{
		jwt(`{"aud":["istio-ca"],"sub":"system:serviceaccount:istio-system:ztunnel","exp":1800000001}`): `the token is for audience "istio-ca" and of "system:serviceaccount:istio-system:ztunnel", and expires at 2027-01-15T08:00:01Z`,
		jwt(`{"aud":"vault","sub":"x","exp":1800000000}`):                                               `the token is for audience "vault" and of "x", and has expired at 2027-01-15T08:00:00Z`,
		jwt(`{"aud":["a","b"]}`):   `the token is for audience "a b" and of ""`,
		jwt(`{"exp":1e300}`):       `the token is for audience "" and of ""`,
		jwt(`{"exp":-1}`):          `the token is for audience "" and of ""`,
		jwt(`{"sub":"a\nb"}`):      `the token is for audience "" and of "a\nb"`,
		jwt(`{"aud":5}`):           none,
		jwt(`[]`):                  none,
		"":                         none,
		"secret":                   none,
		"a.!.c":                    none,
		strings.Repeat("a", 1<<20): none,
	} {
		if got := token.Describe(given, now); got != want {
			t.Errorf("Describe(%.64q) = %q, want %q", given, got, want)
		}
	}
}

// FuzzDescribe: nothing panics, the answer is short and printable, and what
// proves the token is not in it.
func FuzzDescribe(f *testing.F) {
	f.Add(jwt(`{"aud":["istio-ca"],"sub":"x","exp":1800000001}`))
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, given string) {
		got := token.Describe(given, time.Unix(1_800_000_000, 0))
		if len(got) > 3000 || strings.ContainsFunc(got, func(r rune) bool { return r < ' ' }) {
			t.Errorf("Describe(%q) = %q", given, got)
		}
		if i := strings.LastIndexByte(given, '.'); len(given)-i > 8 && strings.Contains(got, given[i+1:]) && !strings.Contains("the token is no JWT", given[i+1:]) && got != "the token is no JWT" {
			if text, err := base64.RawURLEncoding.DecodeString(strings.Split(given, ".")[1]); err != nil || !strings.Contains(string(text), given[i+1:]) {
				t.Errorf("Describe(%q) = %q tells the signature", given, got)
			}
		}
	})
}
