package lab

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestAddressesDoNotMeet(t *testing.T) {
	seen := map[netip.Addr]string{}
	take := func(what string, addrs ...netip.Addr) {
		t.Helper()
		for _, a := range addrs {
			if other, ok := seen[a]; ok {
				t.Fatalf("%s and %s are both %s", what, other, a)
			}
			seen[a] = what
		}
	}
	take("router", fabricAddrs(fabricRouter)...)
	take("control", fabricAddrs(fabricControl)...)
	for node := range maxNodes {
		take("node", fabricAddrs(fabricNodes+node)...)
		take("gateway", gateways(node)...)
		for i, p := range podSubnets(node) {
			if !p.Contains(gateways(node)[i]) || p.Masked() != p {
				t.Fatalf("subnet %v of node %d does not hold its gateway %v", p, node, gateways(node)[i])
			}
		}
		for _, pod := range []int{0, 1, maxPodsPerNode - 1} {
			addrs, err := podAddrs(node, pod)
			if err != nil {
				t.Fatal(err)
			}
			take("pod", addrs...)
			for i, p := range podSubnets(node) {
				if !p.Contains(addrs[i]) {
					t.Fatalf("podAddrs(%d, %d) = %v, not in %v", node, pod, addrs, p)
				}
			}
		}
	}
	if _, err := podAddrs(maxNodes, 0); err == nil {
		t.Error("podAddrs beyond the last node = nil, want an error")
	}
}

func TestRingKeepsTheEnd(t *testing.T) {
	var r ring
	line := strings.Repeat("x", 999) + "\n"
	for range 3000 {
		r.Write([]byte(line))
	}
	r.Write([]byte("last"))
	text, next, _ := r.since(0)
	if len(text) > logSize || len(text) < logSize/2 || next != 3_000_004 {
		t.Errorf("since(0) = %d bytes up to %d, want at most %d up to 3000004", len(text), next, logSize)
	}
	if !bytes.HasSuffix(text, []byte("\nlast")) || len(text)%1000 != 4 {
		t.Errorf("since(0) ends in %q and has %d bytes, want whole lines and the last one", text[len(text)-10:], len(text))
	}
	var out bytes.Buffer
	if err := r.copyTo(context.Background(), &out, "p | ", false); err != nil || !strings.HasSuffix(out.String(), "\np | last\n") {
		t.Errorf("copyTo = %v, ends in %q, want the last line behind its prefix", err, out.String()[out.Len()-20:])
	}
	if text, _, _ := r.since(next - 2); string(text) != "st" {
		t.Errorf("since = %q, want what came after", text)
	}
}

func TestExpandAsKubernetesDoes(t *testing.T) {
	env := []string{"A=1", "B=two", "A=3"}
	for text, want := range map[string]string{
		"": "", "x": "x", "$(A)": "3", "$(A)$(B)": "3two", "$(C)": "$(C)", "$$(A)": "$(A)",
		"$": "$", "$A": "$A", "$(A": "$(A", "a$(B)c": "atwoc", "100%$": "100%$",
	} {
		if got := expand(text, env); got != want {
			t.Errorf("expand(%q) = %q, want %q", text, got, want)
		}
	}
}

func TestCapabilitiesFollowTheSecurityContext(t *testing.T) {
	context := func(add, drop []corev1.Capability) *corev1.SecurityContext {
		return &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: add, Drop: drop}}
	}
	for _, tt := range []struct {
		name string
		sc   *corev1.SecurityContext
		want int
		has  string
	}{
		{"default", nil, len(defaultCaps), "CHOWN"},
		{"drop all", context(nil, []corev1.Capability{"ALL"}), 0, ""},
		{"drop all, add one", context([]corev1.Capability{"NET_BIND_SERVICE"}, []corev1.Capability{"ALL"}), 1, "NET_BIND_SERVICE"},
		{"add", context([]corev1.Capability{"NET_ADMIN"}, nil), len(defaultCaps) + 1, "NET_ADMIN"},
		{"unknown", context([]corev1.Capability{"SYS_MODULE"}, nil), len(defaultCaps), "CHOWN"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := capabilities(tt.sc)
			want, ok := defaultCaps[tt.has]
			if !ok {
				want, ok = extraCaps[tt.has]
			}
			found := !ok
			for _, c := range got {
				found = found || c == want
			}
			if len(got) != tt.want || !found {
				t.Errorf("capabilities = %v, want %d with %s", got, tt.want, tt.has)
			}
		})
	}
}

func TestMissingThingsAreNamedWithTheirMend(t *testing.T) {
	dir := t.TempDir()
	closed := filepath.Join(dir, "closed")
	if err := os.WriteFile(closed, nil, 0); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ path, want string }{
		{filepath.Join(dir, "none"), "mknod"},
		{closed, "chmod 0666 " + closed},
	} {
		err := checkTUN(tt.path)
		if err == nil && os.Geteuid() == 0 {
			continue // Nothing is closed to root.
		}
		var need Need
		if !errors.As(err, &need) || !strings.Contains(need.Command, tt.want) {
			t.Errorf("checkTUN(%s) = %v, want a Need with %q", tt.path, err, tt.want)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		o    Options
		want string
	}{
		{Options{Name: "Bad Name", Dir: dir}, "name"},
		{Options{Dir: filepath.Join(dir, "none"), Proxy: file}, "no such file"},
		{Options{Dir: file, Proxy: file}, "not a directory"},
		{Options{Dir: dir, Proxy: filepath.Join(dir, "none")}, "ztun-proxy"},
		{Options{Dir: runtimeMount, Proxy: file}, "elsewhere"},
	} {
		if err := tt.o.complete(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("complete(%+v) = %v, want %q", tt.o, err, tt.want)
		}
	}
}
