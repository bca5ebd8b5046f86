package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tun/netnstest"
)

const plainMesh = `
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec:
  nodeName: node-b
  containers:
  - name: echo
    command: [ztun, lab, echo]
    args: ["--listen", ":$(PORT)", "--banner", ":2525"]
    env: [{name: PORT, value: "8080"}]
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec:
  selector: {app: server}
  ports: [{name: http, port: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node-a
  containers:
  - name: idle
    command: [sleep, infinity]
    env:
    - {name: WHERE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
`

var labs atomic.Int64

// start starts a lab of files, or of what a test wrote to dir.
func start(t *testing.T, o Options) *Lab {
	t.Helper()
	l, err := tryStart(t, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := l.Down(ctx); err != nil && !errors.Is(err, ErrNotUp) {
			t.Errorf("Down = %v", err)
		}
	})
	return l
}

func tryStart(t *testing.T, o Options) (*Lab, error) {
	t.Helper()
	netnstest.Require(t)
	o.Name = fmt.Sprintf("test-%d-%d", os.Getpid(), labs.Add(1))
	o.Program = program
	if o.Proxy == "" {
		o.Proxy = proxy
	}
	var progress bytes.Buffer
	o.Progress = &progress
	l, err := Start(t.Context(), o)
	if t.Failed() {
		t.Log(progress.String())
	}
	return l, err
}

// run runs a command in the lab and returns what it printed and its exit code.
func run(t *testing.T, l *Lab, target string, argv ...string) (string, int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	text := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		text <- string(b)
	}()
	code, err := l.Exec(t.Context(), target, argv, Stdio{Out: w, Err: w})
	w.Close()
	out := <-text
	if err != nil {
		t.Fatalf("Exec(%s, %q) = %v: %s", target, argv, err, out)
	}
	return out, code
}

// members returns every process of a lab, by its init's command line.
func members(t *testing.T, l *Lab) []int {
	t.Helper()
	parents := map[int]int{}
	root := 0
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		_, after, _ := bytes.Cut(stat, []byte(") "))
		fields := strings.Fields(string(after))
		if fields[0] == "Z" {
			continue
		}
		parents[pid], _ = strconv.Atoi(fields[1])
		args, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if bytes.Contains(args, []byte("lab\x00init\x00")) && bytes.Contains(args, []byte(`"`+l.name+`"`)) {
			root = pid
		}
	}
	if root == 0 {
		return nil
	}
	found := []int{root}
	for i := 0; i < len(found); i++ {
		for pid, parent := range parents {
			if parent == found[i] {
				found = append(found, pid)
			}
		}
	}
	return found
}

// gone says whether none of the processes runs any more.
func gone(pids []int) bool {
	return !slices.ContainsFunc(pids, func(pid int) bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return false
		}
		_, after, _ := bytes.Cut(stat, []byte(") "))
		return !bytes.HasPrefix(after, []byte("Z"))
	})
}

// traces returns what the machine shows of labs and should not when none runs.
func traces(t *testing.T, l *Lab) []string {
	t.Helper()
	var found []string
	sockets, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(sockets), socketAddress(l.name)) {
		found = append(found, "control socket")
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), runtimeDir) {
		found = append(found, "mounts")
	}
	if _, err := os.Stat(runtimeDir); err == nil {
		found = append(found, runtimeDir)
	}
	return found
}

// checkTraces fails unless all traces go. A thread may still be closing what
// its process had open when the process is seen to have ended.
func checkTraces(t *testing.T, l *Lab) {
	t.Helper()
	netnstest.Eventually(t, "nothing is left behind", func() bool {
		found := traces(t, l)
		if len(found) > 0 {
			t.Logf("still there: %q", found)
		}
		return len(found) == 0
	})
}

func TestPodsTalkByName(t *testing.T) {
	l := start(t, Options{Files: map[string]string{"mesh.yaml": plainMesh}})
	status, err := l.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client, server := status.Pods[0], status.Pods[1]
	netnstest.Eventually(t, "the server listens", func() bool {
		_, code := run(t, l, "client", "ztun", "lab", "call", "tcp://server:2525")
		return code == 0
	})
	for _, tt := range []struct {
		name string
		argv []string
		want string
		code int
	}{
		{"by service name", []string{"ztun", "lab", "call", "http://server:8080"}, "client: " + client.Addresses[0].String(), 0},
		{"by long name", []string{"ztun", "lab", "call", "http://server.default.svc.cluster.local:8080"}, "server: server", 0},
		{"server first", []string{"ztun", "lab", "call", "tcp://server:2525"}, "server: server", 0},
		{"IPv6", []string{"ztun", "lab", "call", "http://[" + server.Addresses[1].String() + "]:8080"}, "client: [" + client.Addresses[1].String(), 0},
		{"refused", []string{"ztun", "lab", "call", "http://server:1"}, "ECONNREFUSED", int(syscall.ECONNREFUSED)},
		{"exit code", []string{"sh", "-c", "exit 7"}, "", 7},
		{"signal", []string{"sh", "-c", "kill -KILL $$"}, "", 128 + 9},
		{"downward API", []string{"sh", "-c", "echo $WHERE $HOSTNAME $(hostname)"}, "node-a client client", 0},
		{"the lab's files are out of sight", []string{"sh", "-c", "echo [$(ls /dev/shm)]"}, "[]", 0},
		{"no network administration", []string{"ip", "link", "set", "eth0", "down"}, "not permitted", 2},
		{"no such command", []string{"no-such-command"}, "not found", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, code := run(t, l, "client", tt.argv...)
			if code != tt.code || !strings.Contains(out, tt.want) {
				t.Errorf("exec %q = %q, %d, want %q, %d", tt.argv, out, code, tt.want, tt.code)
			}
		})
	}
	if out, code := run(t, l, "node/node-b", "ip", "-4", "route", "get", client.Addresses[0].String()); code != 0 || !strings.Contains(out, "via 172.30.0.1") {
		t.Errorf("route from node-b to the client = %q, want one over the fabric", out)
	}
	if _, err := l.Exec(t.Context(), "nobody", []string{"true"}, Stdio{}); err == nil {
		t.Error("Exec in a pod that is not there = nil, want an error")
	}
}

// A status has room for more than a packet has, and says where things are.
func TestStatusOfManyServices(t *testing.T) {
	const many = 1500
	var text strings.Builder
	text.WriteString(plainMesh)
	for i := range many {
		fmt.Fprintf(&text, "---\n{apiVersion: v1, kind: Service, metadata: {name: a-name-that-is-not-short-%d}, spec: {selector: {app: server}, ports: [{port: 8080}]}}\n", i)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mesh.yaml"), []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	l := start(t, Options{Dir: dir})
	status, err := l.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := len(status.Service); got < many {
		t.Errorf("%d services, want %d and more", got, many)
	}
	inside, _ := run(t, l, "client", "readlink", "/proc/self/ns/net")
	if outside, _ := run(t, l, "fabric", "stat", "-L", "-c", "net:[%i]", status.Pods[0].Netns); outside != inside || inside == "" {
		t.Errorf("the client is in %q, and its path leads to %q", inside, outside)
	}
	if out, _ := run(t, l, "fabric", "ls", status.Config); !strings.Contains(out, renderedFile) {
		t.Errorf("the control plane reads %q, want %s among it", out, renderedFile)
	}
}

// What pods and their node know of each other is not forgotten when the machine
// has more neighbours than the kernel wants to know, and stays right when pods
// are added.
func TestPodsAndTheirNodeKnowEachOther(t *testing.T) {
	const pods = 6
	var text strings.Builder
	for i := range pods {
		fmt.Fprintf(&text, "---\n{apiVersion: v1, kind: Pod, metadata: {name: p%d}, spec: {containers: [{name: c, command: [sleep, '1000']}]}}\n", i)
	}
	l := start(t, Options{Files: map[string]string{"pods.yaml": text.String()}})
	mac := func(target, link string) string {
		out, _ := run(t, l, target, "ip", "-o", "link", "show", link)
		_, mac, _ := strings.Cut(out, "link/ether ")
		mac, _, _ = strings.Cut(mac, " ")
		return mac
	}
	knows := func(target, address, mac string) {
		out, _ := run(t, l, target, "ip", "neigh", "show", "nud", "permanent")
		if mac == "" || !strings.Contains(out, address+" dev ") || !strings.Contains(out, " lladdr "+mac+" ") {
			t.Errorf("%s knows %q, want %s at %s", target, out, address, mac)
		}
	}
	status, err := l.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	node := "node/" + defaultNode
	for _, p := range status.Pods {
		knows(p.Name, gateways(0)[0].String(), mac(node, "cni0"))
		knows(node, p.Addresses[0].String(), mac(p.Name, "eth0"))
	}
	if len(status.Pods) != pods {
		t.Errorf("%d pods, want %d", len(status.Pods), pods)
	}
}

func TestDownLeavesNothing(t *testing.T) {
	l := start(t, Options{Files: map[string]string{"mesh.yaml": plainMesh}})
	pids := members(t, l)
	if len(pids) < 8 {
		t.Fatalf("members = %v, want init, supervise, control, 2 x (proxy, attach), 2 containers", pids)
	}
	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	netnstest.Eventually(t, "all processes have ended", func() bool { return gone(pids) })
	checkTraces(t, l)
	if _, err := l.Status(t.Context()); !errors.Is(err, ErrNotUp) {
		t.Errorf("Status = %v, want ErrNotUp", err)
	}
}

func TestKillLeavesNothing(t *testing.T) {
	for _, victim := range []string{"init", "supervise"} {
		t.Run(victim, func(t *testing.T) {
			l := start(t, Options{Files: map[string]string{"mesh.yaml": plainMesh}})
			pids := members(t, l)
			if len(pids) < 8 {
				t.Fatalf("members = %v", pids)
			}
			// A process that tries to get away from the others.
			if _, code := run(t, l, "client", "sh", "-c", "setsid sleep 100000 >/dev/null 2>&1 & exit 0"); code != 0 {
				t.Fatalf("setsid: exit code %d", code)
			}
			pids = members(t, l)
			i := slices.IndexFunc(pids, func(pid int) bool {
				args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				return bytes.Contains(args, []byte("lab\x00"+victim+"\x00"))
			})
			if i < 0 {
				t.Fatalf("no %s among %v", victim, pids)
			}
			if err := syscall.Kill(pids[i], syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			netnstest.Eventually(t, "all processes have ended", func() bool { return gone(pids) })
			checkTraces(t, l)
		})
	}
}

func TestAttachedLabDiesWithItsStarter(t *testing.T) {
	netnstest.Require(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mesh.yaml"), []byte(plainMesh), 0o644); err != nil {
		t.Fatal(err)
	}
	l := &Lab{name: fmt.Sprintf("test-%d-%d", os.Getpid(), labs.Add(1))}
	cmd := exec.Command(program, "lab", "--name", l.name, "up", "--attached", "-f", dir, "--proxy", proxy)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	netnstest.Eventually(t, "the lab is up", func() bool {
		status, err := l.Status(t.Context())
		return err == nil && len(status.Pods) == 2
	})
	pids := members(t, l)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	netnstest.Eventually(t, "all processes have ended", func() bool { return len(pids) > 0 && gone(pids) })
	checkTraces(t, l)
}

func TestOneLabOfAName(t *testing.T) {
	l := start(t, Options{Files: map[string]string{"mesh.yaml": plainMesh}})
	_, err := Start(t.Context(), Options{Name: l.name, Files: map[string]string{}, Program: program, Proxy: proxy})
	if err == nil || !strings.Contains(err.Error(), "is up already") {
		t.Errorf("Start of the same name = %v, want that it is up already", err)
	}
}

func TestBadFilesAreNamed(t *testing.T) {
	for _, tt := range []struct {
		name, yaml string
		want       []string
	}{
		{"no YAML", "a: [", []string{"mesh.yaml"}},
		{"unknown field", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  nodName: x\n  containers: [{name: c, command: [true]}]\n", []string{"mesh.yaml:5", "nodName"}},
		{"no command", "# line 1\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: nginx}]}\n", []string{"mesh.yaml:3", "command"}},
		{"no container", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: []}\n", []string{"mesh.yaml:1", "containers"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := tryStart(t, Options{Files: map[string]string{"mesh.yaml": tt.yaml}})
			if err == nil {
				l.Down(t.Context())
				t.Fatal("Start = nil, want an error")
			}
			for _, w := range tt.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("Start = %v, want it to name %q", err, w)
				}
			}
		})
	}
}

func TestLabFollowsItsDirectory(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("mesh.yaml", plainMesh)
	l := start(t, Options{Dir: dir})
	t.Cleanup(func() {
		if status, err := l.Status(context.Background()); t.Failed() {
			t.Logf("%+v %v", status, err)
		}
	})
	pods := func() (names string, problem string) {
		status, err := l.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range status.Pods {
			if p.Containers[0].State == "running" {
				names += p.Name + " "
			}
		}
		return names, status.Problem
	}
	write("more.yaml", strings.NewReplacer("name: client", "name: late", "node-a", "node-c").Replace(plainMesh[strings.LastIndex(plainMesh, "---"):]))
	netnstest.Eventually(t, "the new pod runs on a new node", func() bool { names, _ := pods(); return names == "client late server " })
	if out, code := run(t, l, "late", "ztun", "lab", "call", "http://server:8080"); code != 0 {
		t.Errorf("call from the new pod = %q, %d, want an answer", out, code)
	}
	write("more.yaml", "kind: [")
	netnstest.Eventually(t, "the problem is named", func() bool { _, problem := pods(); return strings.Contains(problem, "more.yaml") })
	if names, _ := pods(); names != "client late server " {
		t.Errorf("pods = %q after a broken change, want no change", names)
	}
	if err := os.Remove(filepath.Join(dir, "more.yaml")); err != nil {
		t.Fatal(err)
	}
	netnstest.Eventually(t, "the pod is gone", func() bool { names, problem := pods(); return names == "client server " && problem == "" })
}

func TestProcessesAreRestartedAsTheyAsk(t *testing.T) {
	pod := func(name, policy, script string) string {
		return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec:\n  restartPolicy: %s\n  containers: [{name: c, command: [sh, -c, %q]}]\n", name, policy, script)
	}
	l := start(t, Options{Files: map[string]string{"mesh.yaml": pod("always", "Always", "exit 3") + pod("never", "Never", "exit 3") + pod("failing", "OnFailure", "exit 3") + pod("done", "OnFailure", "exit 0")}})
	state := func(name string) ProcessStatus {
		t.Helper()
		status, err := l.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		all := []ProcessStatus{status.Control}
		for _, p := range status.Pods {
			all = append(all, p.Containers...)
		}
		for _, n := range status.Nodes {
			all = append(all, n.Proxy)
		}
		i := slices.IndexFunc(all, func(s ProcessStatus) bool { return s.Name == name })
		if i < 0 {
			t.Fatalf("no process %s in %+v", name, all)
		}
		return all[i]
	}
	netnstest.Eventually(t, "those that ask for it are started again", func() bool {
		return state("default/always/c").Starts > 2 && state("default/failing/c").Starts > 2
	})
	for _, name := range []string{"default/never/c", "default/done/c"} {
		if s := state(name); s.Starts != 1 || s.State != "ended" {
			t.Errorf("%s = %+v, want started once and ended", name, s)
		}
	}

	const proxy = "proxy/" + defaultNode
	if err := l.Kill(t.Context(), proxy, unix.SIGKILL, true); err != nil {
		t.Fatal(err)
	}
	netnstest.Eventually(t, "the proxy is held", func() bool { return state(proxy).State == "stopped" })
	if err := l.Release(t.Context(), proxy); err != nil {
		t.Fatal(err)
	}
	netnstest.Eventually(t, "the proxy runs again", func() bool { s := state(proxy); return s.State == "running" && s.Starts == 2 })
	if err := l.Kill(t.Context(), "control", unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	netnstest.Eventually(t, "the control plane was started again", func() bool { s := state("control"); return s.State == "running" && s.Starts == 2 })
	if err := l.Kill(t.Context(), "nothing", unix.SIGTERM, false); err == nil {
		t.Error("Kill of what is not there = nil, want an error")
	}
}

func TestHostNetworkIsTheNodes(t *testing.T) {
	l := start(t, Options{Files: map[string]string{"mesh.yaml": strings.Replace(plainMesh, "nodeName: node-b", "nodeName: node-b\n  hostNetwork: true", 1)}})
	netnstest.Eventually(t, "the node answers", func() bool {
		out, code := run(t, l, "client", "ztun", "lab", "call", "http://server:8080")
		return code == 0 && strings.Contains(out, "server: node-b")
	})
}
