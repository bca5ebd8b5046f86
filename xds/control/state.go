package control

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// What a state directory holds. All of it is secret but the roots.
const (
	fileAuthorities = "authorities.json" // CAs with keys, 0600
	fileTokenKey    = "token.key"        // Ed25519, PKCS #8 PEM, 0600
	fileRoots       = "root-cert.pem"    // what proxies must trust, 0644
	fileAddresses   = "service-addresses.json"
	fileLock        = "lock"
)

// lockPatience is how long another process may hold the state.
const lockPatience = 10 * time.Second

// trust is the secrets in force: one consistent reading of the state.
// Immutable.
type trust struct {
	signer   *authority
	roots    []*x509.Certificate // what everybody must trust, newest last
	rootPEM  []byte
	tokenKey ed25519.PrivateKey
}

// stateDir is where a control plane keeps what must outlive its process. The
// zero value is one in memory that is made anew by each call of load.
type stateDir struct {
	dir         string
	trustDomain string
}

// prepare makes the directory, and finds one that others can look into.
func (s stateDir) prepare() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("control: make the state directory: %w", err)
	}
	return s.checkMode(s.dir, 0o700)
}

// checkMode refuses what others may read or write, or what belongs to others.
func (s stateDir) checkMode(name string, want fs.FileMode) error {
	info, err := os.Stat(name)
	if err != nil {
		return fmt.Errorf("control: look at the state: %w", err)
	}
	if extra := info.Mode().Perm() &^ want; extra != 0 {
		return fmt.Errorf("control: %s has mode %04o, which lets others in: chmod %o %s", name, info.Mode().Perm(), want, name)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("control: %s belongs to user %d, not to this one (%d)", name, st.Uid, os.Geteuid())
	}
	return nil
}

// locked runs f while no other process changes the state.
func (s stateDir) locked(f func() error) error {
	if err := s.prepare(); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(s.dir, fileLock), os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("control: lock the state: %w", err)
	}
	defer lock.Close() // and with it the lock
	// Who holds it holds it for a moment, unless it hangs.
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(20 * time.Millisecond) {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f()
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) || time.Now().After(deadline) {
			return fmt.Errorf("control: lock the state: %w", err)
		}
	}
}

// write replaces a file at once: a reader sees the old one or the new one.
func (s stateDir) write(name string, data []byte, mode fs.FileMode) error {
	tmp, err := os.CreateTemp(s.dir, "."+name+".*")
	if err != nil {
		return fmt.Errorf("control: write %s: %w", name, err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(s.dir, name))
	}
	if err != nil {
		return fmt.Errorf("control: write %s: %w", name, err)
	}
	return nil
}

// readSecret returns a file that only its owner may read; nil if it is not there.
func (s stateDir) readSecret(name string) ([]byte, error) {
	file := filepath.Join(s.dir, name)
	if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err := s.checkMode(file, 0o600); err != nil {
		return nil, err
	}
	data, err := readBounded(file)
	if err != nil {
		return nil, fmt.Errorf("control: read the state: %w", err)
	}
	return data, nil
}

// load returns the token key and the authorities, making on first use what is
// not there. withCA is false where the CA comes from elsewhere.
func (s stateDir) load(withCA bool, now time.Time) (ed25519.PrivateKey, *authorities, error) {
	if s.dir == "" {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil || !withCA {
			return key, nil, err
		}
		as, err := newAuthorities(s.trustDomain, now)
		return key, as, err
	}
	var key ed25519.PrivateKey
	var as *authorities
	err := s.locked(func() (err error) {
		if key, err = s.loadTokenKey(); err != nil || !withCA {
			return err
		}
		as, err = s.loadAuthorities(now)
		return err
	})
	return key, as, err
}

func (s stateDir) loadTokenKey() (ed25519.PrivateKey, error) {
	data, err := s.readSecret(fileTokenKey)
	if err != nil {
		return nil, err
	}
	if data == nil {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("control: make the token key: %w", err)
		}
		text, err := keyPEM(key)
		if err != nil {
			return nil, err
		}
		return key, s.write(fileTokenKey, text, 0o600)
	}
	signer, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("control: %s: %w", fileTokenKey, err)
	}
	key, ok := signer.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("control: %s is no Ed25519 key", fileTokenKey)
	}
	return key, nil
}

// loadAuthorities reads the CAs, makes the first one, and keeps the file of
// roots in step.
func (s stateDir) loadAuthorities(now time.Time) (*authorities, error) {
	data, err := s.readSecret(fileAuthorities)
	if err != nil {
		return nil, err
	}
	if data == nil {
		as, err := newAuthorities(s.trustDomain, now)
		if err != nil {
			return nil, err
		}
		return as, s.saveAuthorities(as)
	}
	as := &authorities{}
	if err := json.Unmarshal(data, as); err != nil {
		return nil, fmt.Errorf("control: %s: %w", fileAuthorities, err)
	}
	if err := as.validate(); err != nil {
		return nil, fmt.Errorf("control: %s: %w", fileAuthorities, err)
	}
	return as, s.saveRoots(as)
}

// saveAuthorities writes the roots first: nobody must be signed for by a CA that
// its peers were never told of.
func (s stateDir) saveAuthorities(as *authorities) error {
	if err := s.saveRoots(as); err != nil {
		return err
	}
	data, err := json.MarshalIndent(as, "", "  ")
	if err != nil {
		return fmt.Errorf("control: write %s: %w", fileAuthorities, err)
	}
	return s.write(fileAuthorities, append(data, '\n'), 0o600)
}

func (s stateDir) saveRoots(as *authorities) error {
	return s.saveRootPEM(encodeCerts(as.roots()...))
}

func (s stateDir) saveRootPEM(bundle []byte) error {
	if have, err := os.ReadFile(filepath.Join(s.dir, fileRoots)); err == nil && string(have) == string(bundle) {
		return nil
	}
	return s.write(fileRoots, bundle, 0o644)
}

// loadAddresses reads the addresses given to Services; a missing file is empty.
func (s stateDir) loadAddresses() (*addressBook, error) {
	book := newAddressBook(nil)
	if s.dir == "" {
		return book, nil
	}
	data, err := os.ReadFile(filepath.Join(s.dir, fileAddresses))
	if errors.Is(err, fs.ErrNotExist) {
		return book, nil
	}
	if err == nil {
		err = json.Unmarshal(data, book)
	}
	if err != nil {
		return nil, fmt.Errorf("control: read %s: %w", fileAddresses, err)
	}
	return book, nil
}

func (s stateDir) saveAddresses(book *addressBook) error {
	if s.dir == "" {
		return nil
	}
	data, err := json.MarshalIndent(book, "", "  ")
	if err != nil {
		return fmt.Errorf("control: write %s: %w", fileAddresses, err)
	}
	return s.write(fileAddresses, append(data, '\n'), 0o600)
}

func encodeCerts(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}
