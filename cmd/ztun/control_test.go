package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const controlPod = `
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {istio.io/dataplane-mode: ambient}}
spec: {nodeName: n1}
status: {podIP: 10.0.0.1}
`

// runControl runs "ztun control" with args, and returns what it printed.
func runControl(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := newControlCommand()
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	cmd.SetOut(&out)
	cmd.SetErr(io.Discard)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func yamlDir(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mesh.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestControlCheck(t *testing.T) {
	out, err := runControl(t, "check", "--dir", yamlDir(t, controlPod))
	if err != nil || !strings.HasPrefix(out, "ok: 1 files, 1 pods (1 enrolled)") {
		t.Errorf("%q, %v", out, err)
	}
	out, err = runControl(t, "check", "--dir", yamlDir(t, strings.NewReplacer("nodeName", "nodename", "podIP", "podIp").Replace(controlPod)))
	if err == nil || !strings.Contains(out, "mesh.yaml:5: spec.nodename: ") || !strings.Contains(out, "mesh.yaml:6: status.podIp: ") {
		t.Errorf("%q, %v", out, err)
	}
	if out, err := runControl(t, "check", "--dir", filepath.Join(t.TempDir(), "none")); err == nil {
		t.Errorf("a directory that is not there: %q", out)
	}
	if _, err := runControl(t, "check", "--dir", t.TempDir(), "--service-range", "x"); err == nil {
		t.Error("a service range x")
	}
}

func TestControlTokenHasNoNewline(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	out, err := runControl(t, "token", "--node", "n1", "--state", state)
	if err != nil || strings.Count(out, ".") != 2 || strings.TrimSpace(out) != out {
		t.Errorf("%q, %v", out, err)
	}
	file := filepath.Join(t.TempDir(), "token")
	if _, err := runControl(t, "token", "--node", "n1", "--state", state, "--out", file); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if data, _ := os.ReadFile(file); strings.TrimSpace(string(data)) != string(data) {
		t.Errorf("%q", data)
	}
	if _, err := runControl(t, "token", "--node", "not a node", "--state", state); err == nil {
		t.Error("a token for no node")
	}
}

// lines collects what a running command prints.
type lines struct {
	pipe *io.PipeReader
	buf  []byte
}

// until reads until text was printed.
func (l *lines) until(t *testing.T, text string) {
	t.Helper()
	chunk := make([]byte, 4096)
	for !bytes.Contains(l.buf, []byte(text)) {
		n, err := l.pipe.Read(chunk)
		l.buf = append(l.buf, chunk[:n]...)
		if err != nil {
			t.Fatalf("%q was never printed, but:\n%s", text, l.buf)
		}
	}
	_, l.buf, _ = bytes.Cut(l.buf, []byte(text))
}

func TestControlServesAndTellsOfReloads(t *testing.T) {
	dir, state := yamlDir(t, controlPod), filepath.Join(t.TempDir(), "state")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r, w := io.Pipe()
	cmd := newControlCommand()
	cmd.SetOut(w)
	cmd.SetErr(io.Discard)
	cmd.SetArgs([]string{"--dir", dir, "--state", state, "--listen", "127.0.0.1:0"})
	done := make(chan error, 1)
	go func() {
		err := cmd.ExecuteContext(ctx)
		w.CloseWithError(io.EOF)
		done <- err
	}()
	out := &lines{pipe: r}
	out.until(t, "serving: 1 files, 1 pods (1 enrolled)")
	out.until(t, "listening on 127.0.0.1:")
	if err := os.WriteFile(filepath.Join(dir, "bad.yaml"), []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: A}"), 0o644); err != nil {
		t.Fatal(err)
	}
	out.until(t, "not used, 1 problem(s)")
	out.until(t, "bad.yaml:3: metadata.name: ")
	if _, err := runControl(t, "rotate", "prepare", "--state", state); err != nil {
		t.Error(err)
	}
	if _, err := runControl(t, "rotate", "switch", "--state", state); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("switch at once: %v", err)
	}
	if text, err := runControl(t, "rotate", "status", "--state", state); err != nil || !strings.Contains(text, "next ") {
		t.Errorf("%q, %v", text, err)
	}
	cancel()
	go func() { _, _ = io.Copy(io.Discard, r) }()
	if err := <-done; err != nil {
		t.Errorf("serve: %v", err)
	}
}
