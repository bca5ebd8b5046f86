package control

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const podHead = "apiVersion: v1\nkind: Pod\n"

// Each problem is named with the line and the field it stands in.
func TestProblemsNameFileLineAndField(t *testing.T) {
	for _, tc := range []struct{ name, yaml, place, text string }{
		{"syntax", "a: [1\nb: 2", "f.yaml:", "did not find"},
		{"tab", "a:\n\t- b", "f.yaml:2: ", "found character"},
		{"not an object", "- 1", "f.yaml:1: ", "must be an object"},
		{"no kind", "apiVersion: v1", "f.yaml:1: ", "apiVersion and kind are needed"},
		{"unknown field", podHead + "metadata: {name: a}\nspec:\n  nodename: n1", "f.yaml:5: spec.nodename: ", "it is written nodeName"},
		{"unknown field, no likeness", podHead + "metadata: {name: a}\nspec:\n  foo: n1", "f.yaml:5: spec.foo: ", "unknown field"},
		{"unknown field in a list", podHead + "metadata: {name: a}\nspec:\n  containers:\n  - name: c\n    ports:\n    - containerport: 1", "f.yaml:8: spec.containers[0].ports[0].containerport: ", "containerPort"},
		{"string wanted", podHead + "metadata:\n  name: a\n  labels:\n    v: 1", "f.yaml:6: metadata.labels.v: ", "put 1 in quotes"},
		{"number wanted", podHead + "metadata: {name: a}\nspec: {containers: [{name: c, ports: [{containerPort: '80'}]}]}", "f.yaml:4: spec.containers[0].ports[0].containerPort: ", "must be a whole number, is a string"},
		{"number too large", podHead + "metadata: {name: a}\nspec: {containers: [{name: c, ports: [{containerPort: 3000000000}]}]}", "f.yaml:4: ", "does not fit"},
		{"boolean wanted", podHead + "metadata: {name: a}\nspec: {hostNetwork: maybe}", "f.yaml:4: spec.hostNetwork: ", "must be true or false"},
		{"list wanted", podHead + "metadata: {name: a}\nspec: {containers: {name: c}}", "f.yaml:4: spec.containers: ", "must be a list, is a mapping"},
		{"mapping wanted", podHead + "metadata: [a]", "f.yaml:3: metadata: ", "must be a mapping, is a list"},
		{"repeated key", podHead + "metadata: {name: a}\nspec:\n  nodeName: x\n  nodeName: y", "f.yaml:6: spec.nodeName: ", "the first is on line 5"},
		{"bad time", podHead + "metadata: {name: a, creationTimestamp: soon}", "f.yaml:3: metadata.creationTimestamp: ", "parsing time"},
		{"no name", podHead + "metadata: {}", "f.yaml:3: metadata.name: ", "a name is needed"},
		{"bad name", podHead + "metadata: {name: A_b}", "f.yaml:3: metadata.name: ", "lowercase"},
		{"bad namespace", podHead + "metadata: {name: a, namespace: a.b}", "f.yaml:3: metadata.namespace: ", "is no namespace"},
		{"bad label", podHead + "metadata: {name: a, labels: {x: 'a b'}}", "f.yaml:3: metadata.labels.x: ", "is no label value"},
		{"unknown version", "apiVersion: v2\nkind: Pod", "f.yaml:1: apiVersion: ", "known in v1"},
		{"unknown policy version", "apiVersion: security.istio.io/v9\nkind: PeerAuthentication", "f.yaml:1: apiVersion: ", "v1 and v1beta1"},
		{"kind in lower case", "apiVersion: v1\nkind: pod", "f.yaml:1: ", "is not known"},
		{"misspelt policy", "apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy", "f.yaml:1: ", "is not known"},
		{"policy of another group", "apiVersion: istio.io/v1\nkind: AuthorizationPolicy", "f.yaml:1: ", "is not known"},
		{"policy without a version", "apiVersion: security.istio.io\nkind: AuthorizationPolicy", "f.yaml:1: ", "v1 and v1beta1"},
		{"duplicate", docs(podHead+"metadata: {name: a}", podHead+"metadata: {name: a, namespace: default}"), "f.yaml:7: metadata.name: ", "the first is at f.yaml:1"},
		{"second document", docs(podHead+"metadata: {name: a}", podHead+"metadata: {name: b}\nspec: {x: 1}"), "f.yaml:8: spec.x: ", "unknown field"},
		{"item of a List", "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata:\n    nam: x", "f.yaml:7: items[0].metadata.nam: ", "unknown field"},
		{"pod IP", podHead + "metadata: {name: a}\nstatus:\n  podIP: 10.0.0", "f.yaml:5: status.podIP: ", "no IP address"},
		{"pod IP of no pod", podHead + "metadata: {name: a}\nstatus:\n  podIPs:\n  - ip: 127.0.0.1", "f.yaml:6: status.podIPs[0].ip: ", "cannot be the address of a pod"},
		{"pod IPs of one family", podHead + "metadata: {name: a}\nstatus:\n  podIPs:\n  - ip: 10.0.0.1\n  - ip: 10.0.0.2", "f.yaml:7: status.podIPs[1].ip: ", "second address of its family"},
		{"pod IP is not the first", podHead + "metadata: {name: a}\nstatus:\n  podIP: 10.0.0.9\n  podIPs:\n  - ip: 10.0.0.1", "f.yaml:5: status.podIP: ", "must be the first"},
		{"pod IP annotation", podHead + "metadata:\n  name: a\n  annotations:\n    ztun.io/pod-ips: 10.0.0.1, x", "f.yaml:6: metadata.annotations[ztun.io/pod-ips]: ", `"x" is no IP`},
		{"pod IP twice", docs(podHead+"metadata: {name: a}\nstatus: {podIP: 10.0.0.1}", podHead+"metadata: {name: b}\nstatus: {podIP: 10.0.0.1}"), "f.yaml:9: status: ", "is the address of Pod default/a too, at f.yaml:1"},
		{"container port", podHead + "metadata: {name: a}\nspec:\n  containers:\n  - ports:\n    - containerPort: 70000", "f.yaml:7: spec.containers[0].ports[0].containerPort: ", "is no port"},
		{"waypoint", "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  labels:\n    istio.io/use-waypoint: w", "f.yaml:6: metadata.labels[istio.io/use-waypoint]: ", "waypoints are not served"},
		{"alias bomb", "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]", "f.yaml:", "too large"},
		{"alias of itself", "a: &a [*a]", "f.yaml:1: ", "nested deeper"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, r := readYAML(tc.yaml)
			if r.Used || r.Err() == nil {
				t.Error("the directory is used")
			}
			if !hasProblem(r, tc.place, tc.text) {
				t.Errorf("no problem %q ... %q in %q", tc.place, tc.text, texts(r))
			}
		})
	}
}

func TestAllProblemsAreCollected(t *testing.T) {
	_, r := Check(Config{Static: NewStatic(map[string]string{
		"a.yaml":  docs(podHead+"metadata: {name: a}\nspec: {x: 1, y: 2}", podHead+"metadata: {name: b}\nstatus: {podIP: z}"),
		"b.yml":   "apiVersion: v1\nkind: Service\nmetadata: {name: 1}",
		"c.json":  `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": [{"port": 0}]}}`,
		"d.txt":   "nonsense: [",
		".e.yaml": "nonsense: [",
	})})
	want := []string{
		"a.yaml:4: spec.x: unknown field",
		"a.yaml:4: spec.y: unknown field",
		`a.yaml:9: status.podIP: "z" is no IP address`,
		"b.yml:3: metadata.name: must be a string, is a number: put 1 in quotes",
		"c.json:1: spec.ports[0].port: 0 is no port: 1 to 65535",
	}
	if got := texts(r); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("problems:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestWarningsKeepNothingFromBeingUsed(t *testing.T) {
	for _, tc := range []struct{ name, yaml, place, text string }{
		{"unknown kind", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {whatever: 1}", "f.yaml:1: warning: ", "Deployment apps/v1 is ignored"},
		{"Service of another group", "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: d}", "f.yaml:1: warning: ", "is ignored"},
		{"RequestAuthentication", "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: d}", "f.yaml:1: warning: ", "is ignored"},
		{"pod without address", podHead + "metadata: {name: a}", "f.yaml:1: warning: ", "is not served"},
		{"pod without node", podHead + "metadata: {name: a, labels: {istio.io/dataplane-mode: ambient}}\nspec: {}\nstatus: {podIP: 10.0.0.1}", "f.yaml:4: warning: spec: ", "nodeName is missing"},
		{"namespace nobody made", podHead + "metadata:\n  name: a\n  namespace: elsewhere\nstatus: {podIP: 10.0.0.1}", "f.yaml:5: warning: metadata.namespace: ", "there is no Namespace elsewhere"},
		{"redirection", podHead + "metadata:\n  name: a\n  annotations:\n    ambient.istio.io/redirection: maybe", "f.yaml:6: warning: metadata.annotations", "neither enabled nor pending"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, r := readYAML(tc.yaml)
			if err := r.Err(); err != nil || !r.Used {
				t.Errorf("not used: %v", err)
			}
			if !hasProblem(r, tc.place, tc.text) {
				t.Errorf("no warning %q ... %q in %q", tc.place, tc.text, texts(r))
			}
		})
	}
}

func TestYAMLIsReadAsKubectlReadsIt(t *testing.T) {
	w := world(t, `
x-anchor: &labels {app: web}
apiVersion: v1
kind: List
items: []
---
# only a comment
---
apiVersion: v1
kind: Pod
metadata:
  name: a
  creationTimestamp: 2026-01-02T03:04:05Z
  labels: &l {app: web}
spec:
  hostNetwork: no
  tolerations: null
  containers:
  - name: c
    env: [{name: X, value: "1"}]
    resources: {limits: {cpu: 1, memory: 1Gi}}
    ports: [{name: http, containerPort: 8080}]
    livenessProbe: {httpGet: {port: http, path: /}}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Service
metadata: {name: s}
spec:
  selector: {<<: *l, tier: front}
  ports: [{port: 80}]
`)
	// The List has an unknown key beside items; lists are not decoded strictly.
	if got := w.workload(t, "default", "a").Namespace; got != "default" {
		t.Errorf("namespace %q", got)
	}
}

func TestDirectoryIsReadRecursivelyWithoutHiddenFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("a.yaml", podHead+"metadata: {name: a}")
	write("sub/b.yml", podHead+"metadata: {name: b}")
	write(".hidden/c.yaml", "broken: [")
	write("..data/d.yaml", "broken: [")
	write("README.md", "broken: [")
	if err := os.Symlink(filepath.Join(dir, "a.yaml"), filepath.Join(dir, "sub", "link.yaml")); err != nil {
		t.Fatal(err)
	}
	_, r := Check(Config{Dir: dir})
	if r.Counts.Files != 3 || !hasProblem(r, "sub/link.yaml:1: ", "") && !hasProblem(r, "sub/link.yaml:3: metadata.name: ", "the first is at a.yaml:1") {
		t.Errorf("%d files, problems %q", r.Counts.Files, texts(r))
	}
}

func TestUnreadableFilesAndDirectoriesAreProblems(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/nowhere", filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	if _, r := Check(Config{Dir: dir}); r.Used || !hasProblem(r, "a.yaml: ", "no such file") {
		t.Errorf("problems %q", texts(r))
	}
	if _, r := Check(Config{Dir: t.TempDir()}); r.Used || !hasProblem(r, "", "holds no .yaml") {
		t.Errorf("an empty directory is used: %q", texts(r))
	}
	if _, r := Check(Config{Dir: filepath.Join(dir, "none")}); r.Used || len(r.Problems) == 0 {
		t.Error("a directory that is not there is used")
	}
}

func TestProblemsAreBounded(t *testing.T) {
	_, r := readYAML(strings.Repeat("---\n{}\n", 3*maxProblems))
	if len(r.Problems) > maxProblems+1 || r.Used {
		t.Errorf("%d problems, used %v", len(r.Problems), r.Used)
	}
}

// A directory is used with however many warnings, but not with an error that
// is not listed for them.
func TestUnlistedProblemsCount(t *testing.T) {
	var text strings.Builder
	for i := range maxProblems + 10 { // Without a selector.
		fmt.Fprintf(&text, "---\napiVersion: v1\nkind: Service\nmetadata: {name: s%d}\nspec: {ports: [{port: 80}]}\n", i)
	}
	if _, r := readYAML(text.String()); !r.Used || len(r.Problems) != maxProblems+1 {
		t.Errorf("warnings alone: %d problems, used %v, want %d and used: %v", len(r.Problems), r.Used, maxProblems+1, r.Err())
	}
	for _, errors := range []int{1, 2} {
		// Policies are looked at after Services.
		text.WriteString("---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p" + fmt.Sprint(errors) + "}\nspec: {rules: [{to: [{operation: {ports: [none]}}]}]}\n")
		if _, r := readYAML(text.String()); r.Used || len(r.Problems) > maxProblems+1 {
			t.Errorf("with %d errors behind them: %d problems, used %v, want not used", errors, len(r.Problems), r.Used)
		}
	}
}
