package cni

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

// A change is one file to be written, or removed where text is nil.
type change struct {
	path string
	text []byte
	mode fs.FileMode
	like string // A file whose mode and owner are kept.
}

func (c change) apply() error {
	if c.text == nil {
		return remove(c.path)
	}
	return replace(c.path, bytes.NewReader(c.text), c.mode, c.like)
}

// A candidate is a file that a runtime might take.
type candidate struct {
	path string
	text []byte // As it is.
	list *list  // A single configuration as a list of one.
	// single says that it is not a list.
	single bool
}

// isConf says whether runtimes look at such a file.
func isConf(name string) bool { return slices.Contains(extensions, filepath.Ext(name)) }

// extensions are what containerd and CRI-O look at.
var extensions = []string{".conf", ".conflist", ".json"}

// load reads a file by the rules of its extension.
func load(path string) (*candidate, error) {
	text, err := readConf(path)
	if err != nil {
		return nil, err
	}
	c := &candidate{path: path, text: text, single: filepath.Ext(path) != ".conflist"}
	if c.single {
		if text, err = wrap(text); err != nil {
			return nil, fmt.Errorf("cni: %s: %w", path, err)
		}
	}
	if c.list, err = parseList(text); err != nil {
		return nil, fmt.Errorf("cni: %s: %w", path, err)
	}
	return c, nil
}

// plan says what has to change for our entry to be where it belongs. An error
// leaves every file as it is.
func (in *Installer) plan() ([]change, error) {
	if in.cfg.Unchained {
		return in.planUnchained()
	}
	primary, err := in.pick()
	if err != nil {
		return nil, err
	}
	if in.cfg.Owned {
		return in.planOwned(primary)
	}
	return in.planChained(primary)
}

// pick finds the configuration to work on: the one that is named, or the first
// that is valid, which is the one that runtimes take.
func (in *Installer) pick() (*candidate, error) {
	if in.cfg.ConfName != "" {
		path, err := in.named()
		if err != nil {
			return nil, err
		}
		c, err := load(path)
		if err != nil {
			return nil, err
		}
		return c, refuseStock(c)
	}
	files, err := libcni.ConfFiles(in.cfg.NetDir, extensions)
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	slices.Sort(files)
	var broken []error
	for _, path := range files {
		c, err := load(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			broken = append(broken, err)
		case in.isOurs(c):
		default:
			return c, refuseStock(c)
		}
	}
	if len(broken) > 0 {
		return nil, errors.Join(broken...)
	}
	if _, err := os.Stat(in.cfg.NetDir); err != nil {
		return nil, fmt.Errorf("cni: %w", err) // To ConfFiles a folder that is not there is empty.
	}
	return nil, fmt.Errorf("cni: %w in %s", errWaiting, in.cfg.NetDir)
}

// named is the file of ConfName, or the one that it became by being wrapped.
func (in *Installer) named() (string, error) {
	path := filepath.Join(in.cfg.NetDir, in.cfg.ConfName)
	stem := path[:len(path)-len(filepath.Ext(path))]
	for _, p := range []string{path, stem + ".conflist", stem + ".conf", stem + ".json"} {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("cni: %w: %s is not there", errWaiting, path)
}

// isOurs says whether the whole file is the agent's.
func (in *Installer) isOurs(c *candidate) bool {
	own := c.list.own()
	return own != nil && own.Owned || c.list.without() == nil
}

// refuseStock keeps Istio's own plugin and ours apart.
func refuseStock(c *candidate) error {
	if c.list.has(wire.StockType) {
		return fmt.Errorf("cni: %s has an entry of %s: Istio's agent and ztun's must not both run for the same pods; uninstall the other, or remove its entry",
			c.path, wire.StockType)
	}
	return nil
}

func (in *Installer) newMode() fs.FileMode {
	if in.cfg.GroupRead {
		return 0o640
	}
	return 0o600
}

// planChained puts the entry into the chain itself. A single configuration
// becomes a list, and the runtime must not find both.
func (in *Installer) planChained(c *candidate) ([]change, error) {
	entry, target := in.cfg.Entry, c.path
	if c.single {
		entry.WrappedFrom = filepath.Base(c.path)
		target = c.path[:len(c.path)-len(filepath.Ext(c.path))] + ".conflist"
	} else if own := c.list.own(); own != nil {
		entry.WrappedFrom = own.WrappedFrom
	}
	text, err := c.list.with(entry)
	if err != nil {
		return nil, fmt.Errorf("cni: %s: %w", c.path, err)
	}
	var changes []change
	if c.single || !bytes.Equal(text, c.text) {
		changes = append(changes, change{path: target, text: text, mode: in.newMode(), like: c.path})
	}
	if c.single {
		changes = append(changes, change{path: c.path})
	}
	return append(changes, in.leftOver()...), nil
}

// leftOver removes the list of our own that an agent with other settings left:
// it would hide the chain.
func (in *Installer) leftOver() []change {
	path := filepath.Join(in.cfg.NetDir, in.cfg.OwnedName)
	c, err := load(path)
	if err != nil {
		return nil
	}
	if own := c.list.own(); own == nil || !own.Owned {
		return nil
	}
	return []change{{path: path}}
}

// planOwned keeps a copy of the chain, with the entry, in a file of our own.
func (in *Installer) planOwned(c *candidate) ([]change, error) {
	path := filepath.Join(in.cfg.NetDir, in.cfg.OwnedName)
	if filepath.Base(c.path) <= in.cfg.OwnedName {
		return nil, fmt.Errorf("cni: %s does not sort before %s, which runtimes would go on to use", in.cfg.OwnedName, c.path)
	}
	text, err := c.list.with(in.cfg.Entry)
	if err != nil {
		return nil, fmt.Errorf("cni: %s: %w", c.path, err)
	}
	if have, err := readConf(path); err == nil && bytes.Equal(have, text) {
		return nil, nil
	}
	return []change{{path: path, text: text, mode: in.newMode(), like: path}}, nil
}

// planUnchained writes a configuration of the plugin alone.
func (in *Installer) planUnchained() ([]change, error) {
	files, err := libcni.ConfFiles(in.cfg.NetDir, extensions)
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	if _, err := os.Stat(in.cfg.NetDir); err != nil {
		return nil, fmt.Errorf("cni: %w", err) // To ConfFiles a folder that is not there is empty.
	}
	for _, path := range files {
		if c, err := load(path); err == nil {
			if err := refuseStock(c); err != nil {
				return nil, err
			}
		}
	}
	text, err := standalone(in.cfg.Entry)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(in.cfg.NetDir, in.cfg.ConfName)
	if have, err := readConf(path); err == nil && bytes.Equal(have, text) {
		return nil, nil
	}
	return []change{{path: path, text: text, mode: in.newMode(), like: path}}, nil
}
