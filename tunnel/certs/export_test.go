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
