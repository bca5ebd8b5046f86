package certs_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
)

// answer is a CA that answers with whatever it is set to make of a good chain.
type answer struct {
	*certstest.CA
	change func(elements [][]byte) [][]byte
	leaf   func(*x509.Certificate)
	key    any
}

func (a *answer) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	block, _ := pem.Decode(csr)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	leaf := certstest.Leaf(ttl, id.String())
	if a.leaf != nil {
		a.leaf(leaf)
	}
	key := req.PublicKey
	if a.key != nil {
		key = a.key
	}
	elements, err := a.SignKey(key, leaf)
	if err == nil && a.change != nil {
		elements = a.change(elements)
	}
	return elements, err
}

func TestAnswersThatAreRefused(t *testing.T) {
	other, _, err := certs.NewRequest(web)
	if err != nil {
		t.Fatal(err)
	}
	uri := func(uris ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtraExtensions = certstest.Leaf(time.Hour, uris...).ExtraExtensions }
	}
	tests := []struct {
		name string
		answer
		want error
	}{
		{"empty", answer{change: func([][]byte) [][]byte { return nil }}, certs.ErrChain},
		{"only a leaf", answer{change: func(e [][]byte) [][]byte { return e[:1] }}, certs.ErrChain},
		{"garbage for a leaf", answer{change: func(e [][]byte) [][]byte { return [][]byte{[]byte("x"), e[1]} }}, certs.ErrChain},
		{"garbage for an intermediate", answer{change: func(e [][]byte) [][]byte { return [][]byte{e[0], {}, e[1]} }}, certs.ErrChain},
		{"a key for a leaf", answer{change: func(e [][]byte) [][]byte { return [][]byte{marshalKey(t, other), e[1]} }}, certs.ErrChain},
		{"no usable root", answer{change: func(e [][]byte) [][]byte { return [][]byte{e[0], []byte("x")} }}, certs.ErrChain},
		{"too many intermediates", answer{change: func(e [][]byte) [][]byte { return append(slices.Repeat(e[:1], 30), e[1]) }}, certs.ErrChain},
		{"too large", answer{change: func(e [][]byte) [][]byte { return append(e, make([]byte, 1<<20)) }}, certs.ErrChain},
		{"another identity", answer{leaf: uri(db.String())}, certs.ErrWrongID},
		{"another identity first", answer{leaf: uri(db.String(), web.String())}, certs.ErrWrongID},
		{"no identity", answer{leaf: uri()}, certs.ErrWrongID},
		{"another key", answer{key: &other.PublicKey}, certs.ErrWrongKey},
		{"expired", answer{leaf: func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}}, certs.ErrExpired},
		{"not yet valid", answer{leaf: func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }}, certs.ErrNotYetValid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.answer.CA = certstest.New()
			m := run(t, certs.Config{CA: &tt.answer})
			_, err := m.Get(t.Context(), web, certs.RealTime)
			if !errors.Is(err, tt.want) || !errors.Is(err, certs.ErrUnavailable) {
				t.Errorf("Get: %v, want %v", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "-----BEGIN") {
				t.Errorf("the error shows PEM: %v", err)
			}
		})
	}
}

func TestUnusableRootsAreSkipped(t *testing.T) {
	var log strings.Builder
	bad := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1, 2, 3}})
	a := &answer{CA: certstest.New(), change: func(e [][]byte) [][]byte {
		return [][]byte{e[0], slices.Concat(bad, e[1], []byte("-----BEGIN CERTIFICATE-----\ncut"))}
	}}
	m, stop := start(t, certs.Config{CA: a, Log: slog.New(slog.NewTextHandler(&log, nil))})
	cert, err := m.Get(t.Context(), web, certs.RealTime)
	stop()
	if err != nil || len(cert.Roots) != 1 {
		t.Fatalf("Get = %v, %v", cert, err)
	}
	if !strings.Contains(log.String(), "skipped=2 used=1") {
		t.Errorf("log: %s", log.String())
	}
}

// A leaf that does not chain to the roots it came with is used (peers may know
// better), but somebody is told.
func TestLeafOfAnotherRootIsLogged(t *testing.T) {
	var log strings.Builder
	other := certstest.New()
	a := &answer{CA: certstest.New(), change: func(e [][]byte) [][]byte {
		return [][]byte{e[0], pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Roots()[0].Raw})}
	}}
	m, stop := start(t, certs.Config{CA: a, Log: slog.New(slog.NewTextHandler(&log, nil))})
	_, err := m.Get(t.Context(), web, certs.RealTime)
	stop()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "no SVID that chains") {
		t.Errorf("log: %s", log.String())
	}
}

// FuzzParseChain checks that no text makes the parser fail in any other way
// than by an error, and that what it returns is within its bounds.
func FuzzParseChain(f *testing.F) {
	ca := certstest.New()
	ca.Intermediate()
	key, _, err := certs.NewRequest(web)
	if err != nil {
		f.Fatal(err)
	}
	elements, err := ca.SignKey(&key.PublicKey, certstest.Leaf(time.Hour, web.String()))
	if err != nil {
		f.Fatal(err)
	}
	leaf, middle, roots := elements[0], elements[1], elements[2]
	f.Add(leaf, middle, roots)
	f.Add(leaf, []byte{}, roots)
	f.Add(slices.Concat(leaf, middle), middle, slices.Concat(roots, roots))
	f.Add(roots, leaf, middle)
	f.Add(leaf, middle, roots[:len(roots)/2])
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), []byte("-----BEGIN"), []byte("x"))
	f.Fuzz(func(t *testing.T, a, b, c []byte) {
		n, roots, skipped, err := certs.ParseChain([][]byte{a, b, c})
		if err == nil && (n < 2 || n > 17 || roots < 1 || roots > 512 || skipped < 0) {
			t.Errorf("%d certificates, %d roots, %d skipped", n, roots, skipped)
		}
		if _, err := certs.New(web, mustKey(t), [][]byte{a, b, c}, time.Now()); err == nil {
			t.Error("a certificate for a key that nobody has seen")
		}
	})
}

var fuzzKey = sync.OnceValues(func() (*ecdsa.PrivateKey, error) {
	key, _, err := certs.NewRequest(web)
	return key, err
})

func mustKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := fuzzKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}
