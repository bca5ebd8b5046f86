package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/ztun/ztun/cmd/internal/cni/wire"
	"github.com/ztun/ztun/cmd/internal/owner"
	"github.com/ztun/ztun/tun/netnstest"
)

const (
	// childEnv makes the test program be the agent.
	childEnv = "ZTUN_AGENT_TEST_CHILD"
	// patience bounds every wait; a passing test never reaches it.
	patience = 60 * time.Second

	chain = `{"name":"n", "cniVersion":"1.0.0", "plugins":[{"type":"a"}]}`
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		main()
		os.Exit(0)
	}
	netnstest.Main(m)
}

// An api is a Kubernetes API server that knows as much as an agent asks for.
type api struct {
	*httptest.Server

	// mu guards the fields below.
	mu      sync.Mutex
	hold    chan struct{} // Requests wait until it is closed.
	objects map[string]any
	failing int // HTTP status of everything; 0: none.
}

func newAPI(t *testing.T) *api {
	t.Helper()
	a := &api{objects: map[string]any{}}
	a.put("/api/v1/pods", &corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
		Items: []corev1.Pod{{ObjectMeta: metav1.ObjectMeta{Name: "plain-1", Namespace: "demo", UID: "u-1", ResourceVersion: "1"}, Spec: corev1.PodSpec{NodeName: "na"}}}})
	a.put("/api/v1/namespaces", &corev1.NamespaceList{TypeMeta: metav1.TypeMeta{Kind: "NamespaceList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
		Items: []corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "demo", ResourceVersion: "1"}}}})
	a.put("/api/v1/services", &corev1.ServiceList{TypeMeta: metav1.TypeMeta{Kind: "ServiceList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"}})
	a.put("/api/v1/nodes/na", &corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}, ObjectMeta: metav1.ObjectMeta{Name: "na", Labels: map[string]string{"kubernetes.io/os": "linux"}}})
	a.put(ownPath, ownSet())
	a.Server = httptest.NewServer(a)
	t.Cleanup(func() {
		a.CloseClientConnections()
		a.Close()
	})
	return a
}

const ownPath = "/apis/apps/v1/namespaces/istio-system/daemonsets/istio-cni-node"

func ownSet() *appsv1.DaemonSet {
	return &appsv1.DaemonSet{TypeMeta: metav1.TypeMeta{Kind: "DaemonSet", APIVersion: "apps/v1"}, ObjectMeta: metav1.ObjectMeta{Name: daemonSet, Namespace: "istio-system"},
		Spec: appsv1.DaemonSetSpec{Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{NodeSelector: map[string]string{"kubernetes.io/os": "linux"}}}}}
}

func (a *api) put(path string, object any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.objects[path] = object
}

func (a *api) fail(code int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.failing = code
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	object, hold, failing := a.objects[r.URL.Path], a.hold, a.failing
	a.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-r.Context().Done():
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	refuse := func(code int, reason metav1.StatusReason) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: reason, Code: int32(code)})
	}
	switch {
	case failing != 0:
		refuse(failing, map[int]metav1.StatusReason{401: metav1.StatusReasonUnauthorized, 403: metav1.StatusReasonForbidden, 500: metav1.StatusReasonInternalError}[failing])
	case r.Method != http.MethodGet || object == nil:
		refuse(http.StatusNotFound, metav1.StatusReasonNotFound)
	case r.URL.Query().Get("sendInitialEvents") != "":
		refuse(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid) // A server that only lists.
	case r.URL.Query().Get("watch") != "":
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done() // Nothing ever changes.
	default:
		_ = json.NewEncoder(w).Encode(object)
	}
}

// A program is an agent that runs on a node of folders.
type program struct {
	t          *testing.T
	dir        string
	cmd        *exec.Cmd
	out        *output
	done       chan struct{}
	health     string
	monitoring string
}

type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// host makes the folders of a node whose only process is the test.
func host(t *testing.T) string {
	t.Helper()
	netnstest.Require(t) // The agent's capabilities.
	dir := t.TempDir()
	for _, d := range []string{"opt/cni/bin", "etc/cni/net.d", "proc", "var/run/netns", "run"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(fmt.Sprintf("/proc/%d", os.Getpid()), filepath.Join(dir, "proc/1")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"etc/cni/net.d/10-n.conflist": chain, "ztun-cni": "the plugin"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func start(t *testing.T, dir string, a *api, env ...string) *program {
	t.Helper()
	return startBy(t, []string{"/proc/self/exe"}, dir, a, env...)
}

// startBy starts the agent by a command.
func startBy(t *testing.T, command []string, dir string, a *api, env ...string) *program {
	t.Helper()
	p := &program{t: t, dir: dir, out: new(output), done: make(chan struct{}), health: freePort(t), monitoring: freePort(t)}
	kubeconfig := filepath.Join(dir, "kubeconfig")
	text := fmt.Sprintf("{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u}], clusters: [{name: c, cluster: {server: %q}}]}", a.URL)
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(command[0], command[1:]...)
	p.cmd.Env = append([]string{
		childEnv + "=1", "NODE_NAME=na", "KUBECONFIG=" + kubeconfig, "ZTUN_HOST_DIR=" + dir, "ZTUN_CNI_BINARY=" + filepath.Join(dir, "ztun-cni"),
		"MOUNTED_CNI_NET_DIR=" + filepath.Join(dir, "etc/cni/net.d"), "CNI_AGENT_RUN_DIR=" + filepath.Join(dir, "run"), "ZTUN_STATE_DIR=" + filepath.Join(dir, "state"),
		"ZTUNNEL_UDS_ADDRESS=" + filepath.Join(dir, "run/z.sock"), "ZTUN_HEALTH_PORT=" + p.health, "MONITORING_PORT=" + p.monitoring, "EXCLUDE_NAMESPACES=kube-system",
	}, env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(p.done); _ = p.cmd.Wait() }()
	t.Cleanup(func() { _ = p.cmd.Process.Kill(); <-p.done })
	return p
}

// get returns what the agent answers; 0: nothing.
func (p *program) get(port, path string) (int, string) {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:" + port + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text)
}

func (p *program) ready() bool {
	code, _ := p.get(p.health, "/readyz")
	return code == 200
}

func (p *program) wait(what string, ok func() bool) {
	p.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		select {
		case <-p.done:
			p.t.Fatalf("no %s: the agent ended: %s", what, p.out)
		default:
		}
		if time.Now().After(end) {
			p.t.Fatalf("no %s: %s", what, p.out)
		}
	}
}

// stop ends the agent as the kubelet does.
func (p *program) stop() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("the agent does not end: %s", p.out)
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Errorf("exit code %d: %s", code, p.out)
	}
}

func (p *program) file(name string) string {
	text, err := os.ReadFile(filepath.Join(p.dir, name))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func (p *program) installed() bool {
	return strings.Contains(p.file("etc/cni/net.d/10-n.conflist"), wire.PluginType) && p.file("opt/cni/bin/ztun-cni") == "the plugin"
}

// add asks as the plugin does.
func (p *program) add(body string) (int, string) {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(p.dir, "run", wire.SocketName))
	}}}
	resp, err := client.Post("http://agent"+wire.AddPath, "application/json", strings.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text)
}

const plainPod = `{"Netns":"/var/run/netns/x","PodName":"plain-1","PodNamespace":"demo","PodUID":"u-1"}`

func TestStartOrder(t *testing.T) {
	a := newAPI(t)
	hold := make(chan struct{})
	a.hold = hold
	p := start(t, host(t), a)
	p.wait("plugin's socket", func() bool { code, _ := p.add("{}"); return code == 400 })
	// The answer takes as long as the plugin would wait: whatever comes too early
	// is there by then.
	if code, text := p.add(plainPod); code != 500 || !strings.Contains(text, "API server") {
		t.Errorf("a pod before Kubernetes answers: %d %q", code, text)
	}
	// Alive, not ready, nothing installed; proxies find a socket, and have to wait.
	if code, _ := p.get(p.health, "/healthz"); code != 200 {
		t.Errorf("/healthz = %d", code)
	}
	if code, text := p.get(p.health, "/readyz"); code != 503 || !strings.Contains(text, "starting") {
		t.Errorf("/readyz = %d %q", code, text)
	}
	if p.installed() {
		t.Error("the plugin is installed before the agent can answer it")
	}
	if _, err := os.Stat(filepath.Join(p.dir, "run/z.sock")); err != nil {
		t.Error(err)
	}
	close(hold)
	p.wait("readiness", p.ready)
	if !p.installed() {
		t.Errorf("ready without the plugin: %s", p.file("etc/cni/net.d/10-n.conflist"))
	}
	if code, text := p.add(plainPod); code != 200 {
		t.Errorf("a pod that is not in the mesh: %d %q", code, text)
	}
	if code, text := p.add(strings.Replace(plainPod, "demo", "kube-system", 1)); code != 200 {
		t.Errorf("a pod of an excluded namespace: %d %q", code, text)
	}
	_, metrics := p.get(p.monitoring, "/metrics")
	for _, want := range []string{
		`istio_cni_installs_total{result="SUCCESS"} 1`, `istio_cni_install_ready 1`, `ztunnel_connected 0`, `istio_cni_plugin_requests_total{response_code="200"} 2`,
		`nodeagent_reconcile_events_total{type="add"} 1`, `ztun_agent_pods{phase="served"} 0`, `istio_build{component="cni",tag="unknown"} 1`, `ztun_agent_standin_devices 0`,
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("metrics lack %s", want)
		}
	}
	p.stop()
}

// TestStops tells each kind of stop from the others.
func TestStops(t *testing.T) {
	for _, tt := range []struct {
		name   string
		env    []string
		change func(*api)
		stays  bool
	}{
		{"replaced", nil, func(*api) {}, true},
		{"Kubernetes is away", nil, func(a *api) { a.fail(500) }, true},
		{"told to clean up always", []string{"AMBIENT_DISABLE_SAFE_UPGRADE=true"}, func(*api) {}, false},
		{"uninstalled", nil, func(a *api) { a.put(ownPath, nil) }, false},
		{"being deleted", nil, func(a *api) {
			ds := ownSet()
			ds.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
			a.put(ownPath, ds)
		}, false},
		{"rights are gone", nil, func(a *api) { a.fail(403) }, false},
		{"account is gone", nil, func(a *api) { a.fail(401) }, false},
		{"not on this node any more", nil, func(a *api) {
			ds := ownSet()
			ds.Spec.Template.Spec.NodeSelector["pool"] = "other"
			a.put(ownPath, ds)
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAPI(t)
			p := start(t, host(t), a, tt.env...)
			p.wait("readiness", p.ready)
			tt.change(a)
			p.stop()
			switch {
			case tt.stays && !p.installed():
				t.Errorf("the plugin is gone: %s", p.out)
			case !tt.stays && (p.file("etc/cni/net.d/10-n.conflist") != chain || !strings.Contains(p.file("opt/cni/bin/ztun-cni"), "no such file")):
				t.Errorf("the plugin stays: %s", p.out)
			}
		})
	}
}

// meshed makes the node's pod meshed-1, one of the mesh.
func (a *api) meshed() {
	a.put("/api/v1/pods", &corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
		Items: []corev1.Pod{{ObjectMeta: metav1.ObjectMeta{Name: "meshed-1", Namespace: "demo", UID: "u-2", ResourceVersion: "1",
			Labels: map[string]string{"istio.io/dataplane-mode": "ambient"}}, Spec: corev1.PodSpec{NodeName: "na"}}}})
}

// TestNetnsThatVanished: the pod is held, and the answer says what is not there.
func TestNetnsThatVanished(t *testing.T) {
	a := newAPI(t)
	a.meshed()
	dir := host(t)
	if err := os.WriteFile(filepath.Join(dir, "var/run/netns/unmounted"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, dir, a)
	p.wait("readiness", p.ready)
	for netns, want := range map[string]string{
		"/var/run/netns/gone":  dir + "/var/run/netns/gone",
		"/run/netns/unmounted": dir + "/var/run/netns/unmounted is not mounted",
		"/proc/4194305/ns/net": dir + "/proc/4194305/ns/net",
	} {
		code, text := p.add(fmt.Sprintf(`{"Netns":%q,"PodName":"meshed-1","PodNamespace":"demo","PodUID":"u-2","IPs":[{"Address":"10.1.0.5/24"}]}`, netns))
		if code != 500 || !strings.Contains(text, "demo/meshed-1") || !strings.Contains(text, want) {
			t.Errorf("%s: %d %q, want the pod and %q", netns, code, text, want)
		}
	}
}

// TestEachCapabilityIsNeeded takes one at a time away from those that the chart
// gives. What the agent checks itself is in needs_test.go.
func TestEachCapabilityIsNeeded(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const all = "-all,+sys_admin,+net_admin,+net_raw,+sys_ptrace,+dac_override,+chown"
	for _, tt := range []struct {
		name, without string
		// says is what the agent says at its start, or of readiness, or of a pod.
		says string
	}{
		{"all", "", ""},
		{"another's directories are written", ",-dac_override", "permission denied"},
		{"the proxy's sockets are its own", ",-chown", "operation not permitted"},
		{"ICMP errors are truthful", ",-net_raw", "lacks CAP_NET_RAW"},
		{"namespaces are entered", ",-sys_admin", "CAP_SYS_ADMIN"},
		{"devices are made", ",-net_admin", "CAP_NET_ADMIN"},
		{"processes are looked at", ",-sys_ptrace", "CAP_SYS_PTRACE"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAPI(t)
			a.meshed()
			dir := host(t)
			for _, d := range []string{"opt/cni/bin", "etc/cni/net.d"} {
				if err := os.Chown(filepath.Join(dir, d), 4711, 4711); err != nil {
					t.Fatal(err)
				}
			}
			pod, other := netnstest.New(t, "pod"), netnstest.New(t, "node")
			netnstest.Veth(t, pod, "eth0", other, "pod0")
			pod.Addr("eth0", "10.1.0.5/24")
			caps := all + tt.without
			p := startBy(t, []string{"setpriv", "--inh-caps=" + caps, "--bounding-set=" + caps, exe}, dir, a, "ZTUN_PROXY_UID=4711", "ZTUN_PROXY_GID=4711")
			said := func() bool {
				_, text := p.get(p.health, "/readyz")
				return tt.says != "" && strings.Contains(text+p.out.String(), tt.says)
			}
			for end := time.Now().Add(patience); !said() && !p.ready() && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			}
			if !said() {
				code, text := p.add(fmt.Sprintf(`{"Netns":"/proc/1/fd/%d","PodName":"meshed-1","PodNamespace":"demo","PodUID":"u-2","IPs":[{"Address":"10.1.0.5/24"}]}`, pod.File().Fd()))
				if tt.says == "" && (code != 500 || !strings.Contains(text, "no proxy") || strings.Contains(p.out.String(), "CAP_")) {
					t.Errorf("with all: %d %q: %s", code, text, p.out)
				}
			}
			if tt.says != "" && !said() {
				t.Errorf("the agent does not say %q: %s", tt.says, p.out)
			}
		})
	}
}

// TestPodsAtStop has a pod of the mesh, and never a proxy.
func TestPodsAtStop(t *testing.T) {
	for name, uninstall := range map[string]bool{"replaced": false, "uninstalled": true} {
		t.Run(name, func(t *testing.T) {
			a := newAPI(t)
			a.meshed()
			dir := host(t)
			pod, other := netnstest.New(t, "pod"), netnstest.New(t, "node")
			netnstest.Veth(t, pod, "eth0", other, "pod0")
			pod.Addr("eth0", "10.1.0.5/24")
			pod.Up("eth0")
			other.Up("pod0")
			before := pod.Run("ip", "rule")

			p := start(t, dir, a)
			p.wait("readiness", p.ready)
			// The host's first process is the test, which has the namespace open.
			request := fmt.Sprintf(`{"Netns":"/proc/1/fd/%d","PodName":"meshed-1","PodNamespace":"demo","PodUID":"u-2","IPs":[{"Address":"10.1.0.5/24"}]}`, pod.File().Fd())
			if code, text := p.add(request); code != 500 || !strings.Contains(text, "no proxy") {
				t.Errorf("a pod that no proxy serves: %d %q", code, text)
			}
			if rules := pod.Run("ip", "rule"); rules == before || !strings.Contains(pod.Run("ip", "link"), "ztun0") {
				t.Fatalf("the pod is not captured: %s", rules)
			}
			if _, metrics := p.get(p.monitoring, "/metrics"); !strings.Contains(metrics, "ztun_agent_pods{phase=\"attached\"} 1\n") {
				t.Error("the pod is not in the metrics")
			}
			if uninstall {
				a.put(ownPath, nil)
			}
			p.stop()
			for _, name := range []string{"run/z.sock", "run/" + wire.SocketName, "run/" + owner.SocketName, "state"} {
				if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) == uninstall {
					t.Errorf("%s after the stop: %v", name, err)
				}
			}
			if left := strings.Contains(pod.Run("ip", "link"), "ztun0") || pod.Run("ip", "rule") != before; left == uninstall {
				t.Errorf("captured after the stop: %v; log: %s", left, p.out)
			}
		})
	}
}

// TestForbiddenFromTheStart must not be taken for an uninstallation.
func TestForbiddenFromTheStart(t *testing.T) {
	a := newAPI(t)
	a.fail(403)
	client, err := kubernetes.NewForConfig(&rest.Config{Host: a.URL})
	if err != nil {
		t.Fatal(err)
	}
	if v, err := judge(t.Context(), client, "istio-system", "na", false); v != replaced || err == nil {
		t.Errorf("judge = %v, %v", v, err)
	}
	if v, err := judge(t.Context(), client, "istio-system", "na", true); v != uninstalled || err != nil {
		t.Errorf("judge, once granted = %v, %v", v, err)
	}
	if proxiesGo(t.Context(), client, "istio-system", "na", false) {
		t.Error("proxies go, says who may not know")
	}
}

func TestProxiesGo(t *testing.T) {
	proxy := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "ztunnel-1", Namespace: "istio-system"}}
	going := *proxy.DeepCopy()
	going.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	for _, tt := range []struct {
		name    string
		pods    []corev1.Pod
		failing int
		want    bool
	}{
		{"none", nil, 0, true},
		{"one stays", []corev1.Pod{proxy}, 0, false},
		{"one goes", []corev1.Pod{going}, 0, true},
		{"one goes, the next is there", []corev1.Pod{going, proxy}, 0, false},
		{"rights are gone", []corev1.Pod{proxy}, 403, true},
		{"Kubernetes is away", nil, 500, false},
	} {
		a := newAPI(t)
		a.put("/api/v1/namespaces/istio-system/pods", &corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: tt.pods})
		a.fail(tt.failing)
		client, err := kubernetes.NewForConfig(&rest.Config{Host: a.URL})
		if err != nil {
			t.Fatal(err)
		}
		if got := proxiesGo(t.Context(), client, "istio-system", "na", true); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestCommandRefuses(t *testing.T) {
	for _, tt := range []struct {
		args, env []string
		want      string
	}{
		{nil, []string{"MONITORING_PORT=x", "LOG_LEVEL=loud"}, "ztun-agent: config: "},
		{[]string{"what"}, nil, "ztun-agent: unknown command"},
		{nil, []string{"NODE_NAME=na", "ZTUN_HOST_DIR=/nowhere", "ZTUN_HEALTH_PORT=" + freePort(t), "MONITORING_PORT=" + freePort(t)},
			"the host's /proc is not mounted at /nowhere/proc"},
	} {
		cmd := exec.Command("/proc/self/exe", tt.args...)
		cmd.Env = append([]string{childEnv + "=1"}, tt.env...)
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		var exit *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(errOut.String(), tt.want) || strings.Count(errOut.String(), "\n") != 1 {
			t.Errorf("%q %q = %v, %s, want one line that says %q", tt.args, tt.env, err, &errOut, tt.want)
		}
	}
}
