package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Names of the images that every node has. The app's is also that of the pods'
// sandboxes: told nothing, it pauses.
const (
	AppImage  = "e2e.test/app:1"
	ztunName  = "e2e.test/ztun"
	ztunTag   = "1"
	ZtunImage = ztunName + ":" + ztunTag
)

// images builds the test's own image, and ztun's as `make image` does. It
// returns archives that `ctr images import` reads.
func images(ctx context.Context, cache, module string) ([]string, error) {
	dir := filepath.Join(cache, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("e2e: images: %w", err)
	}
	program, app := filepath.Join(dir, "app"), filepath.Join(dir, "app.tar")
	err := goIn{cache, module}.run(ctx, "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./app")
	if err != nil {
		return nil, err
	}
	if err := writeImage(app, AppImage, program); err != nil {
		return nil, err
	}
	root := filepath.Join(module, "../..")
	err = goIn{cache, filepath.Join(root, "deploy/image")}.run(ctx, "run", ".", "-source", root, "-out", dir,
		"-name", ztunName, "-version", ztunTag, "-arch", runtime.GOARCH)
	return []string{app, filepath.Join(dir, "ztun-"+ztunTag+"-"+runtime.GOARCH+".docker.tar")}, err
}

// writeImage writes an image of one program, FROM scratch, in Docker's format.
func writeImage(to, image, program string) error {
	tag, err := name.NewTag(image)
	if err != nil {
		return fmt.Errorf("e2e: image: %w", err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		return fmt.Errorf("e2e: image %s: %w", image, err)
	}
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	path := filepath.Base(program)
	if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o755, Size: int64(len(content))}); err != nil {
		return err
	}
	if _, err := w.Write(content); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil })
	if err != nil {
		return fmt.Errorf("e2e: image %s: %w", image, err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return fmt.Errorf("e2e: image %s: %w", image, err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fmt.Errorf("e2e: image %s: %w", image, err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{Entrypoint: []string{"/" + path}, Cmd: []string{"pause"}}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return fmt.Errorf("e2e: image %s: %w", image, err)
	}
	if err := tarball.WriteToFile(to+".tmp", tag, img); err != nil {
		return fmt.Errorf("e2e: image %s: %w", image, err)
	}
	return os.Rename(to+".tmp", to)
}
