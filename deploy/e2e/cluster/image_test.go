package cluster

import (
	"archive/tar"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func TestImageIsWhatReadersTake(t *testing.T) {
	dir := writeFiles(t, map[string]string{"app": "a program"})
	archive := filepath.Join(dir, "app.tar")
	if err := writeImage(archive, AppImage, filepath.Join(dir, "app")); err != nil {
		t.Fatal(err)
	}
	tag := name.MustParseReference(AppImage).(name.Tag)
	img, err := tarball.ImageFromPath(archive, &tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img); err != nil {
		t.Error(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if c := config.Config; config.OS != "linux" || config.Architecture != runtime.GOARCH ||
		!slices.Equal(c.Entrypoint, []string{"/app"}) || !slices.Equal(c.Cmd, []string{"pause"}) {
		t.Errorf("configuration %+v", config)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("layers %v, %v", layers, err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	files := tar.NewReader(r)
	h, err := files.Next()
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(files)
	if err != nil || h.Name != "app" || h.Mode != 0o755 || string(content) != "a program" {
		t.Errorf("%s, mode %o, has %q, %v", h.Name, h.Mode, content, err)
	}
	if _, err := files.Next(); err != io.EOF {
		t.Errorf("after the program comes %v", err)
	}
}

func TestImageNamesWhatIsWrong(t *testing.T) {
	dir := writeFiles(t, map[string]string{"app": "a program"})
	for want, c := range map[string][2]string{
		"No Image":     {"No Image", "app"},
		"missing":      {AppImage, "missing"},
		"no such file": {AppImage, "missing"},
	} {
		if err := writeImage(filepath.Join(dir, "to"), c[0], filepath.Join(dir, c[1])); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "to")); err == nil {
		t.Error("it left a file")
	}
}
