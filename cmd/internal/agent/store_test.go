package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/ztun/ztun/tun/podnet"
)

func testPod(uid string) Pod {
	return Pod{UID: uid, Name: "pa", Namespace: "default", ServiceAccount: "sa", Netns: "/proc/self/ns/net"}
}

func TestStoreRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := openStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	p := testPod("u-1")
	p.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	p.VirtualInterfaces = []string{"br0"}
	want := saved{Pod: p, State: &podnet.State{Version: 1, Device: "ztun0", MTU: 1500}}
	for range 2 { // The second time it is replaced.
		if err := s.save(want); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.load()
	if err != nil || len(got) != 1 || !reflect.DeepEqual(got[0], want) {
		t.Errorf("load = %+v, %v, want %+v", got, err, want)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, s.dir: 0o700, filepath.Join(s.dir, "u-1.json"): 0o600} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want mode %v", path, info.Mode(), err, mode)
		}
	}
	for range 2 { // The second time it is gone already.
		if err := s.remove("u-1"); err != nil {
			t.Error(err)
		}
	}
	if got, err := s.load(); err != nil || len(got) != 0 {
		t.Errorf("after remove: %+v, %v", got, err)
	}
}

func TestStoreTightensModes(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(dir); err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(dir); info.Mode().Perm() != 0o700 {
		t.Errorf("mode = %v, want 0700", info.Mode())
	}
}

// TestStoreBadFiles: a file that cannot be used is named, and the others are
// used all the same.
func TestStoreBadFiles(t *testing.T) {
	s, err := openStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.save(saved{Pod: testPod("good")}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"cut.json":       `{"pod":{"uid":"cut"`,
		"other.json":     `{"pod":{"uid":"someone","name":"n","namespace":"s","serviceAccount":"a","netns":"/x"}}`,
		"empty.json":     `{}`,
		"big.json":       strings.Repeat(" ", maxStateFile+1),
		"half.json.tmp":  `{`,
		"unrelated.text": `x`,
	} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("good.json", filepath.Join(s.dir, "link.json")); err != nil {
		t.Fatal(err)
	}
	got, err := s.load()
	if len(got) != 1 || got[0].Pod.UID != "good" {
		t.Errorf("load = %+v, want the good one", got)
	}
	for _, name := range []string{"cut.json", "other.json", "empty.json", "big.json", "link.json"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not name %s: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(s.dir, "half.json.tmp")); !os.IsNotExist(err) {
		t.Errorf("an unfinished file is left: %v", err)
	}
}

func FuzzSaved(f *testing.F) {
	f.Add([]byte(`{"pod":{"uid":"u","name":"n","namespace":"s","serviceAccount":"a","netns":"/x"},"state":{"version":1}}`))
	f.Add([]byte(`{"pod":{"addresses":["::1"]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s := &store{dir: t.TempDir()}
		if err := os.WriteFile(filepath.Join(s.dir, "u.json"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		got, _ := s.load()
		for _, v := range got {
			if err := v.Pod.validate(); err != nil {
				t.Errorf("loaded although %v", err)
			}
		}
	})
}

func TestPodValidate(t *testing.T) {
	for name, change := range map[string]func(*Pod){
		"no uid":           func(p *Pod) { p.UID = "" },
		"path in uid":      func(p *Pod) { p.UID = "../../etc/passwd" },
		"hidden uid":       func(p *Pod) { p.UID = ".x" },
		"long uid":         func(p *Pod) { p.UID = strings.Repeat("x", maxUID+1) },
		"no name":          func(p *Pod) { p.Name = "" },
		"newline":          func(p *Pod) { p.Namespace = "a\nb" },
		"no account":       func(p *Pod) { p.ServiceAccount = "" },
		"no netns":         func(p *Pod) { p.Netns = "" },
		"loopback virtual": func(p *Pod) { p.VirtualInterfaces = []string{"lo"} },
	} {
		p := testPod("u")
		change(&p)
		if err := p.validate(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	p := testPod("0a1b-2c.d_E")
	if err := p.validate(); err != nil {
		t.Error(err)
	}
}
