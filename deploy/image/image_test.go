package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

var epoch = time.Unix(1_700_000_000, 0)

// program uses a module, and says its version.
const program = `package main

import (
	"fmt"

	"github.com/opencontainers/go-digest"
)

var version, release string

func main() { fmt.Println(version, release, digest.FromString("x")) }
`

// module writes a Go module with two programs, and something that is none.
func writeModule(t *testing.T, dir string) {
	t.Helper()
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	var require string
	for line := range strings.Lines(string(mod)) {
		if strings.Contains(line, "opencontainers/go-digest") {
			require = strings.Fields(line)[1]
		}
	}
	for name, text := range map[string]string{
		"go.mod":                "module example.test/m\n\ngo 1.26.0\n\nrequire github.com/opencontainers/go-digest " + require + "\n",
		"go.sum":                string(sums),
		"LICENSE":               "a licence\n",
		"cmd/one/main.go":       program,
		"cmd/two/main.go":       program,
		"cmd/internal/x/x.go":   "package x\n",
		"cmd/internal/notes.go": "package internal\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func build(t *testing.T, o Options) Options {
	t.Helper()
	if o.Source == "" {
		o.Source = t.TempDir()
		writeModule(t, o.Source)
	}
	o.Out, o.Name, o.Version, o.Epoch = filepath.Join(t.TempDir(), "out"), "registry.test/mesh/ztun", "v1", epoch
	if o.Arches == nil {
		o.Arches = []string{"amd64", "arm64"}
	}
	written, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range written {
		names = append(names, filepath.Base(p))
	}
	if have := list(t, o.Out); !slices.Equal(have, slices.Sorted(slices.Values(names))) {
		t.Errorf("it wrote %v, and told of %v", have, names)
	}
	return o
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func read(t *testing.T, path ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What the machine is like does not show in what is built.
func TestTwoBuildsAreTheSameBytes(t *testing.T) {
	first := build(t, Options{})
	t.Setenv("GOFLAGS", "-tags=other")
	t.Setenv("GOAMD64", "v3")
	t.Setenv("CGO_ENABLED", "1")
	t.Setenv("GOARCH", "arm")
	t.Setenv("TZ", "Asia/Kathmandu")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	second := build(t, Options{})
	want := []string{"ztun-v1-amd64.cdx.json", "ztun-v1-amd64.docker.tar", "ztun-v1-arm64.cdx.json", "ztun-v1-arm64.docker.tar", "ztun-v1.oci.tar"}
	if got := list(t, first.Out); !slices.Equal(got, want) {
		t.Fatalf("files %v, want %v", got, want)
	}
	for _, name := range want {
		if !bytes.Equal(read(t, first.Out, name), read(t, second.Out, name)) {
			t.Errorf("%s differs", name)
		}
	}
}

// entry is what a tar file says of one file, and its bytes.
type entry struct {
	header *tar.Header
	bytes  []byte
}

func untar(t *testing.T, r io.Reader) map[string]entry {
	t.Helper()
	out := map[string]entry{}
	tr := tar.NewReader(r)
	last := ""
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := out[h.Name]; twice {
			t.Errorf("%s is there twice", h.Name)
		}
		if dir, _, ok := cutLast(strings.TrimSuffix(h.Name, "/")); ok {
			if _, made := out[dir+"/"]; !made {
				t.Errorf("%s comes before its directory", h.Name)
			}
		}
		if h.Typeflag == tar.TypeReg {
			if h.Name < last {
				t.Errorf("%s comes after %s", h.Name, last)
			}
			last = h.Name
		}
		out[h.Name] = entry{h, b}
	}
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

func layerFiles(t *testing.T, img v1.Image) map[string]entry {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if len(layers) != 1 {
		t.Fatalf("%d layers, want 1", len(layers))
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	return untar(t, r)
}

func checkImage(t *testing.T, img v1.Image, arch string) {
	t.Helper()
	if err := validate.Image(img); err != nil {
		t.Errorf("%s: %v", arch, err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.OS != "linux" || cfg.Architecture != arch || !cfg.Created.Equal(epoch) {
		t.Errorf("%s: it is for %s/%s, made at %v", arch, cfg.OS, cfg.Architecture, cfg.Created)
	}
	c := cfg.Config
	if c.User != "65532:65532" || !slices.Equal(c.Entrypoint, []string{"/usr/local/bin/ztun-proxy"}) || len(c.Cmd) != 0 || c.WorkingDir != "/" {
		t.Errorf("%s: configuration %+v", arch, c)
	}
	if c.Labels["org.opencontainers.image.version"] != "v1" || c.Labels["org.opencontainers.image.licenses"] != "Apache-2.0" {
		t.Errorf("%s: labels %v", arch, c.Labels)
	}
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]
	files := layerFiles(t, img)
	want := map[string]int64{
		"LICENSE": 0o644, "usr/": 0o755, "usr/local/": 0o755, "usr/local/bin/": 0o755, "usr/local/bin/one": 0o755, "usr/local/bin/two": 0o755,
		"usr/local/share/": 0o755, "usr/local/share/sbom/": 0o755, "usr/local/share/sbom/ztun.cdx.json": 0o644,
	}
	for name, e := range files {
		mode, ok := want[name]
		if !ok || e.header.Mode != mode {
			t.Errorf("%s: %s with mode %o, want %o", arch, name, e.header.Mode, mode)
		}
		if e.header.Uid != 0 || e.header.Gid != 0 || e.header.Uname != "" || !e.header.ModTime.Equal(epoch) {
			t.Errorf("%s: %s is %d:%d's, of %v", arch, name, e.header.Uid, e.header.Gid, e.header.ModTime)
		}
		if strings.HasPrefix(name, "usr/local/bin/") && e.header.Typeflag == tar.TypeReg {
			f, err := elf.NewFile(bytes.NewReader(e.bytes))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if libs, err := f.ImportedLibraries(); f.Machine != machine || err != nil || len(libs) > 0 || f.Section(".interp") != nil {
				t.Errorf("%s: %s is for %v and needs %v", arch, name, f.Machine, libs)
			}
		}
	}
	if len(files) != len(want) {
		t.Errorf("%s: %d files, want %d", arch, len(files), len(want))
	}
}

func TestDockerArchives(t *testing.T) {
	o := build(t, Options{})
	for _, arch := range o.Arches {
		path := filepath.Join(o.Out, "ztun-v1-"+arch+".docker.tar")
		img, err := tarball.ImageFromPath(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, img, arch)
		m, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(path) })
		if err != nil {
			t.Fatal(err)
		}
		if len(m) != 1 || !slices.Equal(m[0].RepoTags, []string{"registry.test/mesh/ztun:v1"}) {
			t.Errorf("%s is named %v", path, m)
		}
	}
}

func TestLayoutHasEveryArchitecture(t *testing.T) {
	o := build(t, Options{})
	dir := t.TempDir()
	for name, e := range untar(t, bytes.NewReader(read(t, o.Out, "ztun-v1.oci.tar"))) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if e.header.Typeflag == tar.TypeReg {
			if err := os.WriteFile(path, e.bytes, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(top); err != nil {
		t.Error(err)
	}
	m, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 1 || m.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != "v1" ||
		m.Manifests[0].Annotations["io.containerd.image.name"] != "registry.test/mesh/ztun:v1" {
		t.Fatalf("index %+v", m.Manifests)
	}
	index, err := top.ImageIndex(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if m, err = index.IndexManifest(); err != nil {
		t.Fatal(err)
	}
	var arches []string
	for _, d := range m.Manifests {
		arches = append(arches, d.Platform.OS+"/"+d.Platform.Architecture)
		img, err := index.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		checkImage(t, img, d.Platform.Architecture)
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(arches, want) {
		t.Errorf("architectures %v, want %v", arches, want)
	}
}

func TestSBOM(t *testing.T) {
	o := build(t, Options{Arches: []string{"arm64"}})
	img, err := tarball.ImageFromPath(filepath.Join(o.Out, "ztun-v1-arm64.docker.tar"), nil)
	if err != nil {
		t.Fatal(err)
	}
	files := layerFiles(t, img)
	text := read(t, o.Out, "ztun-v1-arm64.cdx.json")
	if !bytes.Equal(text, files["usr/local/share/sbom/ztun.cdx.json"].bytes) {
		t.Error("the file in the image is another one")
	}
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(text), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	if bom.SpecVersion != cdx.SpecVersion1_6 || bom.Metadata.Component.Version != "v1" {
		t.Errorf("BOM %v of %v", bom.SpecVersion, bom.Metadata.Component)
	}
	refs := map[string]cdx.Component{"image": *bom.Metadata.Component}
	for _, c := range *bom.Components {
		refs[c.BOMRef] = c
	}
	for _, name := range []string{"one", "two"} {
		digest, err := sha256Of(bytes.NewReader(files["usr/local/bin/"+name].bytes))
		if err != nil {
			t.Fatal(err)
		}
		if c := refs["program/"+name]; c.Hashes == nil || (*c.Hashes)[0].Value != digest {
			t.Errorf("%s has not the digest %s", name, digest)
		}
	}
	uses := map[string][]string{}
	for _, d := range *bom.Dependencies {
		uses[d.Ref] = *d.Dependencies
		for _, ref := range append([]string{d.Ref}, *d.Dependencies...) {
			if _, ok := refs[ref]; !ok {
				t.Errorf("%s is no component", ref)
			}
		}
	}
	if want := []string{"program/one", "program/two"}; !slices.Equal(uses["image"], want) {
		t.Errorf("the image is made of %v", uses["image"])
	}
	if u := uses["program/one"]; len(u) != 2 || !strings.HasPrefix(u[0], "pkg:golang/github.com/opencontainers/go-digest@v") || !strings.HasPrefix(u[1], "pkg:golang/std@1.") {
		t.Errorf("one is made of %v", u)
	}
}

// Nothing is left of a build that failed, and the error says of what.
func TestBuildNamesWhatIsWrong(t *testing.T) {
	broken := t.TempDir()
	writeModule(t, broken)
	if err := os.WriteFile(filepath.Join(broken, "cmd/two/main.go"), []byte("package main\nfunc main() { undefined() }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	bare := t.TempDir()
	writeModule(t, bare)
	if err := os.Remove(filepath.Join(bare, "LICENSE")); err != nil {
		t.Fatal(err)
	}
	good := func(change func(*Options)) Options {
		o := Options{Source: broken, Name: "ztun", Version: "v1", Arches: []string{"arm64"}}
		change(&o)
		return o
	}
	for want, o := range map[string]Options{
		"build for linux/arm64":              good(func(*Options) {}),
		"undefined: undefined":               good(func(*Options) {}),
		"LICENSE":                            good(func(o *Options) { o.Source = bare }),
		"has no cmd/*/main.go":               good(func(o *Options) { o.Source = t.TempDir() }),
		`"s390x" is neither amd64 nor arm64`: good(func(o *Options) { o.Arches = []string{"s390x"} }),
		"amd64 is named twice":               good(func(o *Options) { o.Arches = []string{"amd64", "amd64"} }),
		"name of the image":                  good(func(o *Options) { o.Name = "Ztun image" }),
		`"" is neither amd64 nor arm64`:      good(func(o *Options) { o.Arches = []string{""} }),
	} {
		o.Out = filepath.Join(t.TempDir(), "out")
		written, err := Build(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %s", err, want)
		}
		if left, _ := os.ReadDir(o.Out); len(left) > 0 || len(written) > 0 {
			t.Errorf("%s: it left %v, and told of %v", want, left, written)
		}
	}
}

func TestCommandLine(t *testing.T) {
	src := t.TempDir()
	writeModule(t, src)
	out := t.TempDir()
	args := []string{"-source", src, "-out", out, "-version", "v2", "-arch", "amd64"}
	var text bytes.Buffer
	t.Setenv("SOURCE_DATE_EPOCH", "17")
	if err := run(t.Context(), args, &text); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%[1]s/ztun-v2-amd64.cdx.json\n%[1]s/ztun-v2-amd64.docker.tar\n%[1]s/ztun-v2.oci.tar\n", out); text.String() != want {
		t.Errorf("it printed\n%swant\n%s", text.String(), want)
	}
	img, err := tarball.ImageFromPath(filepath.Join(out, "ztun-v2-amd64.docker.tar"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if cfg, err := img.ConfigFile(); err != nil || cfg.Created.Unix() != 17 {
		t.Errorf("made at %v (%v)", cfg.Created, err)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	if err := run(t.Context(), args, &text); err == nil || !strings.Contains(err.Error(), `SOURCE_DATE_EPOCH: "yesterday"`) {
		t.Errorf("error %v", err)
	}
	if err := run(t.Context(), []string{"more"}, &text); err == nil || !strings.Contains(err.Error(), `"more"`) {
		t.Errorf("error %v", err)
	}
}

func TestTarTakesFilesOnly(t *testing.T) {
	err := writeTar(io.Discard, []file{{path: "x", from: t.TempDir()}}, epoch)
	if err == nil {
		t.Error("a directory went in as a file")
	}
	to := filepath.Join(t.TempDir(), "x.tar")
	if err := writeTarFile(to, []file{{path: "x", from: "nowhere"}}, epoch); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
	if left := list(t, filepath.Dir(to)); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
}

// The Dockerfile, which nothing here can run, says the same of the image.
func TestDockerfileAgrees(t *testing.T) {
	text := string(read(t, "../../Dockerfile"))
	for _, want := range []string{
		"\nFROM scratch\n", "\nUSER " + user + "\n", "\nENTRYPOINT [\"" + entrypoint + "\"]\n", " /" + binDir + "/\n", "\nWORKDIR /\n",
		"CGO_ENABLED=0 ", "GOOS=$TARGETOS", "GOARCH=$TARGETARCH", "-trimpath -buildvcs=false",
		`-ldflags "-s -w -X main.version=$VERSION -X main.release=$VERSION"`, "cmd/*/main.go", "COPY LICENSE /LICENSE",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("it has no %q", want)
		}
	}
}
