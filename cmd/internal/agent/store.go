package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/ztun/ztun/tun/podnet"
)

// A store keeps one file for each pod, so that a restarted agent knows what
// was done to it. A file is either the old one or the new one, whenever the
// machine stops.
type store struct{ dir string }

// saved is what a file holds. State is nil until the pod is attached: the
// file comes first, so that no pod is attached and forgotten.
type saved struct {
	Pod   Pod           `json:"pod"`
	State *podnet.State `json:"state,omitempty"`
}

const (
	suffix       = ".json"
	maxStateFile = 1 << 20
)

func openStore(dir string) (*store, error) {
	dir = filepath.Join(dir, "pods")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("agent: state: %w", err)
	}
	// Both may be older than we are, and open to others.
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Chmod(d, 0o700); err != nil {
			return nil, fmt.Errorf("agent: state: %w", err)
		}
	}
	return &store{dir: dir}, nil
}

// load reads every file. Those that cannot be used are named in the error.
func (s *store) load() ([]saved, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("agent: state: %w", err)
	}
	var out []saved
	var errs []error
	for _, e := range entries {
		uid, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok {
			if strings.HasSuffix(e.Name(), ".tmp") {
				_ = os.Remove(filepath.Join(s.dir, e.Name())) // Never finished.
			}
			continue
		}
		v, err := s.read(e.Name())
		if err == nil && v.Pod.UID != uid {
			err = fmt.Errorf("it is about pod %q", v.Pod.UID)
		}
		if err == nil {
			err = v.Pod.validate()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("agent: state: %s: %w", e.Name(), err))
			continue
		}
		if len(out) < maxPods {
			out = append(out, v)
		}
	}
	return out, errors.Join(errs...)
}

func (s *store) read(name string) (v saved, err error) {
	path := filepath.Join(s.dir, name)
	info, err := os.Lstat(path)
	if err != nil {
		return v, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxStateFile {
		return v, errors.New("not a file of the agent's")
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(text, &v)
}

// save replaces the pod's file.
func (s *store) save(v saved) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("agent: state of %s: %w", v.Pod.UID, err)
	}
	path := filepath.Join(s.dir, v.Pod.UID+suffix)
	tmp := path + ".tmp"
	if err := writeSynced(tmp, text); err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("agent: state of %s: %w", v.Pod.UID, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("agent: state of %s: %w", v.Pod.UID, err)
	}
	return s.sync()
}

func writeSynced(path string, text []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

// remove forgets the pod.
func (s *store) remove(uid string) error {
	err := os.Remove(filepath.Join(s.dir, uid+suffix))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("agent: state of %s: %w", uid, err)
	}
	return s.sync()
}

// clean removes the directory, unless something is in it. The one that it is in
// may be mounted, and then stays.
func (s *store) clean() error {
	err := os.Remove(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("agent: state: %w", err)
	}
	_ = os.Remove(filepath.Dir(s.dir))
	return nil
}

func (s *store) sync() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return fmt.Errorf("agent: state: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("agent: state: %w", err)
	}
	return nil
}
