package cni

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	// maxConf bounds a network configuration, in bytes.
	maxConf = 1 << 20
	// tempMark is in the names of files that are not finished. What is left of
	// them by a program that was killed goes away at the next start. No runtime
	// takes such a name for a configuration.
	tempMark = ".tmp."
)

// readConf reads a configuration file.
func readConf(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	defer f.Close()
	text, err := readAll(f, maxConf)
	if err != nil {
		return nil, fmt.Errorf("cni: %s: %w", path, err)
	}
	return text, nil
}

// replace makes path a file with what from holds, from one moment to the next.
// It takes mode, owner and group of like, where there is such a file.
func replace(path string, from io.Reader, mode fs.FileMode, like string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+tempMark+"*")
	if err != nil {
		return fmt.Errorf("cni: write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
			err = fmt.Errorf("cni: write %s: %w", path, err)
		}
	}()
	info, e := os.Stat(like)
	kept := like != "" && e == nil
	if kept {
		mode = info.Mode().Perm()
	}
	// The mode first: the agent has no CAP_FOWNER to change it when the file is somebody else's.
	err = f.Chmod(mode)
	if err == nil && kept {
		if st, ok := info.Sys().(*syscall.Stat_t); ok && (int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid()) {
			err = f.Chown(int(st.Uid), int(st.Gid))
		}
	}
	if err == nil {
		_, err = io.Copy(f, from)
	}
	if err == nil {
		err = f.Sync() // A node that loses power must not come back with an empty file.
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cni: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// removeLeftovers removes unfinished copies of the file name.
func removeLeftovers(dir, name string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cni: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name+tempMark) && e.Type().IsRegular() {
			errs = append(errs, remove(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
