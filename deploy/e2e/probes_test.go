package e2e

import (
	"errors"
	"fmt"
	"net"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
	corev1 "k8s.io/api/core/v1"
)

// A path is a way of plain text to a pod of the mesh.
type path struct {
	name string
	try  func() error
}

func TestProbes(t *testing.T) {
	ctx := claim(t, "under STRICT the kubelet's HTTP, TCP and gRPC probes pass on both nodes; nothing else does: pods and hostNetwork pods of the same node, its processes, NodePorts")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	const probes = `startupProbe: {periodSeconds: 1, tcpSocket: {port: 9003}},
		livenessProbe: {periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 2, grpc: {port: 9004}}`
	const none = "istio.io/dataplane-mode: none"
	p.run(
		pod{name: "one", node: "node1", container: probes}, pod{name: "plain-one", node: "node1", labels: []string{none}},
		pod{name: "two", node: "node2", container: probes}, pod{name: "plain-two", node: "node2", labels: []string{none}},
		// Its own probes go from the node to itself.
		pod{name: "host-one", node: "node1", spec: "hostNetwork: true", container: liveness},
		pod{name: "host-two", node: "node2", spec: "hostNetwork: true", container: liveness},
	)
	p.enrolled("one", "two")
	var paths []path
	for i, server := range []string{"one", "two"} {
		p.apply(nodePorts, p.name, server, 30081+10*i, 30082+10*i)
		paths = append(paths, p.plainPaths(server, world.Nodes[i], 30081+10*i)...)
	}
	for _, w := range paths {
		p.wait("PERMISSIVE to let in "+w.name, w.try)
	}
	p.apply(peerAuthentication, p.name, "STRICT")
	for _, w := range paths {
		p.wait("STRICT to refuse "+w.name, func() error { return unless(w.try()) })
	}
	for _, w := range paths {
		if w.try() == nil {
			t.Errorf("STRICT let in %s", w.name)
		}
	}
	p.until("the way of the mesh", works, "one", "get", "http://two/")
	for _, name := range []string{"one", "two", "host-one", "host-two"} {
		p.wantSound(name)
	}
}

func unless(err error) error {
	if err == nil {
		return errors.New("it was let in")
	}
	return nil
}

// wantSound wants a pod that is ready and whose container was never started again.
func (p *place) wantSound(name string) {
	p.t.Helper()
	o := p.get(name)
	ready := false
	for _, c := range o.Status.Conditions {
		ready = ready || c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	}
	for _, s := range o.Status.ContainerStatuses {
		if s.RestartCount != 0 || !ready {
			p.t.Errorf("%s was started again %d times, ready: %t", name, s.RestartCount, ready)
		}
	}
}

// nodePorts is a service with the port of the app and the port of its probe, each at every node.
const nodePorts = `{apiVersion: v1, kind: Service, metadata: {name: %[2]s-ported, namespace: %[1]s},
  spec: {type: NodePort, externalTrafficPolicy: Cluster, ipFamilyPolicy: PreferDualStack, selector: {app: %[2]s},
    ports: [{name: web, port: 80, targetPort: 8080, nodePort: %[3]d}, {name: probe, port: 81, targetPort: 8081, nodePort: %[4]d}]}}`

// plainPaths are all that lead to a pod on node without the mesh: most of them
// come from an address of the node, as its kubelet's probes do. port is its
// NodePort; the one of its probe is the next.
func (p *place) plainPaths(server string, node *cluster.Node, port int) (paths []path) {
	o := p.get(server)
	add := func(what string, try func() error) { paths = append(paths, path{what + " to " + server, try}) }
	for _, ip := range o.Status.PodIPs {
		for _, target := range []string{"8080", "8081"} {
			address := net.JoinHostPort(ip.IP, target)
			for _, client := range []string{"plain-" + server, "host-" + server} {
				add(client+" with "+address, func() error {
					if a := p.ask(client, "get", "-timeout=2s", "http://"+address+"/"); a.Status == 0 {
						return errors.New(a.Error)
					}
					return nil
				})
			}
			add("a process of "+node.Name+" with "+address, func() error {
				return node.Within(func() error { return dial(address) })
			})
		}
	}
	for _, entry := range world.Nodes {
		for _, a := range []string{entry.Address.String(), entry.Address6.String()} {
			for _, port := range []int{port, port + 1} {
				address := net.JoinHostPort(a, fmt.Sprint(port))
				add("NodePort "+address, func() error {
					_, err := cluster.Fetch(p.ctx, "http://"+address+"/")
					return err
				})
			}
		}
	}
	return paths
}
