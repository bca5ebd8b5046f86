package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/fsnotify/fsnotify"
)

// isYAML says whether a file of this name is read. Hidden files, and the
// ..data of a mounted ConfigMap with them, are not.
func isYAML(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch strings.ToLower(filepath.Ext(name)) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

// source is where the objects come from: a directory, or one in memory.
type source struct {
	dir    string
	static *Static
}

// read returns the files by their names relative to the directory.
func (s source) read(ps *problems) map[string][]byte {
	files := make(map[string][]byte)
	if s.static != nil {
		for name, text := range s.static.snapshot() {
			if isYAML(filepath.Base(name)) {
				files[name] = []byte(text)
			}
		}
		return files
	}
	// A volume that is not mounted yet, or not any more, looks like this too. Who
	// wants a mesh of nothing says so in a file.
	defer func() {
		if len(files) == 0 && !ps.fatal() {
			ps.add(Problem{File: s.dir, Text: "holds no .yaml, .yml or .json file"})
		}
	}()
	total := int64(0)
	err := s.walk(func(name, file string) error {
		if len(files) == maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		data, err := readBounded(file)
		if err != nil {
			ps.add(Problem{File: name, Text: withoutPath(err)})
			return nil
		}
		if total += int64(len(data)); total > maxTotalBytes {
			return fmt.Errorf("more than %d MiB of YAML", maxTotalBytes>>20)
		}
		files[name] = data
		return nil
	})
	if err != nil {
		ps.add(Problem{File: s.dir, Text: withoutPath(err)})
	}
	return files
}

// walk visits the files to read, following links to files but not to
// directories; the directory itself may be a link.
func (s source) walk(visit func(name, file string) error) error {
	root, err := filepath.EvalSymlinks(s.dir)
	if err != nil {
		return err
	}
	return filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			if p != root && strings.HasPrefix(e.Name(), ".") {
				return fs.SkipDir
			}
			return nil
		}
		if !isYAML(e.Name()) {
			return nil
		}
		if e.Type()&fs.ModeSymlink != 0 {
			if info, err := os.Stat(p); err == nil && info.IsDir() {
				return nil
			}
		} else if !e.Type().IsRegular() {
			return nil
		}
		name, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		return visit(name, p)
	})
}

func readBounded(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errors.New("is no regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err == nil && len(data) > maxFileBytes {
		err = fmt.Errorf("is larger than %d MiB", maxFileBytes>>20)
	}
	return data, err
}

// withoutPath is an error's text where the file is named beside it.
func withoutPath(err error) string {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Op + ": " + pe.Err.Error()
	}
	return err.Error()
}

// fingerprint tells two states of the files apart.
func fingerprint(files map[string][]byte) uint64 {
	h := xxhash.New()
	for name, data := range sorted(files) {
		fmt.Fprintf(h, "%q %d\n", name, len(data))
		h.Write(data)
	}
	return h.Sum64()
}

// watcher tells when a directory may have changed. The events of the kernel
// are hints: a directory that cannot be watched is still read at every rescan.
type watcher struct {
	src      source
	debounce time.Duration
	rescan   time.Duration
	wake     chan struct{} // one slot
}

// run sends to wake until ctx ends.
func (w *watcher) run(ctx context.Context) {
	var events chan fsnotify.Event
	var static <-chan struct{}
	var notify *fsnotify.Watcher
	if w.src.static != nil {
		static = w.src.static.changes()
	} else if n, err := fsnotify.NewWatcher(); err == nil {
		notify, events = n, n.Events
		defer notify.Close()
		w.watchAll(notify)
	}
	w.poke() // for what changed before anybody watched
	rescan := time.NewTicker(w.rescan)
	defer rescan.Stop()
	quiet := time.NewTimer(0)
	quiet.Stop()
	defer quiet.Stop()
	var errs chan error
	if notify != nil {
		errs = notify.Errors
	}
	var first time.Time // of the burst under way
	for {
		select {
		case <-ctx.Done():
			return
		case <-static:
			w.poke()
		case <-rescan.C:
			if notify != nil {
				w.watchAll(notify)
			}
			w.poke()
		case <-errs: // an overflow: something happened
			quiet.Reset(w.debounce)
		case ev := <-events:
			if !w.concerns(ev.Name) {
				continue
			}
			// A directory that never rests is read all the same.
			if first.IsZero() {
				first = time.Now()
			}
			if time.Since(first) < 10*w.debounce {
				quiet.Reset(w.debounce)
			}
		case <-quiet.C:
			first = time.Time{}
			w.watchAll(notify)
			w.poke()
		}
	}
}

// concerns says whether an event is about the directory. The one that holds it
// is watched for the directory's own name alone.
func (w *watcher) concerns(file string) bool {
	dir := filepath.Clean(w.src.dir)
	return filepath.Dir(file) != filepath.Dir(dir) || file == dir
}

func (w *watcher) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// watchAll watches the directory, those below it, and the one that holds it,
// where a link that is swapped shows. Watching twice is harmless.
func (w *watcher) watchAll(n *fsnotify.Watcher) {
	dirs := map[string]bool{filepath.Dir(filepath.Clean(w.src.dir)): true}
	if root, err := filepath.EvalSymlinks(w.src.dir); err == nil {
		_ = filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			if err != nil || len(dirs) > maxFiles {
				return fs.SkipDir
			}
			if e.IsDir() {
				dirs[p] = true
			}
			return nil
		})
	}
	for _, have := range n.WatchList() {
		if !dirs[have] {
			_ = n.Remove(have)
		}
	}
	for dir := range maps.Keys(dirs) {
		_ = n.Add(dir)
	}
}
