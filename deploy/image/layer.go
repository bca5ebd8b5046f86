package main

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// A file is one file of an image, or of an archive.
type file struct {
	path string // Without a leading slash.
	mode int64
	from string // Where its bytes are.
}

// writeTar writes files, and the directories that they are in, in the order of
// their paths. Everything belongs to root and has one time.
func writeTar(w io.Writer, files []file, when time.Time) error {
	t := tar.NewWriter(w)
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b file) int { return strings.Compare(a.path, b.path) })
	made := map[string]bool{}
	for _, f := range files {
		if err := writeDirs(t, path.Dir(f.path), made, when); err != nil {
			return err
		}
		if err := writeFile(t, f, when); err != nil {
			return err
		}
	}
	return t.Close()
}

func writeDirs(t *tar.Writer, dir string, made map[string]bool, when time.Time) error {
	if dir == "." || made[dir] {
		return nil
	}
	if err := writeDirs(t, path.Dir(dir), made, when); err != nil {
		return err
	}
	made[dir] = true
	return t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: when, Format: tar.FormatPAX})
}

func writeFile(t *tar.Writer, f file, when time.Time) error {
	in, err := os.Open(f.from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w", f.from, fs.ErrInvalid)
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: f.path, Size: info.Size(), Mode: f.mode, ModTime: when, Format: tar.FormatPAX}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(t, in)
	return err
}

// writeTarFile is writeTar to a file, which is there whole or not at all.
func writeTarFile(to string, files []file, when time.Time) (err error) {
	tmp := to + ".tmp"
	out, err := os.Create(tmp)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	err = writeTar(out, files, when)
	if closeErr := out.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp, to)
}
