package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestServices(t *testing.T) {
	ctx := claim(t, "headless, externalName, external IP, NodePort and hostPort reach a pod of the mesh")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"},
		pod{name: "server", node: "node2", spec: "hostname: named, subdomain: headless", container: "ports: [{containerPort: 8080, hostPort: 18088}]"})
	p.enrolled("client", "server")
	p.apply(servicesYAML, p.name)
	for _, url := range []string{
		"http://headless:8080/", "http://named.headless:8080/", "http://alias/", "http://192.0.2.77/", "http://10.96.77.77/",
	} {
		p.until(url, works, "client", "get", "-timeout=2s", url)
	}
	// From outside of the cluster, through both nodes: kube-proxy carries it on to the other one.
	for _, n := range world.Nodes {
		url := fmt.Sprintf("http://%v:30080/", n.Address)
		p.wait("NodePort of "+n.Name, func() error { _, err := cluster.Fetch(ctx, url); return err })
	}
	p.wait("hostPort", func() error {
		_, err := cluster.Fetch(ctx, fmt.Sprintf("http://%v:18088/", world.Nodes[1].Address))
		return err
	})
}

const servicesYAML = `{apiVersion: v1, kind: Service, metadata: {name: headless, namespace: %[1]s},
  spec: {clusterIP: None, selector: {app: server}, ports: [{port: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: alias, namespace: %[1]s},
  spec: {type: ExternalName, externalName: server.%[1]s.svc.cluster.local}}
---
{apiVersion: v1, kind: Service, metadata: {name: outer, namespace: %[1]s},
  spec: {clusterIP: 10.96.77.77, externalIPs: [192.0.2.77], selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: ported, namespace: %[1]s},
  spec: {type: NodePort, externalTrafficPolicy: Cluster, selector: {app: server}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}}
`

func TestWorkloads(t *testing.T) {
	ctx := claim(t, "an init container is in the mesh, a Job ends and is let go, a StatefulSet's pods have their names, also when they come again")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.meshed("client", "server", "http://server/")
	p.apply(workloadsYAML, p.name, cluster.AppImage)
	p.wait("the Job to end", func() error {
		j, err := world.BatchV1().Jobs(p.name).Get(ctx, "once", metav1.GetOptions{})
		if err == nil && j.Status.Succeeded != 1 {
			err = fmt.Errorf("%d succeeded, %d failed", j.Status.Succeeded, j.Status.Failed)
		}
		return err
	})
	if err := world.Ready(ctx, p.name, "set-0", "set-1"); err != nil {
		t.Fatal(err)
	}
	p.enrolled("set-0", "set-1")
	a := p.until("set-1 by its name", works, "set-0", "get", "http://set-1.set:8080/")
	if a.Seen.Host != "set-1" {
		t.Errorf("set-1.set is %s", a.Seen.Host)
	}
	p.remove("set-1")
	if err := world.Ready(ctx, p.name, "set-1"); err != nil {
		t.Fatal(err)
	}
	p.enrolled("set-1")
	p.until("set-1 by its name again", works, "set-0", "get", "-timeout=2s", "http://set-1.set:8080/")
	pods, err := world.CoreV1().Pods(p.name).List(ctx, metav1.ListOptions{LabelSelector: "job-name=once"})
	if err != nil || len(pods.Items) != 1 {
		t.Fatalf("pods of the Job: %v, %v", pods, err)
	}
	first, err := world.Logs(ctx, p.name, pods.Items[0].Name, "first")
	if err != nil || !strings.Contains(first, `"host":"server"`) {
		t.Errorf("the init container got %q, %v", first, err)
	}
	p.logged(`direction="inbound"`, fmt.Sprintf("src.workload=%q", pods.Items[0].Name), "/sa/default", p.identity("server"))
	p.wait("the finished pod to be let go", func() error {
		o, err := world.CoreV1().Pods(p.name).Get(ctx, pods.Items[0].Name, metav1.GetOptions{})
		if err == nil && o.Status.Phase == corev1.PodSucceeded && o.Annotations[redirection] != "" {
			err = errors.New("still annotated")
		}
		return err
	})
}

const workloadsYAML = `{apiVersion: batch/v1, kind: Job, metadata: {name: once, namespace: %[1]s}, spec: {backoffLimit: 0, template: {spec: {
  restartPolicy: Never, nodeName: node1,
  initContainers: [{name: first, image: %[2]q, imagePullPolicy: Never, args: [get, "http://server/"]}],
  containers: [{name: app, image: %[2]q, imagePullPolicy: Never, args: [sleep, 1s]}]}}}}
---
{apiVersion: v1, kind: Service, metadata: {name: set, namespace: %[1]s}, spec: {clusterIP: None, selector: {app: set}, ports: [{port: 8080}]}}
---
{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: set, namespace: %[1]s}, spec: {serviceName: set, replicas: 2,
  selector: {matchLabels: {app: set}}, template: {metadata: {labels: {app: set}}, spec: {terminationGracePeriodSeconds: 1, containers: [
    {name: app, image: %[2]q, imagePullPolicy: Never, args: [serve], readinessProbe: {periodSeconds: 1, httpGet: {port: 8081, path: /}}}]}}}}
`
