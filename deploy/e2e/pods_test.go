package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztun/ztun/deploy/e2e/cluster"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A place is a namespace of one case, removed with it.
type place struct {
	t    *testing.T
	ctx  context.Context
	name string
}

// newPlace makes a namespace with labels such as "istio.io/dataplane-mode: ambient".
func newPlace(ctx context.Context, t *testing.T, labels ...string) *place {
	t.Helper()
	p := &place{t, ctx, strings.ToLower(strings.TrimPrefix(strings.ReplaceAll(t.Name(), "/", "-"), "Test"))}
	p.apply("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {%s}}}", p.name, strings.Join(labels, ", "))
	t.Cleanup(func() {
		ctx := context.Background()
		now := int64(0)
		_ = world.CoreV1().Pods(p.name).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{})
		_ = world.CoreV1().Namespaces().Delete(ctx, p.name, metav1.DeleteOptions{})
	})
	return p
}

// ambient enrols all pods of a namespace.
const ambient = "istio.io/dataplane-mode: ambient"

// apply formats YAML and applies it.
func (p *place) apply(format string, args ...any) {
	p.t.Helper()
	if err := world.Apply(p.ctx, fmt.Sprintf(format, args...)); err != nil {
		p.t.Fatal(err)
	}
}

// A pod runs `app serve`. Its account and its label app are its name.
type pod struct {
	name, node string
	labels     []string
	spec       string // more of the pod's spec, as YAML's flow style
	container  string // more of its container
}

// run starts pods and a service of port 80 for each, and waits until all are ready.
func (p *place) run(pods ...pod) {
	p.t.Helper()
	p.start(pods...)
	var names []string
	for _, d := range pods {
		names = append(names, d.name)
	}
	if err := world.Ready(p.ctx, p.name, names...); err != nil {
		p.t.Fatal(err)
	}
}

// start is run without the wait.
func (p *place) start(pods ...pod) {
	p.t.Helper()
	for _, d := range pods {
		labels := append([]string{"app: " + d.name}, d.labels...)
		p.apply(podYAML, p.name, d.name, strings.Join(labels, ", "), d.node, more(d.spec), cluster.AppImage, more(d.container))
	}
}

func more(yaml string) string {
	if yaml == "" {
		return ""
	}
	return ", " + yaml
}

const podYAML = `apiVersion: v1
kind: ServiceAccount
metadata: {name: %[2]s, namespace: %[1]s}
---
apiVersion: v1
kind: Service
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  selector: {app: %[2]s}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: echo, port: 9000}, {name: first, port: 9001}, {name: grpc, port: 9002}]
---
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s, labels: {%[3]s}}
spec: {serviceAccountName: %[2]s, nodeName: %[4]s, terminationGracePeriodSeconds: 1%[5]s, containers: [
  {name: app, image: %[6]q, imagePullPolicy: Never, args: [serve],
   readinessProbe: {periodSeconds: 1, httpGet: {port: 8081, path: /}}%[7]s}]}
`

// get reads a pod's object.
func (p *place) get(name string) *corev1.Pod {
	p.t.Helper()
	o, err := world.CoreV1().Pods(p.name).Get(p.ctx, name, metav1.GetOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	return o
}

// answer is what `app get` and its like print.
type answer struct {
	Status int
	Seen   struct {
		Host, Peer string
		Hits       int64
	}
	Error  string
	Millis int64
}

// ask runs a client of the app in a pod, such as ask("client", "get", "http://server/").
func (p *place) ask(from string, command ...string) answer {
	p.t.Helper()
	var a answer
	out, err := world.Exec(p.ctx, p.name, from, append([]string{"/app"}, command...)...)
	if err == nil {
		err = json.Unmarshal([]byte(out), &a)
	}
	if err != nil {
		p.t.Fatalf("%s: %v: %v: %s", from, command, err, out)
	}
	return a
}

// until repeats ask until ok accepts the answer: policies, names and services take a moment to arrive.
func (p *place) until(what string, ok func(answer) bool, from string, command ...string) answer {
	p.t.Helper()
	var last answer
	p.wait(what, func() error {
		if last = p.ask(from, command...); ok(last) {
			return nil
		}
		return fmt.Errorf("%s: %v: got %+v", from, command, last)
	})
	return last
}

func works(a answer) bool { return a.Error == "" }
func fails(a answer) bool { return a.Error != "" }

// wait polls f for a minute at most.
func (p *place) wait(what string, f func() error) {
	p.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if p.ctx.Err() != nil || time.Now().After(deadline) {
			p.t.Fatalf("gave up waiting for %s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// enrolled waits until the agent says that the pods are in the mesh.
func (p *place) enrolled(names ...string) {
	p.t.Helper()
	for _, name := range names {
		p.wait(name+" in the mesh", func() error {
			if got := p.get(name).Annotations[redirection]; got != "enabled" {
				return fmt.Errorf("annotation %s is %q", redirection, got)
			}
			return nil
		})
	}
}

const redirection = "ambient.istio.io/redirection"

// identity is a pod's, as logs show it.
func (p *place) identity(name string) string {
	return "spiffe://cluster.local/ns/" + p.name + "/sa/" + name
}

// logged waits until some proxy's log has a line with all the words.
func (p *place) logged(words ...string) {
	p.t.Helper()
	p.wait(fmt.Sprintf("a log line with %q", words), func() error {
		n, err := p.countLines(words...)
		if n == 0 {
			return errors.Join(errors.New("no such line yet"), err)
		}
		return nil
	})
}

// meshed asks a server from a pod until an answer has come by way of the mesh: a
// line of a proxy's log has both identities and the words. Of pods that ran
// before they came in, and of new services, other nodes hear a moment later, and
// until then plain text is what there is.
func (p *place) meshed(from, server, url string, words ...string) {
	p.t.Helper()
	words = append(words, `direction="inbound"`, p.identity(from), p.identity(server))
	p.wait("an answer of "+server+" to "+from+" in the mesh", func() error {
		if a := p.ask(from, "get", "-timeout=2s", url); a.Error != "" {
			return errors.New(a.Error)
		}
		n, err := p.countLines(words...)
		if n == 0 {
			return errors.Join(fmt.Errorf("no log line with %q", words), err)
		}
		return nil
	})
}

// countLines counts the lines with all the words that the proxies have logged which run now; the error names one that does not.
func (p *place) countLines(words ...string) (n int, err error) {
	pods, err := world.PodsOf(p.ctx, system, proxies.selector)
	for _, proxy := range pods {
		text, failed := world.Logs(p.ctx, system, proxy.Name, proxies.container)
		err = errors.Join(err, failed)
		for line := range strings.Lines(text) {
			if containsAll(line, words) {
				n++
			}
		}
	}
	return n, err
}

func containsAll(line string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(line, w) {
			return false
		}
	}
	return true
}

// A session is a client that runs on while the case does something else.
type session struct {
	t      *testing.T
	open   chan struct{}
	done   chan error
	mu     sync.Mutex
	stdout bytes.Buffer
	stderr bytes.Buffer
	opened bool
}

// Write keeps what the client prints, and notices its "open".
func (s *session) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stdout.Write(b)
	if !s.opened && bytes.HasPrefix(s.stdout.Bytes(), []byte("open\n")) {
		s.opened = true
		close(s.open)
	}
	return len(b), nil
}

// begin starts a client of the app that prints "open" once it works, and waits for that.
func (p *place) begin(from string, command ...string) *session {
	p.t.Helper()
	s := &session{t: p.t, open: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		s.done <- world.ExecTo(p.ctx, s, &s.stderr, p.name, from, append([]string{"/app"}, command...)...)
	}()
	select {
	case <-s.open:
	case err := <-s.done:
		p.t.Fatalf("%s: %v ended before it was open: %v %s%s", from, command, err, s.stdout.String(), s.stderr.String())
	case <-p.ctx.Done():
		p.t.Fatalf("%s: %v did not open", from, command)
	}
	return s
}

// wantOpen wants the client to be running still.
func (s *session) wantOpen(what string) {
	s.t.Helper()
	if len(s.done) != 0 {
		s.t.Errorf("%s ended before its time: %s", what, s.stdout.String())
	}
}

// end waits for the client and reads its result.
func (s *session) end(result any) {
	s.t.Helper()
	if err := <-s.done; err != nil {
		s.t.Fatalf("client ended: %v: %s", err, s.stderr.String())
	}
	text := strings.TrimPrefix(s.stdout.String(), "open\n")
	if err := json.Unmarshal([]byte(text), result); err != nil {
		s.t.Fatalf("client said %q: %v", text, err)
	}
}

// loaded and echoed are what `app load` and `app echo` print.
type loaded struct {
	Sent, OK      int
	Longest       int64 `json:"longest_ms"`
	Hosts, Errors map[string]int
}

type echoed struct {
	Bytes   int64
	Rounds  int
	Longest int64 `json:"longest_ms"`
	Error   string
}
