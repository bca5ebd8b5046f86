package cni

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

// A binary is the plugin in the runtime's folder. Owned by one goroutine.
type binary struct {
	source, target string
	known          identity // Of the target when it was last found equal.
}

// identity changes when a file is written or replaced.
type identity struct {
	dev, ino     uint64
	size         int64
	mode         uint32
	mtime, ctime syscall.Timespec
}

func newBinary(source, dir string) *binary {
	return &binary{source: source, target: filepath.Join(dir, wire.PluginType)}
}

// current reports whether the target is the source.
func (b *binary) current() bool {
	id, err := identify(b.target)
	if err != nil || id.mode&0o777 != binaryMode {
		return false
	}
	if id == b.known {
		return true
	}
	same, err := equalFiles(b.source, b.target)
	if err != nil || !same {
		return false
	}
	b.known = id
	return true
}

const binaryMode = 0o755

// install copies the source. A pod that starts meanwhile runs the old one or
// the new one, whole.
func (b *binary) install() error {
	if err := removeLeftovers(filepath.Dir(b.target), filepath.Base(b.target)); err != nil {
		return err
	}
	f, err := os.Open(b.source)
	if err != nil {
		return fmt.Errorf("cni: plugin to install: %w", err)
	}
	defer f.Close()
	return replace(b.target, f, binaryMode, "")
}

func (b *binary) remove() error {
	if err := removeLeftovers(filepath.Dir(b.target), filepath.Base(b.target)); err != nil {
		return err
	}
	return remove(b.target)
}

func identify(path string) (identity, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return identity{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() {
		return identity{}, fmt.Errorf("cni: %s is not a regular file", path)
	}
	return identity{uint64(st.Dev), st.Ino, st.Size, st.Mode, st.Mtim, st.Ctim}, nil
}

func equalFiles(x, y string) (bool, error) {
	fx, err := os.Open(x)
	if err != nil {
		return false, err
	}
	defer fx.Close()
	fy, err := os.Open(y)
	if err != nil {
		return false, err
	}
	defer fy.Close()
	bx, by := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		nx, ex := io.ReadFull(fx, bx)
		ny, ey := io.ReadFull(fy, by)
		if nx != ny || !bytes.Equal(bx[:nx], by[:ny]) {
			return false, nil
		}
		if ex != nil || ey != nil {
			end := ex == io.EOF || ex == io.ErrUnexpectedEOF
			return end && ex == ey, nil
		}
	}
}
