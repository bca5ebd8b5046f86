package e2e

import (
	"net"
	"testing"
	"time"
)

// Each node lacks another daemon at the same time, so that the two minutes pass once.
func TestAway(t *testing.T) {
	mesh(t)
	t.Run("Proxy", func(t *testing.T) { t.Parallel(); proxyAway(t, "node1", "node2") })
	t.Run("Agent", func(t *testing.T) { t.Parallel(); agentAway(t, "node2") })
}

const away = 2 * time.Minute

// liveness are probes that end a container which misses three of them.
const liveness = `livenessProbe: {periodSeconds: 1, failureThreshold: 3, httpGet: {port: 8081, path: /}}`

func proxyAway(t *testing.T, node, other string) {
	ctx := claim(t, "two minutes without a node's proxy: probes pass, no container restarts, nothing else gets through")
	p := newPlace(ctx, t, ambient)
	const none = "istio.io/dataplane-mode: none"
	p.run(pod{name: "client", node: node, container: liveness}, pod{name: "server", node: node, container: liveness},
		pod{name: "near", node: node, labels: []string{none}}, pod{name: "far", node: other, labels: []string{none}})
	p.enrolled("client", "server")
	address := p.get("server").Status.PodIP
	url := "http://" + net.JoinHostPort(address, "8080") + "/"
	for _, client := range []string{"client", "near", "far"} {
		p.until("a way to the server", works, client, "get", url)
	}
	back := banish(ctx, t, proxies, node)
	t.Cleanup(back)
	attempts := 0
	p.steady(away, []string{"client", "server"}, func() {
		for _, client := range []string{"client", "near", "far"} {
			if a := p.ask(client, "get", "-timeout=1s", url); a.Error == "" {
				t.Errorf("a request of %s got through without a proxy", client)
			}
			attempts++
		}
		for _, n := range world.Nodes {
			for _, port := range []string{"8080", "8081"} { // 8081 is the probes'
				if n.Within(func() error { return dial(net.JoinHostPort(address, port)) }) == nil {
					t.Errorf("plain text of a process of %s got through to port %s without a proxy", n.Name, port)
				}
				attempts++
			}
		}
	})
	t.Logf("%d attempts to get through", attempts)
	back()
	p.until("the server again", works, "client", "get", "-timeout=2s", "http://server/")
}

func agentAway(t *testing.T, node string) {
	ctx := claim(t, "two minutes without a node's agent: probes pass, no container restarts, traffic goes on, STRICT still refuses")
	p := newPlace(ctx, t, ambient)
	p.apply(peerAuthentication, p.name, "STRICT")
	p.run(pod{name: "client", node: node, container: liveness}, pod{name: "server", node: node, container: liveness},
		pod{name: "plain", node: node, labels: []string{"istio.io/dataplane-mode: none"}})
	p.enrolled("client", "server")
	address := net.JoinHostPort(p.get("server").Status.PodIP, "8080")
	p.until("a way to the server", works, "client", "get", "http://server/")
	p.until("STRICT", fails, "plain", "get", "-timeout=1s", "http://"+address+"/")
	back := banish(ctx, t, agents, node)
	t.Cleanup(back)
	running := p.traffic("client", "server", away)
	p.steady(away, []string{"client", "server"}, func() {
		if a := p.ask("plain", "get", "-timeout=1s", "http://"+address+"/"); a.Error == "" {
			t.Error("STRICT let in plain text of a pod without an agent")
		}
		for _, n := range world.Nodes {
			if n.Within(func() error { return dial(address) }) == nil {
				t.Errorf("STRICT let in plain text of a process of %s without an agent", n.Name)
			}
		}
	})
	running.whole(t)
	back()
}

// steady wants pods never restarted for a while, and tries something now and then: the time itself is what the case is about.
func (p *place) steady(lasts time.Duration, names []string, try func()) {
	p.t.Helper()
	end := time.Now().Add(lasts)
	for time.Now().Before(end) && !p.t.Failed() {
		try()
		for _, name := range names {
			for _, s := range p.get(name).Status.ContainerStatuses {
				if s.RestartCount != 0 || !s.Ready {
					p.t.Fatalf("%s was started %d times, ready: %t", name, s.RestartCount+1, s.Ready)
				}
			}
		}
		time.Sleep(2 * time.Second)
	}
}
