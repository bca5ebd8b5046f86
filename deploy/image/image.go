package main

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	binDir = "usr/local/bin"
	// sbomPath is where scanners look for what an image's files are made of.
	sbomPath = "usr/local/share/sbom/ztun.cdx.json"
	// user is nobody in particular; the agent's pod says that it is root.
	user = "65532:65532"
	// entrypoint is what runs unless a pod says otherwise.
	entrypoint = "/usr/local/bin/ztun-proxy"
)

// Build builds the image and returns the paths of what it wrote.
func Build(ctx context.Context, o Options) ([]string, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Out, 0o755); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(o.Out, ".work")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)

	var written []string
	var index v1.ImageIndex = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range o.Arches {
		img, bom, err := o.image(ctx, arch, filepath.Join(work, arch))
		if err != nil {
			return written, err
		}
		paths, err := o.writeImage(arch, img, bom)
		written = append(written, paths...)
		if err != nil {
			return written, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	oci := filepath.Join(o.Out, o.base()+".oci.tar")
	if err := o.writeLayout(oci, index, filepath.Join(work, "layout")); err != nil {
		return written, fmt.Errorf("%s: %w", oci, err)
	}
	return append(written, oci), nil
}

// base is how the names of what is written begin.
func (o *Options) base() string { return path.Base(o.Name) + "-" + o.Version }

// image makes the image of one architecture, and says in which file its bill
// of materials is. Both need the directory until they are written.
func (o *Options) image(ctx context.Context, arch, dir string) (img v1.Image, bom string, err error) {
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return nil, "", err
	}
	programs, err := compile(ctx, *o, arch, bin)
	if err != nil {
		return nil, "", err
	}
	bom = filepath.Join(dir, "sbom")
	if err := writeSBOM(bom, *o, arch, bin, programs); err != nil {
		return nil, "", err
	}
	files := []file{
		{path: "LICENSE", mode: 0o644, from: filepath.Join(o.Source, "LICENSE")},
		{path: sbomPath, mode: 0o644, from: bom},
	}
	for _, p := range programs {
		files = append(files, file{path: path.Join(binDir, p), mode: 0o755, from: filepath.Join(bin, p)})
	}
	tarPath := filepath.Join(dir, "layer.tar")
	if err := writeTarFile(tarPath, files, o.Epoch); err != nil {
		return nil, "", fmt.Errorf("layer for %s: %w", arch, err)
	}
	layer, err := tarball.LayerFromFile(tarPath, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestSpeed))
	if err != nil {
		return nil, "", fmt.Errorf("layer for %s: %w", arch, err)
	}
	img, err = assemble(*o, arch, layer)
	return img, bom, err
}

// assemble puts the layer under a configuration.
func assemble(o Options, arch string, layer v1.Layer) (v1.Image, error) {
	created := v1.Time{Time: o.Epoch.UTC()}
	labels := map[string]string{
		"org.opencontainers.image.title":       "ztun",
		"org.opencontainers.image.description": "The secure overlay of Istio's ambient mode on TUN devices: node proxy, node agent and CNI plugin",
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.version":     o.Version,
		"org.opencontainers.image.created":     created.Format(time.RFC3339),
	}
	img, err := mutate.Append(empty.Image, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: created, CreatedBy: "deploy/image", Comment: "programs, licence, bill of materials"},
	})
	if err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Created = "linux", arch, created
	cfg.Config = v1.Config{
		User:       user,
		Entrypoint: []string{entrypoint},
		Env:        []string{"PATH=/" + binDir},
		WorkingDir: "/",
		Labels:     labels,
	}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		return nil, err
	}
	img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
	return mutate.Annotations(img, labels).(v1.Image), nil
}

// writeImage writes the bill of materials, and the image in Docker's format.
func (o *Options) writeImage(arch string, img v1.Image, bom string) ([]string, error) {
	base := filepath.Join(o.Out, o.base()+"-"+arch)
	text, err := os.ReadFile(bom)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(base+".cdx.json", text, 0o644); err != nil {
		return nil, err
	}
	tag, err := o.tag()
	if err != nil {
		return nil, err
	}
	archive := base + ".docker.tar"
	tmp := archive + ".tmp"
	err = tarball.WriteToFile(tmp, tag, img)
	if err == nil {
		err = os.Rename(tmp, archive)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return []string{base + ".cdx.json"}, fmt.Errorf("%s: %w", archive, err)
	}
	return []string{base + ".cdx.json", archive}, nil
}

// writeLayout writes index as an OCI layout in a tar file, by way of dir.
func (o *Options) writeLayout(to string, index v1.ImageIndex, dir string) error {
	tag, err := o.tag()
	if err != nil {
		return err
	}
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	err = l.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": o.Version,
		"io.containerd.image.name":          tag.Name(),
	}))
	if err != nil {
		return err
	}
	var files []file
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		files = append(files, file{path: filepath.ToSlash(rel), mode: 0o644, from: p})
		return err
	})
	if err != nil {
		return err
	}
	return writeTarFile(to, files, o.Epoch)
}

// errNotGo says that a file is not a Go program.
var errNotGo = errors.New("not a Go program")

// sha256File is the digest of a file, in hexadecimal.
func sha256File(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return sha256Of(f)
}

func sha256Of(r io.Reader) (string, error) {
	h, _, err := v1.SHA256(r)
	return h.Hex, err
}
