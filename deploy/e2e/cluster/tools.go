package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A toolSet is what is taken from a module's requirements.
type toolSet struct {
	flags    []string          // of go build
	programs map[string]string // name -> package
	source   string            // module of files
	files    map[string]string // name -> path in source
}

// tools are those of deploy/e2e/tools.
var tools = toolSet{
	// Without a version the apiserver says one that its clients cannot read.
	// istio's own releases are built with disable_pgv, too. What debuggers need
	// is not linked, and not made: a tenth of the time.
	flags: []string{
		"-trimpath", "-tags=disable_pgv", "-gcflags=all=-dwarf=false",
		"-ldflags=-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3" +
			" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36",
	},
	programs: map[string]string{
		"etcd":                    "go.etcd.io/etcd/server/v3",
		"kube-apiserver":          "k8s.io/kubernetes/cmd/kube-apiserver",
		"kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
		"kube-scheduler":          "k8s.io/kubernetes/cmd/kube-scheduler",
		"kubectl":                 "k8s.io/kubernetes/cmd/kubectl",
		"kubelet":                 "k8s.io/kubernetes/cmd/kubelet",
		"kube-proxy":              "k8s.io/kubernetes/cmd/kube-proxy",
		"pilot-discovery":         "istio.io/istio/pilot/cmd/pilot-discovery",
	},
	source: "istio.io/istio",
	files: map[string]string{
		"istio-crds.yaml":   "manifests/charts/base/files/crd-all.gen.yaml",
		"gateway-crds.yaml": "tests/integration/pilot/testdata/gateway-api-crd.yaml",
	},
}

// CacheDir is where built and downloaded programs stay: $ZTUN_E2E_CACHE, else ztun/e2e in the user's cache directory.
func CacheDir() (string, error) {
	if dir := os.Getenv("ZTUN_E2E_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("e2e: where the cache is: %w", err)
	}
	return filepath.Join(dir, "ztun", "e2e"), nil
}

// dir is the directory of the tools that module asks for, one for each set of versions, flags and Go.
func (t toolSet) dir(cache, module string) (string, error) {
	h := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return "", fmt.Errorf("e2e: tools: %w", err)
		}
		fmt.Fprintf(h, "%s %d\n%s", name, len(content), content)
	}
	fmt.Fprintf(h, "%q %s/%s %s", t.flags, runtime.GOOS, runtime.GOARCH, runtime.Version())
	return filepath.Join(cache, "tools-"+hex.EncodeToString(h.Sum(nil))[:16]), nil
}

// in builds what is missing of a module's tools and returns their directory.
// A program appears there only complete, and Go keeps the packages that it
// compiled: a build that was killed goes on where it was.
func (t toolSet) in(ctx context.Context, cache, module string) (string, error) {
	dir, err := t.dir(cache, module)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("e2e: tools: %w", err)
	}
	if missing := absent(dir, t.programs); len(missing) > 0 {
		if err := t.build(ctx, goIn{cache, module}, dir, missing); err != nil {
			return "", err
		}
	}
	if missing := absent(dir, t.files); len(missing) > 0 {
		if err := t.copyFiles(ctx, module, dir, missing); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// absent are the names, sorted, of what is not in dir.
func absent(dir string, all map[string]string) (names []string) {
	for name := range all {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// build builds programs all at once: they share most packages, and one is
// linked while another's are compiled.
func (t toolSet) build(ctx context.Context, g goIn, dir string, names []string) error {
	begin := time.Now()
	var packages []string
	for _, name := range names {
		packages = append(packages, t.programs[name])
	}
	progress("downloading and building %s (once; about ten minutes of two CPUs)", strings.Join(names, ", "))
	// Listing needs every module that building does: what it downloads is not asked for again.
	list := slices.Concat([]string{"list", "-deps", "-f", "{{if 0}}{{end}}"}, t.flags, packages)
	if err := thrice(ctx, "download the modules", func() error { return g.run(ctx, list...) }); err != nil {
		return err
	}
	progress("modules are there after %.0f s", time.Since(begin).Seconds())
	tmp := filepath.Join(dir, "new")
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("e2e: tools: %w", err)
	}
	if err := g.run(ctx, slices.Concat([]string{"build", "-o", tmp + "/"}, t.flags, packages)...); err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Rename(filepath.Join(tmp, programName(t.programs[name])), filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("e2e: tools: %w", err)
		}
	}
	progress("tools are there after %.0f s", time.Since(begin).Seconds())
	return os.RemoveAll(tmp)
}

// programName is what go build calls the program of a package: a major version is no name.
func programName(pkg string) string {
	dir, name := path.Split(pkg)
	if len(name) > 1 && name[0] == 'v' && strings.Trim(name[1:], "0123456789") == "" {
		return path.Base(dir)
	}
	return name
}

func (t toolSet) copyFiles(ctx context.Context, module, dir string, names []string) error {
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", t.source)
	list.Dir, list.Stderr = module, os.Stderr
	where, err := list.Output()
	if err != nil {
		return fmt.Errorf("e2e: tools: where %s is: %w", t.source, err)
	}
	for _, name := range names {
		content, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(where)), t.files[name]))
		if err != nil {
			return fmt.Errorf("e2e: tools: %w", err)
		}
		if err := writeWhole(filepath.Join(dir, name), content); err != nil {
			return err
		}
	}
	return nil
}

// goIn runs Go in a module. What it keeps while it works is in the cache.
type goIn struct{ cache, module string }

func goTemp(cache string) string { return filepath.Join(cache, "tmp") }

// run runs a command, out of the way of whatever else the machine does. Programs are static.
func (g goIn) run(ctx context.Context, args ...string) error {
	if err := os.MkdirAll(goTemp(g.cache), 0o755); err != nil {
		return fmt.Errorf("e2e: %w", err)
	}
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "15", "go"}, args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = g.module, os.Stderr, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOTMPDIR="+goTemp(g.cache))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("e2e: go %s in %s: %w", strings.Join(args, " "), g.module, err)
	}
	return nil
}

// thrice tries again what the network may have failed.
func thrice(ctx context.Context, what string, f func() error) error {
	var err error
	for try := 1; try <= 3; try++ {
		if err = f(); err == nil {
			return nil
		}
		if ctx.Err() != nil {
			break
		}
		progress("%s, try %d of 3: %v", what, try, err)
	}
	return fmt.Errorf("e2e: %s: %w", what, err)
}

// writeWhole writes a file that is either complete or not there.
func writeWhole(path string, content []byte) error {
	if err := os.WriteFile(path+".tmp", content, 0o644); err != nil {
		return fmt.Errorf("e2e: %w", err)
	}
	return os.Rename(path+".tmp", path)
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, "e2e: "+format+"\n", args...) }
