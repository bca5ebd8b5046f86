package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckNamesTheRuleThatIsBroken(t *testing.T) {
	own := func(name string) string { return module + name }
	tests := []struct {
		name string
		pkg  goPackage
		want string // A part of the only problem; empty for none.
	}{
		{"down", goPackage{ImportPath: own("tunnel"), Imports: []string{"fmt", own("xds/mesh"), own("tunnel/splice")}}, ""},
		{"up", goPackage{ImportPath: own("xds/mesh"), Imports: []string{own("tunnel")}}, "points up"},
		{"neighbour", goPackage{ImportPath: own("tunnel/hbone"), Imports: []string{own("netstack")}}, "its neighbour"},
		{"config of ours", goPackage{ImportPath: own("cmd/internal/config"), Imports: []string{own("tunnel/identity")}}, "nothing of ours"},
		{"cmd/internal down", goPackage{ImportPath: own("cmd/internal/lab"), Imports: []string{own("cmd/internal/agent")}}, ""},
		{"cmd/internal up", goPackage{ImportPath: own("cmd/internal/agent"), Imports: []string{own("cmd/internal/lab")}}, "points up"},
		{"program", goPackage{ImportPath: own("cmd/internal/lab"), Imports: []string{own("cmd/ztun")}}, "points up"},
		{"test package in code", goPackage{ImportPath: own("netstack"), Imports: []string{own("tun/tuntest")}}, "_test.go"},
		{"test package in a test", goPackage{ImportPath: own("netstack"), TestImports: []string{own("tun/tuntest")}}, ""},
		{"test package beside what it tests", goPackage{ImportPath: own("tunnel/certs/certstest"), Imports: []string{own("tunnel/certs")}}, ""},
		{"test that looks up", goPackage{ImportPath: own("xds"), XTestImports: []string{own("xds/control")}}, "a test imports"},
		{"gvisor outside", goPackage{ImportPath: own("tunnel/hbone"), Imports: []string{"gvisor.dev/gvisor/pkg/tcpip"}}, "only netstack may"},
		{"gvisor inside", goPackage{ImportPath: own("netstack"), Imports: []string{"gvisor.dev/gvisor/pkg/tcpip"}}, ""},
		{"http2 in a test", goPackage{ImportPath: own("tunnel/hbone"), TestImports: []string{"golang.org/x/net/http2"}}, ""},
		{"idna is not http2", goPackage{ImportPath: own("tunnel"), Imports: []string{"golang.org/x/net/idna"}}, ""},
		{"client-go in control", goPackage{ImportPath: own("xds/control"), Imports: []string{"k8s.io/client-go/kubernetes"}}, "only cmd/internal/enrol, cmd/ztun-agent may"},
		{"k8s types in control", goPackage{ImportPath: own("xds/control"), Imports: []string{"k8s.io/api/core/v1"}}, ""},
		{"protobuf in tunnel", goPackage{ImportPath: own("tunnel"), Imports: []string{own("xds/workloadapi")}}, "only xds/mesh, xds/control may"},
		{"stranger", goPackage{ImportPath: own("util")}, "has no row"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			problems := check([]goPackage{tt.pkg})
			if tt.want == "" && len(problems) > 0 {
				t.Fatalf("check(%+v) = %q, want none", tt.pkg, problems)
			}
			if tt.want != "" && (len(problems) != 1 || !strings.Contains(problems[0], tt.want)) {
				t.Fatalf("check(%+v) = %q, want one with %q", tt.pkg, problems, tt.want)
			}
		})
	}
}

func TestEnvReadsFindsTheLine(t *testing.T) {
	dir := t.TempDir()
	src := "package x\n\nimport \"os\"\n\nvar v = os.Getenv(\"HOME\")\n"
	if err := os.WriteFile(filepath.Join(dir, "x.go"), []byte(src), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{"tunnel": 1, "cmd/internal/config": 0} {
		got, err := envReads([]goPackage{{ImportPath: module + name, Dir: dir, GoFiles: []string{"x.go"}}})
		if err != nil || len(got) != want {
			t.Errorf("envReads(%s) = %q, %v, want %d problems", name, got, err, want)
		}
		if want == 1 && !strings.HasPrefix(got[0], "tunnel/x.go:5: os.Getenv") {
			t.Errorf("envReads(%s) = %q, want file and line", name, got)
		}
	}
}
