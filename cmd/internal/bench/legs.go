package main

import (
	"fmt"
	"strings"
)

// A leg is a way from a client to a server. Every leg carries the same load.
type leg struct {
	name           string
	client, server *benchPod
	// proxies are the processes in between, as Status of the lab names them,
	// or redirector.
	proxies []string
	// other says that the proxies are those of the command line.
	other bool
	// missing says why the leg cannot be measured here; empty: it can.
	missing string
	// broken says that it does not work in this round.
	broken bool
}

// redirector is the bench's own proxy, which the lab does not know.
const redirector = "redirector"

// A benchPod is a pod that an agent runs in.
type benchPod struct {
	namespace, name, node string
	netAdmin              bool // May it change its own network?
}

func (p *benchPod) key() string { return p.namespace + "/" + p.name }

const (
	plainNamespace = "bench-plain"
	meshNamespace  = "bench-mesh"
	nodeA, nodeB   = "node-a", "node-b"
	// The other proxy has nodes of its own: two proxies in one would be at
	// the same ports.
	otherNamespace = "bench-other"
	otherA, otherB = "other-a", "other-b"
)

// allLegs are the legs there are, the direct one first.
func allLegs() []*leg {
	plainServer := &benchPod{namespace: plainNamespace, name: "server", node: nodeB}
	meshClient := &benchPod{namespace: meshNamespace, name: "client", node: nodeA}
	otherClient := &benchPod{namespace: otherNamespace, name: "client", node: otherA}
	return []*leg{
		{name: legDirect, client: &benchPod{namespace: plainNamespace, name: "client", node: nodeA}, server: plainServer},
		{
			name:   legRedirect,
			client: &benchPod{namespace: plainNamespace, name: "redirected", node: nodeA, netAdmin: true}, server: plainServer,
			proxies: []string{redirector},
		},
		{name: legPlain, client: meshClient, server: plainServer, proxies: []string{"proxy/" + nodeA}},
		{
			name: legHBONE, client: meshClient, server: &benchPod{namespace: meshNamespace, name: "server", node: nodeB},
			proxies: []string{"proxy/" + nodeA, "proxy/" + nodeB},
		},
		{
			name: legSameNode, client: meshClient, server: &benchPod{namespace: meshNamespace, name: "neighbour", node: nodeA},
			proxies: []string{"proxy/" + nodeA},
		},
		{
			name: legOther, client: otherClient, server: &benchPod{namespace: otherNamespace, name: "server", node: otherB},
			proxies: []string{"proxy/" + otherA, "proxy/" + otherB}, other: true,
		},
		{
			name: legOtherSameNode, client: otherClient, server: &benchPod{namespace: otherNamespace, name: "neighbour", node: otherA},
			proxies: []string{"proxy/" + otherA}, other: true,
		},
	}
}

// world is the YAML of the lab that has the pods of legs.
func world(legs []*leg) string {
	var b strings.Builder
	fmt.Fprintf(&b, "{apiVersion: v1, kind: Namespace, metadata: {name: %s}}\n", plainNamespace)
	for _, name := range []string{meshNamespace, otherNamespace} {
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {istio.io/dataplane-mode: ambient}}}\n", name)
	}
	seen := map[string]bool{}
	for _, l := range legs {
		for _, p := range []*benchPod{l.client, l.server} {
			if !seen[p.key()] {
				seen[p.key()] = true
				p.write(&b)
			}
		}
	}
	return b.String()
}

// waitForEnd is what a pod runs: workers are started beside it. sleep alone,
// as PID 1, would ignore the signal to end.
const waitForEnd = "trap exit TERM; sleep infinity & wait"

func (p *benchPod) write(b *strings.Builder) {
	capabilities := ""
	if p.netAdmin {
		capabilities = ", securityContext: {capabilities: {add: [NET_ADMIN]}}"
	}
	fmt.Fprintf(b, `---
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  nodeName: %[3]s
  serviceAccountName: %[2]s
  containers:
  - {name: app, command: [sh, -c, '%[5]s']%[4]s}
`, p.namespace, p.name, p.node, capabilities, waitForEnd)
}
