package control

import (
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/ztun/ztun/xds/securityapi"
	"github.com/ztun/ztun/xds/workloadapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// readYAML interprets one file, "f.yaml", with the default mesh.
func readYAML(text string) (*World, Report) {
	return Check(Config{Static: NewStatic(map[string]string{"f.yaml": text})})
}

// world interprets one file that must be usable.
func world(t testing.TB, text string) *World {
	t.Helper()
	w, r := readYAML(text)
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *World) workload(t testing.TB, ns, name string) *workloadapi.Workload {
	t.Helper()
	for _, m := range w.wire.workloads {
		if m.Namespace == ns && m.Name == name {
			return m
		}
	}
	t.Fatalf("no workload %s/%s", ns, name)
	return nil
}

func (w *World) service(t testing.TB, ns, name string) *workloadapi.Service {
	t.Helper()
	for _, m := range w.wire.services {
		if m.Namespace == ns && m.Name == name {
			return m
		}
	}
	t.Fatalf("no service %s/%s", ns, name)
	return nil
}

func (w *World) authorization(key string) *securityapi.Authorization {
	for _, m := range w.wire.authorizations {
		if m.Namespace+"/"+m.Name == key {
			return m
		}
	}
	return nil
}

// texts are a report's problems, each with its place.
func texts(r Report) []string {
	var out []string
	for _, p := range r.Problems {
		out = append(out, p.String())
	}
	return out
}

// hasProblem says whether a problem starts with place and holds text.
func hasProblem(r Report, place, text string) bool {
	for _, p := range texts(r) {
		if strings.HasPrefix(p, place) && strings.Contains(p, text) {
			return true
		}
	}
	return false
}

// docs joins YAML documents.
func docs(parts ...string) string { return strings.Join(parts, "\n---\n") }
