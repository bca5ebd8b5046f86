package enrol

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHostPath(t *testing.T) {
	root := filepath.Join(t.TempDir(), "host")
	mounted := filepath.Join(root, "var/run/netns")
	for _, dir := range []string{"var/run/netns", "var/run/other", "run/elsewhere", "proc/1/ns"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"var/run/netns/absolute": "/proc/1/ns/net", "var/run/netns/relative": "cni-1", "var/run/netns/loop": "loop", "proc/1/ns/net": "net:[4026531840]",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"var/run/netns/cni-1", "var/run/other/x", "run/elsewhere/y"} {
		if err := os.WriteFile(filepath.Join(root, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name, hostDir, path string
		want                string // Below root; "": an error.
		says                string
	}{
		{"as it is mounted", "/var/run/netns", "/var/run/netns/cni-1", "var/run/netns/cni-1", ""},
		{"the other spelling", "/var/run/netns", "/run/netns/cni-1", "var/run/netns/cni-1", ""},
		{"the other spelling of the directory", "/run/netns", "/var/run/netns/cni-1", "var/run/netns/cni-1", ""},
		{"mounted under another name", "/var/run/docker/netns", "/var/run/docker/netns/cni-1", "var/run/netns/cni-1", ""},
		{"both", "/var/run/docker/netns", "/run/docker/netns/cni-1", "var/run/netns/cni-1", ""},
		{"not there yet", "/var/run/docker/netns", "/run/docker/netns/later", "var/run/netns/later", ""},
		{"a process", "/var/run/docker/netns", "/proc/1/ns/net", "proc/1/ns/net", ""},
		{"a link of the host's to a process", "/var/run/netns", "/var/run/netns/absolute", "proc/1/ns/net", ""},
		{"a link to a neighbour", "/var/run/docker/netns", "/var/run/docker/netns/relative", "var/run/netns/cni-1", ""},
		{"mounted beside it", "/var/run/netns", "/var/run/other/x", "var/run/other/x", ""},
		{"beside it, as the host spells it", "/var/run/netns", "/var/run/elsewhere/y", "run/elsewhere/y", ""},
		{"dots", "/var/run/netns", "/var/run/netns/../../run/netns/cni-1", "var/run/netns/cni-1", ""},
		{"a directory that is not mounted", "/var/run/docker/netns", "/var/run/netns/cni-1", "", "cniNetnsDir"},
		{"links without end", "/var/run/netns", "/var/run/netns/loop", "", "links"},
		{"relative", "/var/run/netns", "netns/x", "", "not absolute"},
	} {
		c := &Controller{cfg: Config{HostRoot: root, NetnsDir: mounted, HostNetnsDir: tt.hostDir}}
		got, err := c.hostPath(tt.path)
		if want := filepath.Join(root, tt.want); tt.want != "" && (got != want || err != nil) {
			t.Errorf("%s: hostPath(%s) = %s, %v, want %s", tt.name, tt.path, got, err, want)
		}
		if tt.want == "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("%s: hostPath(%s) = %s, %v, want an error with %q", tt.name, tt.path, got, err, tt.says)
		}
	}
	onHost := &Controller{cfg: Config{NetnsDir: mounted, HostNetnsDir: mounted}}
	if got, err := onHost.hostPath(mounted + "/cni-1"); got != mounted+"/cni-1" || err != nil {
		t.Errorf("on the host itself: %s, %v", got, err)
	}
}
