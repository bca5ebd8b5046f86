package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

// standalone is the text of a configuration of the plugin alone.
func standalone(entry wire.Conf) ([]byte, error) {
	text, err := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
		wire.Conf
	}{"0.3.1", wire.PluginType, entry}, "", "  ")
	return append(text, '\n'), err
}

// Remove takes the plugin away again: every chain is as it was without us, to
// the byte. Files that are not ours, or cannot be read, are left alone.
func (in *Installer) Remove(ctx context.Context) error {
	files, err := libcni.ConfFiles(in.cfg.NetDir, extensions)
	if err != nil {
		return fmt.Errorf("cni: %w", err)
	}
	slices.Sort(files)
	var errs []error
	for _, path := range files {
		if ctx.Err() != nil {
			return errors.Join(append(errs, fmt.Errorf("cni: remove: %w", context.Cause(ctx)))...)
		}
		c, err := load(path)
		if err != nil {
			continue
		}
		for _, change := range in.undo(c) {
			if err := change.apply(); err != nil {
				errs = append(errs, err)
				break // The old file stays until the new one is there.
			}
		}
	}
	if len(errs) == 0 { // A chain that names a plugin which is not there starts no pod at all.
		errs = append(errs, in.binary.remove())
	}
	in.setReady(false)
	return errors.Join(errs...)
}

// undo says what has to change for c to be without us.
func (in *Installer) undo(c *candidate) []change {
	if !c.list.has(wire.PluginType) {
		return nil
	}
	if in.isOurs(c) {
		return []change{{path: c.path}}
	}
	if c.single {
		return nil
	}
	if name, text, ok := c.list.unwrap(); ok {
		path := filepath.Join(filepath.Dir(c.path), name)
		return []change{{path: path, text: text, mode: in.newMode(), like: c.path}, {path: c.path}}
	}
	return []change{{path: c.path, text: c.list.without(), mode: in.newMode(), like: c.path}}
}
