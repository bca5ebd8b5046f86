package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// tools are the programs of deploy/e2e/tools, the ones that everything waits for first.
var tools = []struct{ name, pkg string }{
	{"etcd", "go.etcd.io/etcd/server/v3"},
	{"kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"},
	{"kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{"kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"},
	{"kubelet", "k8s.io/kubernetes/cmd/kubelet"},
	{"kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"},
	{"pilot-discovery", "istio.io/istio/pilot/cmd/pilot-discovery"},
	{"kubectl", "k8s.io/kubernetes/cmd/kubectl"},
}

// Without a version the apiserver says one that kubectl cannot read.
const ldflags = "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3" +
	" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"

// istioFiles are what the cluster takes from istio's module besides istiod.
var istioFiles = map[string]string{
	"istio-crds.yaml":   "manifests/charts/base/files/crd-all.gen.yaml",
	"gateway-crds.yaml": "tests/integration/pilot/testdata/gateway-api-crd.yaml",
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

// toolsDir is the directory of the tools that module asks for, one for each set of versions, flags and Go.
func toolsDir(cache, module string) (string, error) {
	h := sha256.New()
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return "", fmt.Errorf("e2e: tools: %w", err)
		}
		fmt.Fprintf(h, "%s %d\n%s", name, len(content), content)
	}
	fmt.Fprintf(h, "%s %s/%s %s", ldflags, runtime.GOOS, runtime.GOARCH, runtime.Version())
	return filepath.Join(cache, "tools-"+hex.EncodeToString(h.Sum(nil))[:16]), nil
}

// Tools builds what is missing of module's tools and returns their directory.
// A program appears there only complete, so a build that was killed goes on
// where it was.
func Tools(ctx context.Context, cache, module string) (string, error) {
	dir, err := toolsDir(cache, module)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("e2e: tools: %w", err)
	}
	for _, tool := range tools {
		to := filepath.Join(dir, tool.name)
		if _, err := os.Stat(to); err == nil {
			continue
		}
		progress("building %s (once; a few minutes)", tool.name)
		if err := build(ctx, module, tool.pkg, to, ldflags); err != nil {
			return "", err
		}
	}
	for name, path := range istioFiles {
		to := filepath.Join(dir, name)
		if _, err := os.Stat(to); err == nil {
			continue
		}
		list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/istio")
		list.Dir, list.Stderr = module, os.Stderr
		where, err := list.Output()
		if err != nil {
			return "", fmt.Errorf("e2e: tools: where istio's module is: %w", err)
		}
		content, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(where)), path))
		if err != nil {
			return "", fmt.Errorf("e2e: tools: %w", err)
		}
		if err := writeWhole(to, content); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// build compiles one static program, out of the way of whatever else the machine does.
func build(ctx context.Context, module, pkg, to, ldflags string) error {
	tmp := to + ".tmp"
	cmd := exec.CommandContext(ctx, "nice", "-n", "15", "go", "build", "-trimpath", "-ldflags", ldflags, "-o", tmp, pkg)
	cmd.Dir, cmd.Stdout, cmd.Stderr = module, os.Stderr, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("e2e: build %s in %s: %w", pkg, module, err)
	}
	return os.Rename(tmp, to)
}

// writeWhole writes a file that is either complete or not there.
func writeWhole(path string, content []byte) error {
	if err := os.WriteFile(path+".tmp", content, 0o644); err != nil {
		return fmt.Errorf("e2e: %w", err)
	}
	return os.Rename(path+".tmp", path)
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, "e2e: "+format+"\n", args...) }
