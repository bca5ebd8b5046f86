package cni

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait; a passing test never reaches it.
const patience = 30 * time.Second

// A node has the folders of one.
type node struct {
	t   *testing.T
	cfg Config
	log *safeBuffer
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{t: t, log: new(safeBuffer), cfg: Config{
		Binary: filepath.Join(dir, "plugin"), BinDir: filepath.Join(dir, "bin"), NetDir: filepath.Join(dir, "net.d"), Entry: entry, Every: time.Millisecond,
	}}
	n.cfg.Log = slog.New(slog.NewTextHandler(n.log, nil))
	for _, d := range []string{n.cfg.BinDir, n.cfg.NetDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.put(n.cfg.Binary, "the plugin")
	return n
}

func (n *node) put(path, text string) {
	n.t.Helper()
	if !filepath.IsAbs(path) {
		path = filepath.Join(n.cfg.NetDir, path)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(name string) string {
	text, err := os.ReadFile(filepath.Join(n.cfg.NetDir, name))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// files are name, mode and content of everything in both folders.
func (n *node) files() string {
	var b strings.Builder
	for _, dir := range []string{n.cfg.BinDir, n.cfg.NetDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			n.t.Fatal(err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				n.t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				n.t.Fatal(err)
			}
			fmt.Fprintf(&b, "%s %v %s\n", e.Name(), info.Mode(), text)
		}
	}
	return b.String()
}

func (n *node) installer() *Installer {
	n.t.Helper()
	in, err := NewInstaller(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	return in
}

// look installs once.
func (n *node) look(in *Installer) error {
	n.t.Helper()
	result, err := in.look(context.Background())
	in.note(result, err)
	return err
}

// run runs the installer until the test ends.
func (n *node) run(in *Installer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := in.Run(ctx); err != nil {
			n.t.Error(err)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	n.t.Cleanup(stop)
	return stop
}

func (n *node) wait(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("no %s; log: %s; files: %s", what, n.log, n.files())
		}
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

const (
	simple     = `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"}]}`
	simpleWith = `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},` + entryText + `]}`
	stock      = `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{"type":"istio-cni"}]}`
)

func TestWhichFileIsTaken(t *testing.T) {
	const conf = `{"type":"a","name":"n"}`
	for _, tt := range []struct {
		name, confName string
		files          map[string]string
		want           string // The list that has the entry.
		err            string
	}{
		{"the first", "", map[string]string{"20-b.conflist": simple, "10-a.conflist": simple}, "10-a.conflist", ""},
		{"a single one is wrapped", "", map[string]string{"20-b.conflist": simple, "10-a.conf": conf}, "10-a.conflist", ""},
		{"containerd reads .json too", "", map[string]string{"20-b.conflist": simple, "10-a.json": conf}, "10-a.conflist", ""},
		{"an empty one is passed over", "", map[string]string{"20-b.conflist": simple, "10-a.conf": ""}, "20-b.conflist", ""},
		{"a list without plugins is passed over", "", map[string]string{"20-b.conflist": simple, "10-a.conflist": `{"name":"n","plugins":[]}`}, "20-b.conflist", ""},
		{"a list in a .conf is none", "", map[string]string{"20-b.conflist": simple, "10-a.conf": simple}, "20-b.conflist", ""},
		{"others are passed over", "", map[string]string{"20-b.conflist": simple, "10-a.conflist.bak": simple, "10-a": simple}, "20-b.conflist", ""},
		{"the named one", "20-b.conflist", map[string]string{"20-b.conflist": simple, "10-a.conflist": simple}, "20-b.conflist", ""},
		{"the named one under its other name", "20-b.conf", map[string]string{"20-b.conflist": simple}, "20-b.conflist", ""},
		{"the named list that is single", "20-b.conflist", map[string]string{"20-b.conf": conf}, "20-b.conflist", ""},
		{"none", "", nil, "", "no network configuration yet in "},
		{"the named one is not there", "20-b.conflist", map[string]string{"10-a.conflist": simple}, "", "no network configuration yet: "},
		{"the named one is broken", "20-b.conflist", map[string]string{"10-a.conflist": simple, "20-b.conflist": "{"}, "", "20-b.conflist: not JSON at line 1, column 1: unexpected end"},
		{"only a broken one", "", map[string]string{"20-b.conflist": "{\n  \"name\": n}"}, "", "20-b.conflist: not JSON at line 2, column 12"},
		{"Istio's own agent", "", map[string]string{"20-b.conflist": stock}, "", "Istio's agent and ztun's must not both run for the same pods"},
		{"Istio's own agent's own list", "", map[string]string{"02-istio-cni.conflist": stock, "20-b.conflist": simple}, "", "02-istio-cni.conflist has an entry of istio-cni"},
		{"a disused list of Istio's agent", "", map[string]string{"10-a.conflist": simple, "20-b.conflist": stock}, "10-a.conflist", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			n.cfg.ConfName = tt.confName
			for name, text := range tt.files {
				n.put(name, text)
			}
			before := n.files()
			in := n.installer()
			err := n.look(in)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || in.Ready() {
					t.Errorf("look = %v, ready %v; want an error that says %q", err, in.Ready(), tt.err)
				}
				if got := n.files(); got != before {
					t.Errorf("files are %s, were %s", got, before)
				}
				return
			}
			if err != nil || !in.Ready() || in.Counts()[ResultSuccess] != 1 {
				t.Fatalf("look = %v, ready %v, counts %v", err, in.Ready(), in.Counts())
			}
			l := mustParse(t, n.read(tt.want))
			if got := kinds(l); got != "a ztun-cni" {
				t.Errorf("plugins = %s", got)
			}
			// What a runtime takes has the entry, unless another was named.
			if tt.confName == "" {
				if got := n.runtimeTakes(); got != tt.want {
					t.Errorf("the runtime takes %q", got)
				}
			}
			after := n.files()
			if err := n.look(in); err != nil || n.files() != after || in.Counts()[ResultSuccess] != 1 {
				t.Errorf("a second look: %v, %v, %s", err, in.Counts(), n.files())
			}
			if err := in.Remove(context.Background()); err != nil {
				t.Fatal(err)
			}
			if got := n.files(); got != before {
				t.Errorf("after Remove files are\n%s, were\n%s", got, before)
			}
		})
	}
}

// runtimeTakes is the first file that libcni can load, as containerd does it.
func (n *node) runtimeTakes() string {
	files, err := libcni.ConfFiles(n.cfg.NetDir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range files {
		if filepath.Ext(f) == ".conflist" {
			if l, err := libcni.NetworkConfFromFile(f); err != nil || len(l.Plugins) == 0 {
				continue
			}
			return filepath.Base(f)
		}
		text, err := os.ReadFile(f)
		if err != nil {
			n.t.Fatal(err)
		}
		if _, err := libcni.NetworkPluginConfFromBytes(text); err == nil {
			return filepath.Base(f)
		}
	}
	return ""
}

func TestModes(t *testing.T) {
	mode := func(path string) fs.FileMode {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	n := newNode(t)
	n.put("10-a.conflist", simple)
	file := filepath.Join(n.cfg.NetDir, "10-a.conflist")
	if err := os.Chmod(file, 0o604); err != nil {
		t.Fatal(err)
	}
	n.put(filepath.Join(n.cfg.BinDir, "ztun-cni.tmp.123"), "half")
	if err := n.look(n.installer()); err != nil {
		t.Fatal(err)
	}
	if got := mode(file); got != 0o604 {
		t.Errorf("the edited file's mode is %o, was 604", got)
	}
	if got := mode(filepath.Join(n.cfg.BinDir, "ztun-cni")); got != 0o755 {
		t.Errorf("the plugin's mode is %o", got)
	}
	if strings.Contains(n.files(), ".tmp.") {
		t.Errorf("leftovers: %s", n.files())
	}
	for group, want := range map[bool]fs.FileMode{false: 0o600, true: 0o640} {
		n := newNode(t)
		n.put("10-a.conflist", simple)
		n.cfg.Owned, n.cfg.GroupRead = true, group
		if err := n.look(n.installer()); err != nil {
			t.Fatal(err)
		}
		if got := mode(filepath.Join(n.cfg.NetDir, "02-ztun-cni.conflist")); got != want {
			t.Errorf("a new file's mode is %o, want %o", got, want)
		}
	}
}

func TestOwnedList(t *testing.T) {
	n := newNode(t)
	n.put("10-a.conf", `{"type":"a","name":"n"}`)
	before := n.files()
	n.cfg.Owned = true
	in := n.installer()
	if err := n.look(in); err != nil {
		t.Fatal(err)
	}
	if got := kinds(mustParse(t, n.read("02-ztun-cni.conflist"))); got != "a ztun-cni" || n.runtimeTakes() != "02-ztun-cni.conflist" {
		t.Errorf("plugins %s; the runtime takes %s", got, n.runtimeTakes())
	}
	// The primary changes.
	n.put("10-a.conf", `{"type":"b","name":"n"}`)
	if err := n.look(in); err != nil || kinds(mustParse(t, n.read("02-ztun-cni.conflist"))) != "b ztun-cni" {
		t.Errorf("after a change: %v, %s", err, n.read("02-ztun-cni.conflist"))
	}
	n.put("10-a.conf", `{"type":"a","name":"n"}`)

	// After a reboot the primary may not be there yet. Pods wait all the same.
	if err := os.Remove(filepath.Join(n.cfg.NetDir, "10-a.conf")); err != nil {
		t.Fatal(err)
	}
	again := n.installer()
	if err := n.look(again); err == nil || again.Ready() || n.runtimeTakes() != "02-ztun-cni.conflist" {
		t.Errorf("without a primary: %v, ready %v, the runtime takes %q", err, again.Ready(), n.runtimeTakes())
	}
	n.put("10-a.conf", `{"type":"a","name":"n"}`)

	// Other settings: the list must not hide the chain.
	n.cfg.Owned = false
	chained := n.installer()
	if err := n.look(chained); err != nil || n.runtimeTakes() != "10-a.conflist" {
		t.Errorf("chained: %v; the runtime takes %s", err, n.runtimeTakes())
	}
	n.cfg.Owned = true
	if err := n.look(n.installer()); err != nil || strings.Count(n.read("02-ztun-cni.conflist"), "ztun-cni") != 1 {
		t.Errorf("owned again: %v, %s", err, n.read("02-ztun-cni.conflist"))
	}
	if err := again.Remove(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := n.files(); got != before {
		t.Errorf("after Remove files are\n%s, were\n%s", got, before)
	}

	n.put("01-a.conflist", simple)
	if err := n.look(n.installer()); err == nil || !strings.Contains(err.Error(), "does not sort before") {
		t.Errorf("a primary that sorts first: %v", err)
	}
}

func TestUnchained(t *testing.T) {
	n := newNode(t)
	n.put("10-a.conflist", simple)
	before := n.files()
	n.cfg.Unchained = true
	in := n.installer()
	if err := n.look(in); err != nil {
		t.Fatal(err)
	}
	conf, err := libcni.NetworkPluginConfFromBytes([]byte(n.read("YYY-ztun-cni.conf")))
	if err != nil || conf.Network.Type != "ztun-cni" || conf.Network.Name != "ztun-cni" || conf.Network.CNIVersion != "0.3.1" {
		t.Errorf("%+v, %v", conf, err)
	}
	if n.read("10-a.conflist") != simple {
		t.Errorf("the chain is %s", n.read("10-a.conflist"))
	}
	if err := in.Remove(context.Background()); err != nil || n.files() != before {
		t.Errorf("Remove = %v, files %s", err, n.files())
	}
	n.put("istio-cni.conf", `{"type":"istio-cni","name":"istio-cni"}`)
	if err := n.look(n.installer()); err == nil || !strings.Contains(err.Error(), "must not both run") {
		t.Errorf("beside Istio's agent: %v", err)
	}
}

func TestRefusedConfig(t *testing.T) {
	for _, tt := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.Binary = "" }, "required"},
		{func(c *Config) { c.Owned, c.Unchained = true, true }, "exclude"},
		{func(c *Config) { c.ConfName = "../x.conf" }, "not the name"},
		{func(c *Config) { c.ConfName = "x.yaml" }, "not the name"},
		{func(c *Config) { c.Owned, c.OwnedName = true, "x.conf" }, "not a .conflist"},
	} {
		n := newNode(t)
		tt.change(&n.cfg)
		if _, err := NewInstaller(n.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("NewInstaller = %v, want an error that says %q", err, tt.want)
		}
	}
}

func TestHeals(t *testing.T) {
	n := newNode(t)
	n.cfg.Recheck = time.Hour // Only notices of the kernel count.
	in := n.installer()
	n.run(in)
	n.wait("word that it waits", func() bool { return in.Err() != nil })
	if in.Ready() {
		t.Error("ready without a configuration")
	}
	n.put("10-a.conflist", simple)
	n.wait("installation", in.Ready)
	if got := n.read("10-a.conflist"); got != simpleWith {
		t.Errorf("the list is %s", got)
	}

	n.put("10-a.conflist", simple)
	n.wait("entry again", func() bool { return n.read("10-a.conflist") == simpleWith })
	other := `{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"b"}]}`
	n.put("05-b.conflist", other)
	n.wait("entry in the list that is first now", func() bool { return strings.Contains(n.read("05-b.conflist"), entryText) })

	plugin := filepath.Join(n.cfg.BinDir, "ztun-cni")
	is := func(want string) bool { text, _ := os.ReadFile(plugin); return string(text) == want }
	n.wait("plugin", func() bool { return is("the plugin") })
	if err := os.Remove(plugin); err != nil {
		t.Fatal(err)
	}
	n.wait("plugin again", func() bool { return is("the plugin") })
	n.put(plugin, "The plugin") // As long as it was.
	n.wait("plugin as it was", func() bool { return is("the plugin") })
	n.wait("readiness", in.Ready)
	if err := os.Chmod(plugin, 0o644); err != nil {
		t.Fatal(err)
	}
	n.wait("plugin that can be run", func() bool { info, err := os.Stat(plugin); return err == nil && info.Mode().Perm() == 0o755 })

	n.wait("readiness", in.Ready)
	n.put("05-b.conflist", stock)
	n.wait("refusal", func() bool { return !in.Ready() && strings.Contains(fmt.Sprint(in.Err()), "must not both run") })
	if n.read("05-b.conflist") != stock {
		t.Error("the stock agent's list was changed")
	}
	n.put("05-b.conflist", "not JSON")
	n.wait("the next list", in.Ready)
	if n.read("05-b.conflist") != "not JSON" {
		t.Error("a broken list was changed")
	}
}

func TestFolderIsMadeAnew(t *testing.T) {
	n := newNode(t)
	n.cfg.Recheck = 5 * time.Millisecond
	n.put("10-a.conflist", simple)
	in := n.installer()
	n.run(in)
	n.wait("installation", in.Ready)
	if err := os.RemoveAll(n.cfg.NetDir); err != nil {
		t.Fatal(err)
	}
	n.wait("word of the missing folder", func() bool { return !in.Ready() && strings.Contains(fmt.Sprint(in.Err()), "no such file") })
	if err := os.Mkdir(n.cfg.NetDir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.put("10-a.conflist", simple)
	n.wait("installation", in.Ready)
	if got := n.read("10-a.conflist"); got != simpleWith {
		t.Errorf("the list is %s", got)
	}
}

// TestNotReadyWhileThrottled holds the second installation back, by a limit that
// is never reached, and looks at what is said meanwhile.
func TestNotReadyWhileThrottled(t *testing.T) {
	n := newNode(t)
	n.cfg.Every, n.cfg.Recheck = time.Hour, time.Hour
	n.put("10-a.conflist", simple)
	in := n.installer()
	stop := n.run(in)
	n.wait("installation", in.Ready)
	// At once, as a file that is half written is a reason of its own.
	n.put(n.cfg.Binary+".new", simple)
	if err := os.Rename(n.cfg.Binary+".new", filepath.Join(n.cfg.NetDir, "10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	n.wait("not ready", func() bool { return !in.Ready() })
	stop()
	if got := n.read("10-a.conflist"); got != simple || in.Counts()[ResultSuccess] != 1 {
		t.Errorf("the list is %s; counts %v", got, in.Counts())
	}
}

func TestFightIsNoticed(t *testing.T) {
	n := newNode(t)
	n.cfg.Every, n.cfg.Recheck = 20*time.Millisecond, time.Hour
	in := n.installer()
	for range 40 {
		n.put("10-a.conflist", simple)
		if err := n.look(in); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(n.log.String(), "cni.exclusive=false") {
			if err := n.look(in); err != nil || in.throttled != 0 {
				t.Errorf("after the fight: %v, %d installations had to wait in a row", err, in.throttled)
			}
			return
		}
	}
	t.Errorf("no word of the fight: %s", n.log)
}

func TestFailures(t *testing.T) {
	n := newNode(t)
	n.put("10-a.conflist", simple)
	n.cfg.Binary += "-that-is-not-there"
	in := n.installer()
	if err := n.look(in); err == nil || !strings.Contains(err.Error(), "plugin to install") || in.Counts()[ResultBinary] != 1 {
		t.Errorf("look = %v, counts %v", err, in.Counts())
	}
	if n.read("10-a.conflist") != simple {
		t.Error("the chain names a plugin that is not there")
	}
	if err := n.look(in); err == nil || in.Counts()[ResultBinary] != 1 || strings.Count(n.log.String(), "\n") != 1 {
		t.Errorf("the same again: %v, counts %v, log %s", err, in.Counts(), n.log)
	}

	n = newNode(t)
	n.put("10-a.conflist", simple)
	n.put("20-b.conflist", strings.Repeat(" ", maxConf+1))
	in = n.installer()
	if err := n.look(in); err != nil {
		t.Fatal(err)
	}
	n.cfg.ConfName = "20-b.conflist"
	if err := n.look(n.installer()); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a file without end: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := in.Remove(ctx); err == nil {
		t.Error("Remove went on after its end")
	}
}
