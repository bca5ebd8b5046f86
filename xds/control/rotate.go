package control

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Rotation of the root takes three steps, with a full certificate lifetime
// between each and the next, so that nobody ever meets a certificate whose root
// it was not told of:
//
//  1. RotatePrepare makes a new root. From now on every bundle holds both: the
//     one that comes with each new certificate, and root-cert.pem, which must
//     reach every proxy before the next step.
//  2. RotateSwitch signs with the new root. By then every certificate in use was
//     issued with both roots in its bundle.
//  3. RotateRetire drops the old root. By then every certificate in use was
//     signed by the new one.
type RotationStep string

const (
	RotatePrepare RotationStep = "prepare"
	RotateSwitch  RotationStep = "switch"
	RotateRetire  RotationStep = "retire"
)

// ErrTooEarly is wrapped by Rotate when a step would cut peers off.
var ErrTooEarly = errors.New("too early")

// Rotate takes one step in a state directory. certTTL is the longest lifetime
// of certificates issued, 24 h if 0; force takes the step however early it is.
// A running server notices.
func Rotate(dir, trustDomain string, step RotationStep, certTTL time.Duration, force bool, now time.Time) error {
	setDefault(&certTTL, 24*time.Hour)
	setDefault(&trustDomain, "cluster.local")
	s := stateDir{dir: dir, trustDomain: trustDomain}
	return s.locked(func() error {
		as, err := s.existingAuthorities(now)
		if err != nil {
			return err
		}
		if err := as.rotate(step, trustDomain, certTTL, force, now); err != nil {
			return fmt.Errorf("control: rotate: %w", err)
		}
		return s.saveAuthorities(as)
	})
}

func (as *authorities) rotate(step RotationStep, trustDomain string, certTTL time.Duration, force bool, now time.Time) error {
	wait := func(a *rootAuthority) error {
		if left := certTTL + clockSkew - now.Sub(a.since); left > 0 && !force {
			return fmt.Errorf("%w: certificates in use still depend on the step before; wait %v", ErrTooEarly, left.Round(time.Second))
		}
		return nil
	}
	next, signing, old := as.of(roleNext), as.of(roleSigning), as.of(roleOld)
	switch step {
	case RotatePrepare:
		if next != nil || old != nil {
			return errors.New("a rotation is under way already")
		}
		a, err := newRoot(trustDomain, now)
		if err != nil {
			return err
		}
		as.list = append(as.list, &rootAuthority{*a, roleNext, now})
	case RotateSwitch:
		if next == nil {
			return errors.New("there is no new root: prepare comes first")
		}
		if err := wait(next); err != nil {
			return err
		}
		next.role, next.since = roleSigning, now
		signing.role, signing.since = roleOld, now
	case RotateRetire:
		if old == nil {
			return errors.New("there is no old root: switch comes first")
		}
		if err := wait(old); err != nil {
			return err
		}
		kept := as.list[:0:0]
		for _, a := range as.list {
			if a != old {
				kept = append(kept, a)
			}
		}
		as.list = kept
	default:
		return fmt.Errorf("unknown step %q: prepare, switch, retire", step)
	}
	return as.validate()
}

// existingAuthorities is loadAuthorities where making a CA would hide a mistake.
func (s stateDir) existingAuthorities(now time.Time) (*authorities, error) {
	if data, err := s.readSecret(fileAuthorities); err != nil || data == nil {
		return nil, errors.Join(err, fmt.Errorf("control: there is no CA in %s", s.dir))
	}
	return s.loadAuthorities(now)
}

// RotationState describes the roots of a state directory, one a line.
func RotationState(dir string, now time.Time) (string, error) {
	s := stateDir{dir: dir}
	var b strings.Builder
	err := s.locked(func() error {
		as, err := s.existingAuthorities(now)
		if err != nil {
			return err
		}
		for _, a := range as.list {
			fmt.Fprintf(&b, "%-8s since %s, valid to %s: %s\n", a.role, a.since.UTC().Format(time.DateTime), a.cert.NotAfter.UTC().Format(time.DateTime), a.cert.Subject)
		}
		return nil
	})
	return b.String(), err
}
