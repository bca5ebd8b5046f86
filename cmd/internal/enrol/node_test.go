package enrol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/enrol/marks"
	"github.com/ztun/ztun/cmd/internal/procs"
)

// A node is a controller with an API server, an agent and processes in memory,
// in a bubble of testing/synctest: time passes only while nothing happens.
type node struct {
	*testing.T
	client *fake.Clientset
	agent  *memAgent
	procs  *memProcs
	c      *Controller
	cfg    Config
	end    func() // Ends Run.
	stop   func()
	// onSynced runs once the agent may serve proxies. May be nil.
	onSynced func()
}

// inNode runs a test in a bubble, with a node that is not started.
func inNode(t *testing.T, test func(n *node), objects ...runtime.Object) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		n := &node{
			T: t, client: fake.NewClientset(objects...), stop: func() {},
			agent: newMemAgent(),
			procs: &memProcs{dir: dir, pods: map[string]memPod{}},
		}
		n.cfg = Config{
			Client: n.client, Agent: n.agent, Finder: n.procs, NodeName: "n1", NetnsDir: dir, HostRoot: "/host",
			Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		}
		defer func() {
			n.stop()
			n.procs.wantClosed(t)
		}()
		test(n)
	})
}

// start begins a controller's life, and returns when it has come to rest.
func (n *node) start() {
	n.Helper()
	c, err := New(n.cfg)
	if err != nil {
		n.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	n.c = c
	n.end = func() { cancel(); <-done }
	n.stop = func() { n.end(); c.Close(); n.stop = func() {} }
	if n.onSynced != nil {
		<-c.Synced()
		n.onSynced()
	}
	n.pass(time.Second)
}

// pass lets time pass, and then everything come to rest.
func (n *node) pass(d time.Duration) {
	time.Sleep(d) // The bubble's time.
	synctest.Wait()
}

// retried is enough time for several retries.
const retried = 30 * time.Second

func (n *node) namespace(name string, labels ...string) {
	n.Helper()
	ns := namespace(name, labels...)
	ctx := n.Context()
	_, err := n.client.CoreV1().Namespaces().Update(ctx, ns, metav1.UpdateOptions{})
	if err != nil {
		_, err = n.client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{})
	}
	if err != nil {
		n.Fatal(err)
	}
	synctest.Wait()
}

// apply makes a pod, or changes it; its annotations stay.
func (n *node) apply(p *corev1.Pod) {
	n.Helper()
	ctx := n.Context()
	if old, err := n.client.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{}); err == nil {
		if mark, ok := old.Annotations[redirection]; ok && old.UID == p.UID {
			p = p.DeepCopy()
			metav1.SetMetaDataAnnotation(&p.ObjectMeta, redirection, mark)
		}
		if _, err := n.client.CoreV1().Pods(p.Namespace).Update(ctx, p, metav1.UpdateOptions{}); err != nil {
			n.Fatal(err)
		}
	} else if _, err := n.client.CoreV1().Pods(p.Namespace).Create(ctx, p, metav1.CreateOptions{}); err != nil {
		n.Fatal(err)
	}
	synctest.Wait()
}

func (n *node) deletePod(name string) {
	n.Helper()
	if err := n.client.CoreV1().Pods("demo").Delete(n.Context(), name, metav1.DeleteOptions{}); err != nil {
		n.Fatal(err)
	}
	synctest.Wait()
}

func (n *node) service(s *corev1.Service) {
	n.Helper()
	_, err := n.client.CoreV1().Services(s.Namespace).Update(n.Context(), s, metav1.UpdateOptions{})
	if err != nil {
		_, err = n.client.CoreV1().Services(s.Namespace).Create(n.Context(), s, metav1.CreateOptions{})
	}
	if err != nil {
		n.Fatal(err)
	}
	synctest.Wait()
}

// mark is the annotation that the API server has; "-" for none.
func (n *node) mark(name string) string {
	n.Helper()
	p, err := n.client.CoreV1().Pods("demo").Get(n.Context(), name, metav1.GetOptions{})
	if err != nil {
		n.Fatal(err)
	}
	if v, ok := p.Annotations[redirection]; ok {
		return v
	}
	return "-"
}

func (n *node) wantMark(name, want string) {
	n.Helper()
	if got := n.mark(name); got != want {
		n.Errorf("pod %s is annotated %q, want %q", name, got, want)
	}
}

func (n *node) wantKnown(uids ...string) {
	n.Helper()
	if got := n.agent.uids(); !slices.Equal(got, uids) {
		n.Errorf("the agent has %q, want %q", got, uids)
	}
}

func (n *node) wantCalls(calls ...string) {
	n.Helper()
	if got := n.agent.take(); !slices.Equal(got, calls) {
		n.Errorf("calls of the agent: %q, want %q", got, calls)
	}
}

// patches are the bodies of the patches so far.
func (n *node) patches() (out []string) {
	for _, a := range n.client.Actions() {
		if p, ok := a.(clienttesting.PatchAction); ok {
			if p.GetPatchType() != types.MergePatchType || a.GetSubresource() != "status" || a.GetResource().Resource != "pods" {
				n.Errorf("a patch of type %s of %s/%s", p.GetPatchType(), a.GetResource().Resource, a.GetSubresource())
			}
			out = append(out, string(p.GetPatch()))
		}
	}
	return out
}

// fail makes the API server refuse requests like these, as often as said.
func (n *node) fail(verb, resource string, times int) {
	n.client.PrependReactor(verb, resource, func(clienttesting.Action) (bool, runtime.Object, error) {
		times--
		return times >= 0, nil, errors.New("the API server is not itself")
	})
}

// watches are the first watches of one resource: they hear nothing, and end
// when they break, because too much was missed. Those that follow are the API
// server's own.
type watches struct {
	deaf []*watch.FakeWatcher
}

func watchThatBreaks(n *node, resource string) *watches {
	w := &watches{}
	broken := false
	n.client.PrependWatchReactor(resource, func(clienttesting.Action) (bool, watch.Interface, error) {
		if broken {
			return false, nil, nil
		}
		broken = true
		f := watch.NewFake()
		w.deaf = append(w.deaf, f)
		return true, f, nil
	})
	return w
}

func (w *watches) breaks() {
	for _, f := range w.deaf {
		f.Error(&apierrors.NewResourceExpired("too old").ErrStatus)
		f.Stop()
	}
}

// pairs makes a map of key, value, key, value.
func pairs(list []string) map[string]string {
	m := map[string]string{}
	for pair := range slices.Chunk(list, 2) {
		m[pair[0]] = pair[1]
	}
	return m
}

func namespace(name string, labels ...string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: pairs(labels)}}
}

// pod is one of namespace demo with that UID and those addresses.
func pod(name, uid string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "demo", UID: types.UID(uid), Labels: map[string]string{}, Annotations: map[string]string{}},
		Spec:       corev1.PodSpec{NodeName: "n1", ServiceAccountName: "sa"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		p.Status.PodIP = p.Status.PodIPs[0].IP
	}
	return p
}

func annotated(p *corev1.Pod, annotations ...string) *corev1.Pod {
	maps.Copy(p.Annotations, pairs(annotations))
	return p
}

func labelled(p *corev1.Pod, labels ...string) *corev1.Pod {
	maps.Copy(p.Labels, pairs(labels))
	return p
}

func phase(p *corev1.Pod, phase corev1.PodPhase) *corev1.Pod {
	p.Status.Phase = phase
	return p
}

func addrs(texts ...string) []netip.Addr {
	out := make([]netip.Addr, 0, len(texts))
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

var ambient = []string{marks.ModeLabel, "ambient"}

// memAgent is an agent whose pods are attached at once, and served while there
// is a proxy.
type memAgent struct {
	mu    sync.Mutex
	pods  map[string]*agent.Status
	proxy bool
	stuck bool // Pods cannot be attached.
	// unmounted makes the paths of namespaces ones that are not mounted any more.
	unmounted  bool
	detachedAt string // The namespace that Detach was last given.
	calls      []string
	changed    chan struct{}
	// What goes wrong next, once each time.
	refuse, failDelete, failForget int
}

func newMemAgent() *memAgent {
	return &memAgent{pods: map[string]*agent.Status{}, proxy: true, changed: make(chan struct{})}
}

func (a *memAgent) note(format string, args ...any) {
	a.calls = append(a.calls, fmt.Sprintf(format, args...))
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *memAgent) Set(p agent.Pod) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.note("set %s", p.UID)
	if a.refuse > 0 {
		a.refuse--
		return errors.New("no such pod can be")
	}
	a.pods[p.UID] = &agent.Status{Pod: p, Phase: agent.Attaching}
	return nil
}

func (a *memAgent) Delete(_ context.Context, uid string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.note("delete %s", uid)
	if p := a.pods[uid]; p != nil && (p.Pod.Netns == agent.NotFound || a.unmounted) {
		return fmt.Errorf("%s: %w", p.Pod.Netns, agent.ErrNotFound)
	}
	if a.failDelete > 0 {
		a.failDelete--
		return errors.New("sockets are left")
	}
	delete(a.pods, uid)
	return nil
}

// Detach opens the namespace, as the agent does.
func (a *memAgent) Detach(_ context.Context, p agent.Pod) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.note("detach %s", p.UID)
	at, err := os.Readlink(p.Netns)
	if err != nil {
		return err
	}
	a.detachedAt = at
	if a.failDelete > 0 {
		a.failDelete--
		return errors.New("sockets are left")
	}
	delete(a.pods, p.UID)
	return nil
}

func (a *memAgent) Forget(_ context.Context, uid string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.note("forget %s", uid)
	if a.failForget > 0 {
		a.failForget--
		return errors.New("a proxy does not answer")
	}
	delete(a.pods, uid)
	return nil
}

func (a *memAgent) Wait(ctx context.Context, uid string) error {
	for {
		a.mu.Lock()
		s, changed := a.statusLocked(uid), a.changed
		a.mu.Unlock()
		if s.Phase == agent.Served {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("pod %s is %q: %w", uid, s.Phase, context.Cause(ctx))
		}
	}
}

func (a *memAgent) Phase(uid string) agent.Phase {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.statusLocked(uid).Phase
}

func (a *memAgent) Await(ctx context.Context, uid string, from agent.Phase) agent.Phase {
	for {
		a.mu.Lock()
		s, changed := a.statusLocked(uid), a.changed
		a.mu.Unlock()
		if s.Phase != from {
			return s.Phase
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return from
		}
	}
}

func (a *memAgent) statusLocked(uid string) agent.Status {
	s := a.pods[uid]
	if s == nil {
		return agent.Status{}
	}
	out := *s
	switch {
	case a.stuck || s.Pod.Netns == agent.NotFound:
		out.Phase = agent.Attaching
	case a.proxy:
		out.Phase = agent.Served
	default:
		out.Phase = agent.Attached
	}
	return out
}

func (a *memAgent) Status() []agent.Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []agent.Status
	for _, uid := range slices.Sorted(maps.Keys(a.pods)) {
		out = append(out, a.statusLocked(uid))
	}
	return out
}

// connect says whether there is a proxy.
func (a *memAgent) connect(proxy bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.proxy = proxy
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *memAgent) pod(uid string) agent.Pod {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.pods[uid]; s != nil {
		return s.Pod
	}
	return agent.Pod{}
}

func (a *memAgent) uids() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Sorted(maps.Keys(a.pods))
}

// take returns the calls since it was last asked.
func (a *memAgent) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	calls := a.calls
	a.calls = nil
	return calls
}

// memProcs are the processes of a node: files stand for namespaces.
type memProcs struct {
	dir string

	mu     sync.Mutex
	pods   map[string]memPod // By the UID that their cgroup names.
	scans  int
	checks int
	wrong  int   // Checks that fail from now on.
	err    error // Of Find.
	given  []*os.File
}

type memPod struct {
	netns string
	addrs []netip.Addr
}

// run starts a pod's processes in a namespace mounted under that name, or in
// none of NetnsDir if the name has a slash.
func (m *memProcs) run(t *testing.T, uid, netns string, ips ...string) string {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	path := filepath.Join(m.dir, netns)
	if strings.Contains(netns, "/") {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.pods[uid] = memPod{path, addrs(ips...)}
	return path
}

func (m *memProcs) Find(_ context.Context, targets []procs.Target) (map[string]*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.scans++
	if m.err != nil {
		return nil, m.err
	}
	out := map[string]*os.File{}
	for _, t := range targets {
		p, ok := m.pods[t.UID]
		if !ok || !p.holds(t.Addresses) {
			continue
		}
		f, err := os.Open(p.netns)
		if err != nil {
			return nil, err
		}
		m.given = append(m.given, f)
		out[t.UID] = f
	}
	return out, nil
}

func (p memPod) holds(want []netip.Addr) bool {
	return slices.ContainsFunc(want, func(a netip.Addr) bool { return slices.Contains(p.addrs, a) })
}

func (m *memProcs) Verify(_ context.Context, ns *os.File, t procs.Target) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.checks++
	p := m.pods[t.UID]
	if have, err := os.Stat(p.netns); m.wrong > 0 || err != nil || !p.holds(t.Addresses) || !sameFile(ns, have) {
		m.wrong = max(0, m.wrong-1)
		return fmt.Errorf("%s is not the namespace of pod %s", ns.Name(), t.UID)
	}
	return nil
}

func sameFile(f *os.File, info os.FileInfo) bool {
	have, err := f.Stat()
	return err == nil && os.SameFile(have, info)
}

// wantClosed checks that no namespace is kept from going.
func (m *memProcs) wantClosed(t *testing.T) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.given {
		if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("namespace %s is left open", f.Name())
		}
	}
}
