package enrol

import (
	"context"
	"fmt"
	"slices"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	coreinformers "k8s.io/client-go/informers/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// skipIndex finds the Services that opt out, by namespace.
const skipIndex = "skip"

// watch makes the informers. Nothing runs yet.
func (c *Controller) watch() error {
	byNamespace := cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}
	pods := coreinformers.NewFilteredPodInformer(c.cfg.Client, metav1.NamespaceAll, 0, byNamespace, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", c.cfg.NodeName).String()
	})
	namespaces := coreinformers.NewNamespaceInformer(c.cfg.Client, 0, cache.Indexers{})
	services := coreinformers.NewServiceInformer(c.cfg.Client, metav1.NamespaceAll, 0, cache.Indexers{skipIndex: func(o any) ([]string, error) {
		if s, ok := o.(*corev1.Service); ok && skips(&s.ObjectMeta) {
			return []string{s.Namespace}, nil
		}
		return nil, nil
	}})
	c.informers = []cache.SharedIndexInformer{pods, namespaces, services}
	c.pods = corelisters.NewPodLister(pods.GetIndexer())
	c.namespaces = corelisters.NewNamespaceLister(namespaces.GetIndexer())
	c.services = services.GetIndexer()

	for informer, trim := range map[cache.SharedIndexInformer]cache.TransformFunc{pods: trimPod, namespaces: trimNamespace, services: trimService} {
		if err := informer.SetTransform(trim); err != nil {
			return fmt.Errorf("enrol: informer: %w", err)
		}
	}
	for informer, handler := range map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		pods:       cache.ResourceEventHandlerFuncs{AddFunc: c.podAdded, UpdateFunc: c.podUpdated, DeleteFunc: c.podDeleted},
		namespaces: cache.ResourceEventHandlerFuncs{AddFunc: c.namespaceAdded, UpdateFunc: c.namespaceUpdated},
		services:   cache.ResourceEventHandlerFuncs{AddFunc: c.serviceChanged, UpdateFunc: c.serviceUpdated, DeleteFunc: c.serviceChanged},
	} {
		registered, err := informer.AddEventHandler(handler)
		if err != nil {
			return fmt.Errorf("enrol: informer: %w", err)
		}
		// Not only are the caches full then: what is in them is in the queue.
		c.full = append(c.full, registered.HasSynced)
	}
	return nil
}

// withLogger makes what client-go has to say part of our log.
func (c *Controller) withLogger(ctx context.Context) context.Context {
	return klog.NewContext(ctx, logr.FromSlogHandler(c.log.Handler()))
}

// The caches hold what decisions need: a node with few pods still sees every
// Service and namespace of the cluster.

func trimPod(o any) (any, error) {
	if p, ok := o.(*corev1.Pod); ok {
		p.ManagedFields = nil
	}
	return o, nil
}

func trimNamespace(o any) (any, error) {
	if ns, ok := o.(*corev1.Namespace); ok {
		ns.ManagedFields = nil
	}
	return o, nil
}

func trimService(o any) (any, error) {
	s, ok := o.(*corev1.Service)
	if !ok {
		return o, nil
	}
	small := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: s.Name, Namespace: s.Namespace, UID: s.UID, ResourceVersion: s.ResourceVersion}}
	if skips(&s.ObjectMeta) {
		small.Labels = map[string]string{skipMark: "true"}
		small.Spec = corev1.ServiceSpec{Type: s.Spec.Type, Selector: s.Spec.Selector}
	}
	return small, nil
}

// A pod without an address waits for its next update: so a new one is the
// plugin's, and one that was there before this agent is taken.
func (c *Controller) podAdded(o any) {
	c.events.add.Add(1)
	c.enqueue(o)
}

func (c *Controller) podUpdated(_, o any) {
	c.events.update.Add(1)
	c.enqueue(o)
}

func (c *Controller) podDeleted(o any) {
	c.events.remove.Add(1)
	c.enqueue(o)
}

func (c *Controller) namespaceAdded(o any) {
	if ns, ok := o.(*corev1.Namespace); ok {
		c.enqueuePods(ns.Name, nil)
	}
	c.announce()
}

func (c *Controller) namespaceUpdated(before, after any) {
	x, ok1 := before.(*corev1.Namespace)
	y, ok2 := after.(*corev1.Namespace)
	if ok1 && ok2 && !slices.Equal(c.namespaceMatch(x), c.namespaceMatch(y)) {
		c.enqueuePods(y.Name, nil)
	}
	c.announce()
}

func (c *Controller) serviceUpdated(before, after any) {
	c.serviceChanged(before)
	c.serviceChanged(after)
}

// serviceChanged looks again at the pods that a Service opts out, or did.
func (c *Controller) serviceChanged(o any) {
	if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = gone.Obj
	}
	if s, ok := o.(*corev1.Service); ok && skips(&s.ObjectMeta) {
		c.enqueuePods(s.Namespace, s)
	}
}

// enqueue takes a pod, or what is left of one.
func (c *Controller) enqueue(o any) {
	name, err := cache.DeletionHandlingObjectToName(o)
	if err != nil {
		c.log.Error("event about an object without a name", "error", err)
		return
	}
	c.queue.Add(name.AsNamespacedName())
	c.announce()
}

// enqueuePods takes the node's pods of a namespace, or those of them behind s.
func (c *Controller) enqueuePods(namespace string, s *corev1.Service) {
	pods, err := c.pods.Pods(namespace).List(labels.Everything())
	if err != nil {
		c.log.Error("listing pods", "namespace", namespace, "error", err)
		return
	}
	for _, p := range pods {
		if s == nil || selects(s, p) {
			c.queue.Add(nameOf(p))
		}
	}
}

// enqueueAll takes every pod that is there or that the agent knows.
func (c *Controller) enqueueAll() {
	pods, err := c.pods.List(labels.Everything())
	if err != nil {
		c.log.Error("listing pods", "error", err)
	}
	for _, p := range pods {
		c.queue.Add(nameOf(p))
	}
	for _, name := range c.known.names() {
		c.queue.Add(name)
	}
}

func nameOf(pod *corev1.Pod) types.NamespacedName {
	return types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}
}

// announce wakes those who wait for something to be seen.
func (c *Controller) announce() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.seen)
	c.seen = make(chan struct{})
}

// next is closed at the next announcement.
func (c *Controller) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen
}
