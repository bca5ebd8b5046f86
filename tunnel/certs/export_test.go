package certs

import "crypto/ecdsa"

// Key is the private key, for tests alone.
func (c *Certificate) Key() *ecdsa.PrivateKey { return c.pair.PrivateKey.(*ecdsa.PrivateKey) }

// RetryIn is retryIn.
var RetryIn = retryIn

// ParseChain is parseChain, as far as the fuzz test looks.
func ParseChain(elements [][]byte) (certs, roots, skipped int, err error) {
	c, err := parseChain(elements, new(bundleCache))
	if c.roots == nil {
		c.roots = &bundle{}
	}
	return len(c.certs), len(c.roots.certs), c.roots.skipped, err
}

// ParseCRLs is parseCRLs, as far as the fuzz test looks: each list's serial
// numbers.
func ParseCRLs(text []byte) ([]map[string]struct{}, error) {
	lists, err := parseCRLs(text)
	var out []map[string]struct{}
	for _, l := range lists {
		out = append(out, l.serials)
	}
	return out, err
}
