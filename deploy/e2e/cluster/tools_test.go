package cluster

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// writeFiles writes a directory of files, given as path -> content.
func writeFiles(t *testing.T, files map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestToolsDirIsOneForEachSetOfVersions(t *testing.T) {
	seen := map[string]string{}
	for name, files := range map[string]map[string]string{
		"first":      {"go.mod": "a", "go.sum": "b"},
		"other mod":  {"go.mod": "c", "go.sum": "b"},
		"other sum":  {"go.mod": "a", "go.sum": "c"},
		"moved line": {"go.mod": "ab", "go.sum": ""},
	} {
		dir, err := tools.dir("/cache", writeFiles(t, files))
		if err != nil || filepath.Dir(dir) != "/cache" {
			t.Errorf("%s: %s, %v", name, dir, err)
		}
		if other, ok := seen[dir]; ok {
			t.Errorf("%s has the directory of %s", name, other)
		}
		seen[dir] = name
	}
	other, err := toolSet{flags: []string{"-race"}}.dir("/cache", writeFiles(t, map[string]string{"go.mod": "a", "go.sum": "b"}))
	if _, ok := seen[other]; ok || err != nil {
		t.Errorf("other flags have the directory of %s, %v", seen[other], err)
	}
	again, err := tools.dir("/cache", writeFiles(t, map[string]string{"go.mod": "a", "go.sum": "b"}))
	if err != nil || seen[again] != "first" {
		t.Errorf("the same versions have %s, which is of %q, %v", again, seen[again], err)
	}
	if _, err := tools.dir("/cache", writeFiles(t, map[string]string{"go.mod": "a"})); err == nil || !strings.Contains(err.Error(), "go.sum") {
		t.Errorf("without go.sum: %v", err)
	}
}

func TestProgramName(t *testing.T) {
	for pkg, want := range map[string]string{
		"k8s.io/kubernetes/cmd/kubelet": "kubelet", "go.etcd.io/etcd/server/v3": "server", "example.test/v": "v", "example.test/v2x": "v2x",
	} {
		if got := programName(pkg); got != want {
			t.Errorf("programName(%s) = %s, want %s", pkg, got, want)
		}
	}
}

// A build that was killed left one program, half of another, and files of neither.
func TestToolsGoOnWhereTheyWere(t *testing.T) {
	const program = "package main\n\nfunc main() { println(`runs`) }\n"
	module := writeFiles(t, map[string]string{
		"go.mod": "module example.test/m\n\ngo 1.26.0\n", "go.sum": "", "one/main.go": program, "two/v2/main.go": program, "files/data": "text",
	})
	set := toolSet{
		programs: map[string]string{"one": "example.test/m/one", "renamed": "example.test/m/two/v2"},
		source:   "example.test/m", files: map[string]string{"copy": "files/data"},
	}
	cache := t.TempDir()
	dir, err := set.dir(cache, module)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "new"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"one": "complete", "new/two": "half", "copy.tmp": "ha"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // The second time there is nothing to do.
		if got, err := set.in(t.Context(), cache, module); err != nil || got != dir {
			t.Fatalf("tools in %s, %v, want %s", got, err, dir)
		}
		if text, err := os.ReadFile(filepath.Join(dir, "one")); err != nil || string(text) != "complete" {
			t.Errorf("one was built again: %v", err)
		}
		if out, err := exec.Command(filepath.Join(dir, "renamed")).CombinedOutput(); err != nil || string(out) != "runs\n" {
			t.Errorf("two said %q, %v", out, err)
		}
		if text, err := os.ReadFile(filepath.Join(dir, "copy")); err != nil || string(text) != "text" {
			t.Errorf("the file has %q, %v", text, err)
		}
		// What would fail if it were used.
		if err := os.RemoveAll(filepath.Join(module, "two")); err != nil {
			t.Fatal(err)
		}
	}
	if left := absent(dir, map[string]string{"new": "", "copy.tmp": ""}); len(left) != 2 {
		t.Errorf("of new and copy.tmp, only %v are gone", left)
	}
}

func TestToolsNameWhatFails(t *testing.T) {
	t.Setenv("GOPROXY", "off")
	module := writeFiles(t, map[string]string{
		"go.mod": "module example.test/m\n\ngo 1.26.0\n\nrequire example.test/gone v1.0.0\n",
		"go.sum": "example.test/gone v1.0.0 h1:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n" +
			"example.test/gone v1.0.0/go.mod h1:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n",
	})
	set := toolSet{programs: map[string]string{"gone": "example.test/gone"}}
	_, err := set.in(t.Context(), t.TempDir(), module)
	for _, want := range []string{"download the modules", "example.test/gone", module} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestThrice(t *testing.T) {
	broken := errors.New("connection reset")
	for _, c := range []struct {
		fails, calls int
	}{{0, 1}, {1, 2}, {2, 3}, {3, 3}} {
		calls := 0
		err := thrice(t.Context(), "download", func() error {
			if calls++; calls <= c.fails {
				return broken
			}
			return nil
		})
		if failed := c.fails == 3; calls != c.calls || failed != errors.Is(err, broken) || !failed && err != nil {
			t.Errorf("%d failures: %d calls, want %d; %v", c.fails, calls, c.calls, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	err := thrice(ctx, "download", func() error { calls++; cancel(); return broken })
	if calls != 1 || !errors.Is(err, broken) {
		t.Errorf("told to end: %d calls, %v", calls, err)
	}
}
