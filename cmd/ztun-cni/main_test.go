package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ztun/ztun/cmd/internal/cni"
	"github.com/ztun/ztun/cmd/internal/cni/wire"
)

// childEnv makes the test program be the plugin.
const childEnv = "ZTUN_CNI_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// An agent notes what it is asked and gives one answer to everything.
type agent struct {
	runDir string
	asked  chan cni.Request
	answer error
}

func (a *agent) Enrol(_ context.Context, r cni.Request) error {
	a.asked <- r
	return a.answer
}

// got is what the agent was asked last; the plugin has ended, so it is there.
func (a *agent) got(t *testing.T) cni.Request {
	t.Helper()
	select {
	case r := <-a.asked:
		return r
	default:
		t.Error("the agent was not asked")
		return cni.Request{}
	}
}

func newAgent(t *testing.T, answer error) *agent {
	t.Helper()
	a := &agent{runDir: t.TempDir(), asked: make(chan cni.Request, 16), answer: answer}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := cni.NewServer(filepath.Join(a.runDir, wire.SocketName), a, nil).Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	for {
		if c, err := net.Dial("unix", filepath.Join(a.runDir, wire.SocketName)); err == nil {
			_ = c.Close()
			return a
		}
	}
}

const (
	prevResult = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x","mac":"0a:00:00:00:00:01","future":[1]}],` +
		`"ips":[{"interface":0,"address":"10.1.0.5/24","gateway":"10.1.0.1"},{"address":"fd00::5/64"}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}`
	podOfDemo = "IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=a-1;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1"
)

// stdin is what a runtime passes to the plugin.
func stdin(t *testing.T, runDir, prevResult string) string {
	t.Helper()
	c := map[string]any{
		"name": "pods", "type": "ztun-cni", "cniVersion": "1.0.0", "cni_agent_run_dir": runDir,
		"pod_namespace": "istio-system", "exclude_namespaces": []string{"kube-system"},
	}
	if prevResult != "" {
		c["prevResult"] = json.RawMessage(prevResult)
	}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// plugin runs the program as a runtime does.
func plugin(t *testing.T, command, args, stdin string) (stdout string, fail *types.Error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{
		childEnv + "=1", "CNI_COMMAND=" + command, "CNI_CONTAINERID=c1", "CNI_NETNS=/var/run/netns/of-nobody", "CNI_IFNAME=eth0",
		"CNI_PATH=/opt/cni/bin", "CNI_ARGS=" + args,
	}
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if errOut.Len() > 0 {
		t.Errorf("on stderr: %s", &errOut)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		if err != nil {
			t.Fatal(err)
		}
		return out.String(), nil
	}
	fail = new(types.Error)
	if err := json.Unmarshal(out.Bytes(), fail); err != nil {
		t.Fatalf("failed with %v, and without an error in CNI's form: %s", exit, &out)
	}
	return "", fail
}

func TestAddAsksAndPassesTheResultOn(t *testing.T) {
	a := newAgent(t, nil)
	out, fail := plugin(t, "ADD", podOfDemo, stdin(t, a.runDir, prevResult))
	if fail != nil || out != prevResult {
		t.Errorf("ADD = %q, %v; want the result as it came, %q", out, fail, prevResult)
	}
	want := cni.Request{Netns: "/var/run/netns/of-nobody", PodName: "a-1", PodNamespace: "demo", PodUID: "u-1",
		IPs: []netip.Prefix{netip.MustParsePrefix("10.1.0.5/24"), netip.MustParsePrefix("fd00::5/64")}}
	if diff := cmp.Diff(want, a.got(t), cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
	// No result yet, and an older runtime without UID.
	out, fail = plugin(t, "ADD", "K8S_POD_NAMESPACE=demo;K8S_POD_NAME=a-1;FUTURE=1", stdin(t, a.runDir, ""))
	if fail != nil || out != `{"cniVersion":"1.0.0"}` {
		t.Errorf("ADD without prevResult = %q, %v", out, fail)
	}
	if got := a.got(t); len(got.IPs) != 0 || got.PodUID != "" {
		t.Errorf("asked %+v", got)
	}
	// Results of older versions have another form.
	const old = `{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.1.0.6/24"}],"dns":{}}`
	out, fail = plugin(t, "ADD", podOfDemo, strings.Replace(stdin(t, a.runDir, old), `"cniVersion":"1.0.0"`, `"cniVersion":"0.3.1"`, 1))
	if fail != nil || out != old {
		t.Errorf("ADD of 0.3.1 = %q, %v", out, fail)
	}
	if got := a.got(t); len(got.IPs) != 1 || got.IPs[0].String() != "10.1.0.6/24" {
		t.Errorf("asked %+v", got)
	}
}

// TestWhoDoesNotAsk has no agent at all.
func TestWhoDoesNotAsk(t *testing.T) {
	for args, asks := range map[string]bool{
		"K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=istio-cni-node-x7": false,
		"K8S_POD_NAMESPACE=demo;K8S_POD_NAME=istio-cni-node-x7":         true,
		"K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ztunnel-x7":        true,
		"K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=istio-cni-nodex":   true,
		"K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=coredns-1":          false,
		"K8S_POD_NAMESPACE=kube-system-2;K8S_POD_NAME=coredns-1":        true,
		"":                        false,
		"IgnoreUnknown=1;OTHER=1": false,
	} {
		out, fail := plugin(t, "ADD", args, stdin(t, t.TempDir(), prevResult))
		if asks && (fail == nil || fail.Code != types.ErrTryAgainLater) || !asks && (fail != nil || out != prevResult) {
			t.Errorf("%q: %q, %v; want to be asked: %v", args, out, fail, asks)
		}
	}
}

func TestAddFailsClosed(t *testing.T) {
	refusing := newAgent(t, errors.New("enrol: netns is gone\nreally"))
	// A socket that nobody serves any more.
	left := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(left, wire.SocketName), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	// One that is served by somebody who says nothing of use.
	hangingUp := t.TempDir()
	h, err := net.Listen("unix", filepath.Join(hangingUp, wire.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	go func() {
		for {
			c, err := h.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	for _, tt := range []struct {
		name, args, stdin string
		code              uint
		msg               string
	}{
		{"refused", podOfDemo, stdin(t, refusing.runDir, prevResult), types.ErrTryAgainLater, "pod demo/a-1: the node agent says 500: enrol: netns is gone really"},
		{"no agent yet", podOfDemo, stdin(t, t.TempDir(), prevResult), types.ErrTryAgainLater, "has to wait for the node agent (DaemonSet istio-cni-node): dial unix"},
		{"no agent any more", podOfDemo, stdin(t, left, prevResult), types.ErrTryAgainLater, "connection refused"},
		{"agent hangs up", podOfDemo, stdin(t, hangingUp, prevResult), types.ErrTryAgainLater, "has to wait for the node agent"},
		{"half a pod", "K8S_POD_NAME=a-1", stdin(t, refusing.runDir, prevResult), types.ErrInvalidEnvironmentVariables, "PodNamespace"},
		{"the other half", "K8S_POD_NAMESPACE=demo", stdin(t, refusing.runDir, prevResult), types.ErrInvalidEnvironmentVariables, "PodName"},
		{"name with a line feed", "K8S_POD_NAME=a\n1;K8S_POD_NAMESPACE=demo", stdin(t, refusing.runDir, prevResult), types.ErrInvalidEnvironmentVariables, "PodName"},
		{"malformed arguments", "K8S_POD_NAME", stdin(t, refusing.runDir, prevResult), types.ErrInvalidEnvironmentVariables, "CNI_ARGS"},
		{"empty stdin", podOfDemo, "", types.ErrDecodingFailure, "unexpected end"},
		{"malformed stdin", podOfDemo, "{]", types.ErrDecodingFailure, "invalid character"},
		{"stdin of another form", podOfDemo, `{"name":"pods","cniVersion":"1.0.0","pod_namespace":7}`, types.ErrDecodingFailure, "pod_namespace"},
		{"no network name", podOfDemo, `{"cniVersion":"1.0.0"}`, types.ErrInvalidNetworkConfig, "name"},
		{"malformed result", podOfDemo, stdin(t, refusing.runDir, `[]`), types.ErrDecodingFailure, "prevResult"},
		{"malformed address", podOfDemo, stdin(t, refusing.runDir, `{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.5"}]}`), types.ErrDecodingFailure, "prevResult"},
		{"unknown version", podOfDemo, strings.Replace(stdin(t, refusing.runDir, ""), "1.0.0", "9.0.0", 1), types.ErrIncompatibleCNIVersion, "incompatible"},
	} {
		out, fail := plugin(t, "ADD", tt.args, tt.stdin)
		if fail == nil || fail.Code != tt.code || !strings.Contains(fail.Msg, tt.msg) {
			t.Errorf("%s: %q, %+v; want code %d and %q", tt.name, out, fail, tt.code, tt.msg)
		}
	}
}

// TestOtherCommands has no agent: nothing but ADD needs one.
func TestOtherCommands(t *testing.T) {
	in := strings.Replace(stdin(t, t.TempDir(), prevResult), `"cniVersion":"1.0.0"`, `"cniVersion":"1.1.0"`, 1)
	for _, command := range []string{"DEL", "CHECK", "GC", "STATUS"} {
		if out, fail := plugin(t, command, podOfDemo, in); fail != nil || out != "" {
			t.Errorf("%s = %q, %v", command, out, fail)
		}
	}
	if out, fail := plugin(t, "VERSION", "", ""); fail != nil || !strings.Contains(out, `"1.1.0"`) {
		t.Errorf("VERSION = %q, %v", out, fail)
	}
}
