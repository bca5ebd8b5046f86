// Package enrol decides which of the node's pods are in the mesh, and drives
// the agent to make it so. It is the only package that watches Kubernetes.
//
// It decides as Istio's node agent does: pod and namespace labels, one list of
// selectors, excluded namespaces, hostNetwork and sidecar pods left alone; and
// it writes the same annotation, ambient.istio.io/redirection, that istiod and
// istioctl go by. One more opt-out is istio.io/ambient-skip: "true" on a pod,
// its namespace, or a Service that selects it. The label is the documented
// form, since labels can be selected with kubectl; an annotation counts as
// well, because the labels of a Service are often not its user's to set.
//
// New pods arrive through Enrol, which the CNI plugin calls and which returns
// only when the pod is captured and served. All else goes through one queue,
// level-triggered: a key is a pod's name, and what is done depends on what the
// pod, its namespace and its Services say now, never on what has changed.
//
// # Usage
//
// The agent must not serve proxies before it knows its pods:
//
//	c, err := enrol.New(enrol.Config{Client: client, Agent: a, Finder: finder, NodeName: node})
//	go c.Run(ctx)
//	<-c.Synced()
//	go a.Run(ctx)
//
// All methods may be called from any goroutine.
package enrol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/ztun/ztun/cmd/internal/agent"
	"github.com/ztun/ztun/cmd/internal/cni"
	"github.com/ztun/ztun/cmd/internal/enrol/marks"
	"github.com/ztun/ztun/cmd/internal/procs"
)

// Agent is what the controller drives; *agent.Agent is one.
type Agent interface {
	Set(p agent.Pod) error
	Delete(ctx context.Context, uid string) error
	Detach(ctx context.Context, p agent.Pod) error
	Forget(ctx context.Context, uid string) error
	Wait(ctx context.Context, uid string) error
	Phase(uid string) agent.Phase
	Await(ctx context.Context, uid string, from agent.Phase) agent.Phase
	Status() []agent.Status
}

// Finder finds the network namespaces of running pods; *procs.Finder is one.
type Finder interface {
	Find(ctx context.Context, targets []procs.Target) (map[string]*os.File, error)
	Verify(ctx context.Context, ns *os.File, t procs.Target) error
}

var (
	_ Agent        = (*agent.Agent)(nil)
	_ Finder       = (*procs.Finder)(nil)
	_ cni.Enroller = (*Controller)(nil)
)

// Config is what a Controller needs. The zero value of a field is the default
// named on it.
type Config struct {
	// Client, Agent, Finder and NodeName are required.
	Client   kubernetes.Interface
	Agent    Agent
	Finder   Finder
	NodeName string
	// SystemNamespace is where the pods labelled app=ztunnel are proxies of the
	// mesh. Default istio-system.
	SystemNamespace string
	// Selectors say which pods are in the mesh: those that match any. Nil:
	// marks.DefaultSelectors.
	Selectors []marks.Selector
	// ExcludeNamespaces have no pod in the mesh, whatever labels say.
	ExcludeNamespaces []string
	// DNSCapture holds for pods whose annotation says nothing else.
	DNSCapture bool
	// HostRoot is put before the paths that the plugin names, which are the
	// host's: "/host" in a container. Default "".
	HostRoot string
	// NetnsDir is where the container runtime mounts namespaces, as this
	// process sees it. A pod that was found running is then known by its
	// mount, which stays the pod's, and not by a descriptor that a restart
	// loses. Default: the descriptor it is.
	NetnsDir string
	// HostNetnsDir is the path that NetnsDir has on the host. Default
	// /var/run/netns.
	HostNetnsDir string
	// PluginTimeout bounds Enrol. Default 4.5 s: the plugin gives up after 5.
	PluginTimeout time.Duration
	// ServedTimeout is how long a pod of the queue may take until it is marked
	// pending. Default 2 s.
	ServedTimeout time.Duration
	// RemoveTimeout bounds one try to take a pod out of the mesh. Default 10 s.
	RemoveTimeout time.Duration
	// Log takes what the controller has to say. Nil: nothing is logged.
	Log *slog.Logger
}

func (cfg *Config) complete() error {
	var errs []error
	if cfg.Client == nil || cfg.Agent == nil || cfg.Finder == nil {
		errs = append(errs, errors.New("enrol: config: Client, Agent and Finder are required"))
	}
	if cfg.NodeName == "" {
		errs = append(errs, errors.New("enrol: config: NodeName is required"))
	}
	if cfg.SystemNamespace == "" {
		cfg.SystemNamespace = "istio-system"
	}
	if cfg.Selectors == nil {
		cfg.Selectors = marks.DefaultSelectors()
	}
	if cfg.HostNetnsDir == "" {
		cfg.HostNetnsDir = "/var/run/netns"
	}
	orDefault(&cfg.PluginTimeout, 4500*time.Millisecond)
	orDefault(&cfg.ServedTimeout, 2*time.Second)
	orDefault(&cfg.RemoveTimeout, 10*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

func orDefault(d *time.Duration, v time.Duration) {
	if *d <= 0 {
		*d = v
	}
}

// workers is how many pods are worked on at once. Most of the work is waiting
// for the agent, which bounds what runs in namespaces itself.
const workers = 8

// A Controller keeps the agent's pods those that belong in the mesh.
type Controller struct {
	// Set by New, read-only after.
	cfg        Config
	log        *slog.Logger
	informers  []cache.SharedIndexInformer
	full       []cache.InformerSynced // Whether they have what there is.
	pods       corelisters.PodLister
	namespaces corelisters.NamespaceLister
	services   cache.Indexer
	queue      workqueue.TypedRateLimitingInterface[types.NamespacedName]
	locator    locator
	synced     chan struct{} // Closed once the agent knows its pods.
	events     struct{ add, update, remove atomic.Uint64 }
	busy       atomic.Int32 // Keys that are worked on.

	known    table
	followed followers

	// mu guards the fields below.
	mu   sync.Mutex
	ran  bool
	seen chan struct{} // Closed and replaced when an informer has something new.
}

// New makes a controller. Run starts it.
func New(cfg Config) (*Controller, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	c := &Controller{
		cfg: cfg, log: cfg.Log,
		queue: workqueue.NewTypedRateLimitingQueueWithConfig(
			// As Istio's: "ambient" is also the queue's name in its metrics.
			workqueue.NewTypedMaxOfRateLimiter(
				workqueue.NewTypedItemExponentialFailureRateLimiter[types.NamespacedName](5*time.Millisecond, 5*time.Second),
				&workqueue.TypedBucketRateLimiter[types.NamespacedName]{Limiter: rate.NewLimiter(10, 100)},
			),
			workqueue.TypedRateLimitingQueueConfig[types.NamespacedName]{Name: "ambient"},
		),
		locator: locator{finder: cfg.Finder, dir: cfg.NetnsDir},
		synced:  make(chan struct{}),
		known:   table{agent: cfg.Agent, pods: map[string]*known{}},
		seen:    make(chan struct{}),

		followed: followers{late: map[string]bool{}},
	}
	if err := c.watch(); err != nil {
		c.queue.ShutDown()
		return nil, err
	}
	return c, nil
}

// Run works until ctx ends. Pods stay as they are: captured. A Controller runs
// once. Close comes after it.
func (c *Controller) Run(ctx context.Context) error {
	c.mu.Lock()
	again := c.ran
	c.ran = true
	c.mu.Unlock()
	if again {
		return errors.New("enrol: runs already")
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		cancel()
		c.queue.ShutDown()
		wg.Wait()
		c.followed.wg.Wait()
		c.locator.clear()
	}()
	for _, informer := range c.informers {
		wg.Go(func() { informer.RunWithContext(c.withLogger(ctx)) })
	}
	if !cache.WaitForCacheSync(ctx.Done(), c.full...) {
		return context.Cause(ctx)
	}
	if err := c.snapshot(ctx); err != nil {
		// What is missing comes through the queue.
		c.log.Warn("not every pod of an earlier agent is known again", "error", err)
	}
	close(c.synced)
	c.enqueueAll()
	for range workers {
		wg.Go(func() { c.work(ctx) })
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// Close lets go of the pods' namespaces. Nothing else is called after it.
func (c *Controller) Close() { c.known.close() }

// Synced is closed once the agent knows its pods and may serve proxies.
func (c *Controller) Synced() <-chan struct{} { return c.synced }

// Events counts what the pod informer has told, by type: add, update and
// delete.
func (c *Controller) Events() map[string]uint64 {
	return map[string]uint64{"add": c.events.add.Load(), "update": c.events.update.Load(), "delete": c.events.remove.Load()}
}

// work takes keys until the queue shuts down.
func (c *Controller) work(ctx context.Context) {
	for {
		key, shutDown := c.queue.Get()
		if shutDown {
			return
		}
		c.busy.Add(1)
		c.handle(ctx, key)
		if c.busy.Add(-1) == 0 && c.queue.Len() == 0 {
			c.locator.clear() // Nobody is left to ask for what was found.
		}
	}
}

func (c *Controller) handle(ctx context.Context, key types.NamespacedName) {
	defer c.queue.Done(key)
	err := c.reconcile(ctx, key)
	var refused *refusedError
	switch {
	case err == nil:
		c.queue.Forget(key)
	case ctx.Err() != nil:
	case errors.As(err, &refused):
		c.log.Error("pod cannot be in the mesh", "pod", key.String(), "error", err)
		c.queue.Forget(key)
	default:
		level := slog.LevelWarn
		if c.queue.NumRequeues(key) > 0 {
			level = slog.LevelDebug // Said once.
		}
		c.log.Log(ctx, level, "pod is not where it is wanted; trying on", "pod", key.String(), "error", err)
		c.queue.AddRateLimited(key)
	}
}

// A refusedError is one that trying again does not help against.
type refusedError struct{ err error }

func (e *refusedError) Error() string { return fmt.Sprintf("enrol: refused: %v", e.err) }
func (e *refusedError) Unwrap() error { return e.err }
