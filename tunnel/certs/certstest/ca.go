// Package certstest has an in-memory CA for tests.
package certstest

import (
	"context"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/identity"
)

// CA is a certs.CA in memory.
type CA struct{}

var _ certs.CA = (*CA)(nil)

// New returns a CA with one root.
func New() *CA { panic("certstest: being written") }

// Sign implements certs.CA.
func (ca *CA) Sign(ctx context.Context, id identity.ID, csr []byte, ttl time.Duration) ([][]byte, error) {
	panic("certstest: being written")
}

// Issue returns a certificate for id, valid for a day, made without a Manager.
func (ca *CA) Issue(id identity.ID) *certs.Certificate { panic("certstest: being written") }

// Rotate makes a new root that signs from now on. The root bundle it returns
// holds the new root and all earlier ones.
func (ca *CA) Rotate() { panic("certstest: being written") }
