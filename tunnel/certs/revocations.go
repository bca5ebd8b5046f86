package certs

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// RevocationsConfig configures Revocations. Path is required.
type RevocationsConfig struct {
	Path  string        // of a file with CRLs: PEM, or one in DER
	Every time.Duration // how often the file is looked at; 0: 2 s
	Log   *slog.Logger  // nil: discard
}

// maxCRLFile bounds what is read of the file.
const maxCRLFile = 16 << 20

// Revocations are the certificates that their issuers have revoked, by a file
// of CRLs that is read again when it has changed. A CRL counts for those
// certificates whose issuer has signed it; for the others nothing is revoked.
//
// What was read once stays in force until the file has something newer of the
// same issuer: a file that is gone, empty, malformed, cut short, or older
// than that changes nothing. An expired list stays in force too. Before there
// ever was a readable list nothing is revoked, as with a stock ztunnel: the
// file is optional in its chart.
//
// A nil *Revocations revokes nothing. The methods may be called from anywhere.
type Revocations struct {
	// Set by NewRevocations, read-only after.
	cfg RevocationsConfig
	log *slog.Logger

	set      atomic.Pointer[revocationSet]
	rejected [reporters]atomic.Uint64

	// Owned by NewRevocations, then by Run.
	seen    fs.FileInfo       // the file as it was last read; nil: never
	content [sha256.Size]byte // of it
	said    string            // the last complaint, which is not repeated
	ended   map[*revocationList]bool

	// mu guards the fields below.
	mu      sync.Mutex
	nextKey int
	wakes   map[int]func()
}

// A Reporter is the side of a connection that refused the other.
type Reporter uint8

// The sides, as metrics name them: who dialled, and who was dialled.
const (
	Source Reporter = iota
	Destination

	reporters = iota
)

// String is the metric's label.
func (r Reporter) String() string { return [reporters]string{"source", "destination"}[r] }

// A revocationSet is what is in force. It is immutable.
type revocationSet struct {
	revision uint64
	lists    []*revocationList
	byIssuer map[string][]*revocationList // by the issuer's name in DER
}

// NewRevocations reads the file, if it is there; Run reads it again.
func NewRevocations(cfg RevocationsConfig) (*Revocations, error) {
	if cfg.Path == "" {
		return nil, errors.New("certs: revocations: no path")
	}
	setDefault(&cfg.Every, 2*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Revocations{cfg: cfg, log: cfg.Log.With("path", cfg.Path), ended: make(map[*revocationList]bool), wakes: make(map[int]func())}
	r.set.Store(&revocationSet{})
	r.look(time.Now())
	return r, nil
}

// Run looks at the file until ctx is done. The file is polled: it may be
// replaced by a rename of any directory above it, or not be there yet, and a
// node has few inotify instances.
func (r *Revocations) Run(ctx context.Context) error {
	tick := time.NewTicker(r.cfg.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			r.look(time.Now())
		}
	}
}

// OnChange calls wake, which must not wait, after each change, from Run.
func (r *Revocations) OnChange(wake func()) (stop func()) {
	if r == nil {
		return func() {}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := r.nextKey
	r.nextKey++
	r.wakes[key] = wake
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.wakes, key)
	}
}

// Revision changes when what is in force does.
func (r *Revocations) Revision() uint64 {
	if r == nil {
		return 0
	}
	return r.set.Load().revision
}

// Rejected counts one more peer that was refused, or cut, for a *RevokedError.
func (r *Revocations) Rejected(by Reporter) {
	if r != nil {
		r.rejected[by].Add(1)
	}
}

// RevocationStats is what Stats says.
type RevocationStats struct {
	Rejected map[string]uint64 // by Reporter; the caller's own
	Lists    int               // in force
	Revoked  int               // entries of them
	Expired  int               // of Lists, at the time of the question
}

// Stats returns what is in force and what came of it.
func (r *Revocations) Stats() RevocationStats {
	s := RevocationStats{Rejected: make(map[string]uint64, reporters)}
	if r == nil {
		return s
	}
	for by := range r.rejected {
		s.Rejected[Reporter(by).String()] = r.rejected[by].Load()
	}
	now := time.Now()
	for _, l := range r.set.Load().lists {
		s.Lists++
		s.Revoked += len(l.serials)
		if l.expired(now) {
			s.Expired++
		}
	}
	return s
}

// look reads the file if it has changed.
func (r *Revocations) look(now time.Time) {
	defer r.sayEnded(now)
	info, err := os.Stat(r.cfg.Path)
	if err != nil {
		r.seen = nil
		if errors.Is(err, fs.ErrNotExist) && len(r.set.Load().lists) == 0 {
			if r.news("missing") {
				r.log.Info("no file of revocation lists yet: no certificate counts as revoked")
			}
			return
		}
		r.keep(err)
		return
	}
	if !r.mayHaveChanged(info, now) {
		return
	}
	r.seen = info
	switch {
	case !info.Mode().IsRegular():
		r.keep(errors.New("not a regular file")) // To open a pipe would wait for a writer.
		return
	case info.Size() > maxCRLFile:
		r.keep(fmt.Errorf("over %d bytes", maxCRLFile)) // Not to be read over and over.
		return
	}
	text, err := readFile(r.cfg.Path, maxCRLFile)
	if err != nil {
		r.seen = nil
		r.keep(err)
		return
	}
	content := sha256.Sum256([]byte(text))
	if content == r.content {
		return
	}
	r.content = content
	lists, err := parseCRLs([]byte(text))
	switch {
	case err != nil:
		r.keep(err)
	case len(lists) == 0 && len(r.set.Load().lists) > 0:
		r.keep(errors.New("no list in it"))
	default:
		r.said = ""
		r.use(lists)
	}
}

// mayHaveChanged reports whether the file may have another content than what
// was read. A file that was written twice within the clock's grain looks the same
// after the second time: a young one is read anyway.
func (r *Revocations) mayHaveChanged(info fs.FileInfo, now time.Time) bool {
	old := r.seen
	return old == nil || !os.SameFile(old, info) || old.Size() != info.Size() || !old.ModTime().Equal(info.ModTime()) ||
		now.Sub(info.ModTime()) < 2*r.cfg.Every
}

// use puts lists in force, but where what is in force is newer.
func (r *Revocations) use(lists []*revocationList) {
	old := r.set.Load()
	for i, l := range lists {
		at := slices.IndexFunc(old.lists, l.sameIssuer)
		if at < 0 {
			continue
		}
		if held := old.lists[at]; l.olderThan(held) {
			r.log.Warn("revocation list is older than the one in force, which stays", "list", l.String(), "in_force", held.String())
			lists[i] = held
		}
	}
	set := &revocationSet{revision: old.revision + 1, lists: lists, byIssuer: make(map[string][]*revocationList)}
	revoked := 0
	for _, l := range lists {
		issuer := string(l.signed.RawIssuer)
		set.byIssuer[issuer] = append(set.byIssuer[issuer], l)
		revoked += len(l.serials)
	}
	r.set.Store(set)
	r.log.Info("revocation lists read", "lists", len(lists), "revoked", revoked)
	r.mu.Lock()
	wakes := make([]func(), 0, len(r.wakes))
	for _, wake := range r.wakes {
		wakes = append(wakes, wake)
	}
	r.mu.Unlock()
	for _, wake := range wakes {
		wake()
	}
}

// keep complains, once, of a file that changes nothing.
func (r *Revocations) keep(err error) {
	if !r.news(err.Error()) {
		return
	}
	if n := len(r.set.Load().lists); n > 0 {
		r.log.Warn("revocation lists not read; the earlier ones stay in force", "error", err, "lists", n)
		return
	}
	r.log.Error("revocation lists not read, and there are no earlier ones: no certificate counts as revoked", "error", err)
}

func (r *Revocations) news(text string) bool {
	news := r.said != text
	r.said = text
	return news
}

// sayEnded tells, once, of each list in force that has expired.
func (r *Revocations) sayEnded(now time.Time) {
	for _, l := range r.set.Load().lists {
		if l.expired(now) && !r.ended[l] {
			r.ended[l] = true
			r.log.Warn("revocation list has expired; what it revokes stays revoked", "list", l.String(), "next_update", l.signed.NextUpdate)
		}
	}
	for l := range r.ended {
		if !slices.Contains(r.set.Load().lists, l) {
			delete(r.ended, l)
		}
	}
}

// A RevokedError refuses a peer with a certificate, or one above it, that its
// issuer has revoked.
type RevokedError struct{ Serial, Subject, Issuer string }

func (e *RevokedError) Error() string {
	return fmt.Sprintf("certificate %s of %s was revoked by its issuer %s", e.Serial, e.Subject, e.Issuer)
}
