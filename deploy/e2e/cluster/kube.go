package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
)

// Client talks to the cluster as its administrator.
type Client struct {
	kubernetes.Interface
	config  *rest.Config
	dynamic dynamic.Interface
	mapper  *restmapper.DeferredDiscoveryRESTMapper
}

func newClient() (*Client, error) {
	config := &rest.Config{
		Host:            "https://" + hostAddress + ":6443",
		BearerToken:     token("admin"),
		TLSClientConfig: rest.TLSClientConfig{Insecure: true}, // one machine, one private network
		QPS:             -1,
	}
	k, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("e2e: client: %w", err)
	}
	d, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("e2e: client: %w", err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(k.Discovery()))
	return &Client{Interface: k, config: config, dynamic: d, mapper: mapper}, nil
}

// objects splits YAML into objects; empty documents are skipped.
func objects(text string) ([]*unstructured.Unstructured, error) {
	d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	var out []*unstructured.Unstructured
	for {
		var o unstructured.Unstructured
		err := d.Decode(&o.Object)
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("e2e: YAML: %w", err)
		}
		if len(o.Object) > 0 {
			out = append(out, &o)
		}
	}
}

func (c *Client) resource(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	kind := o.GroupVersionKind()
	m, err := c.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if meta.IsNoMatchError(err) {
		c.mapper.Reset()
		m, err = c.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	}
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() == meta.RESTScopeNameRoot {
		return c.dynamic.Resource(m.Resource), nil
	}
	namespace := o.GetNamespace()
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	return c.dynamic.Resource(m.Resource).Namespace(namespace), nil
}

// Apply makes the cluster's objects what the YAML says, in its order.
func (c *Client) Apply(ctx context.Context, text string) error {
	list, err := objects(text)
	if err != nil {
		return err
	}
	for _, o := range list {
		if err := poll(ctx, "apply "+describe(o), func(ctx context.Context) error {
			r, err := c.resource(o)
			if err != nil {
				return err // its definition may be seconds old
			}
			_, err = r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "e2e", Force: true})
			if apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
				return &hopeless{err}
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// Delete removes the YAML's objects, last first, and waits until none is left.
func (c *Client) Delete(ctx context.Context, text string) error {
	list, err := objects(text)
	if err != nil {
		return err
	}
	var errs []error
	for i := len(list) - 1; i >= 0; i-- {
		o := list[i]
		r, err := c.resource(o)
		if err == nil {
			errs = append(errs, c.gone(ctx, r, o))
		}
	}
	return errors.Join(errs...)
}

func (c *Client) gone(ctx context.Context, r dynamic.ResourceInterface, o *unstructured.Unstructured) error {
	foreground := metav1.DeletePropagationForeground
	err := r.Delete(ctx, o.GetName(), metav1.DeleteOptions{PropagationPolicy: &foreground})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("e2e: delete %s: %w", describe(o), err)
	}
	return poll(ctx, "the end of "+describe(o), func(ctx context.Context) error {
		_, err := r.Get(ctx, o.GetName(), metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("still there: %v", err)
	})
}

func describe(o *unstructured.Unstructured) string {
	return strings.TrimPrefix(fmt.Sprintf("%s %s/%s", o.GetKind(), o.GetNamespace(), o.GetName()), " ")
}

// Exec runs a command in the first container of a pod and returns what it printed.
func (c *Client) Exec(ctx context.Context, namespace, pod string, command ...string) (string, error) {
	var out, errs bytes.Buffer
	err := c.ExecTo(ctx, &out, &errs, namespace, pod, command...)
	if err != nil {
		return out.String(), fmt.Errorf("e2e: exec %v in %s/%s: %w: %s", command, namespace, pod, err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

// ExecTo is Exec for output that is read while the command runs.
func (c *Client) ExecTo(ctx context.Context, stdout, stderr io.Writer, namespace, pod string, command ...string) error {
	request := c.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	e, err := remotecommand.NewSPDYExecutor(c.config, http.MethodPost, request.URL())
	if err != nil {
		return err
	}
	return e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: stdout, Stderr: stderr})
}

// Logs returns what a pod's container wrote so far; container may be empty where there is one.
func (c *Client) Logs(ctx context.Context, namespace, pod, container string) (string, error) {
	text, err := c.CoreV1().Pods(namespace).GetLogs(pod, &corev1.PodLogOptions{Container: container}).DoRaw(ctx)
	if err != nil {
		return "", fmt.Errorf("e2e: logs of %s/%s: %w", namespace, pod, err)
	}
	return string(text), nil
}

// Forward opens a local port to a pod's port until ctx ends, and returns its address.
func (c *Client) Forward(ctx context.Context, namespace, pod string, port int) (string, error) {
	url := c.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("portforward").URL()
	round, upgrader, err := spdy.RoundTripperFor(c.config)
	if err != nil {
		return "", err
	}
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: round}, http.MethodPost, url)
	ready := make(chan struct{})
	f, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, ctx.Done(), ready, io.Discard, io.Discard)
	if err != nil {
		return "", err
	}
	ended := make(chan error, 1)
	go func() { ended <- f.ForwardPorts() }()
	select {
	case err := <-ended:
		return "", fmt.Errorf("e2e: forward to %s/%s: %w", namespace, pod, err)
	case <-ready:
	}
	ports, err := f.GetPorts()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0].Local), nil
}

// Ready waits until every named pod is ready.
func (c *Client) Ready(ctx context.Context, namespace string, pods ...string) error {
	for _, name := range pods {
		if err := poll(ctx, "pod "+namespace+"/"+name+" to be ready", func(ctx context.Context) error {
			p, err := c.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			return readiness(p)
		}); err != nil {
			return err
		}
	}
	return nil
}

// readiness is nil for a ready pod, else what it waits for.
func readiness(p *corev1.Pod) error {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	var why []string
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if w := s.State.Waiting; w != nil {
			why = append(why, s.Name+": "+w.Reason+" "+w.Message)
		}
	}
	return fmt.Errorf("%s is %s on %q %s", p.Name, p.Status.Phase, p.Spec.NodeName, strings.Join(why, "; "))
}

// Rolled waits until a DaemonSet's pods are the newest, one ready on every node.
func (c *Client) Rolled(ctx context.Context, namespace, name string) error {
	return poll(ctx, "DaemonSet "+namespace+"/"+name, func(ctx context.Context) error {
		d, err := c.AppsV1().DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		s := d.Status
		if s.ObservedGeneration < d.Generation || s.DesiredNumberScheduled == 0 ||
			s.UpdatedNumberScheduled != s.DesiredNumberScheduled || s.NumberReady != s.DesiredNumberScheduled {
			return fmt.Errorf("%d pods wanted, %d new, %d ready", s.DesiredNumberScheduled, s.UpdatedNumberScheduled, s.NumberReady)
		}
		return nil
	})
}

// PodsOf returns the pods with a label, such as app=ztunnel, by the name of their node. Pods that are ending are left out.
func (c *Client) PodsOf(ctx context.Context, namespace, selector string) (map[string]*corev1.Pod, error) {
	l, err := c.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, fmt.Errorf("e2e: pods %s: %w", selector, err)
	}
	out := map[string]*corev1.Pod{}
	for i := range l.Items {
		if p := &l.Items[i]; p.DeletionTimestamp == nil {
			out[p.Spec.NodeName] = p
		}
	}
	return out, nil
}
