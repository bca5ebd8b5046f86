package e2e

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestKilledProxies(t *testing.T) {
	ctx := claim(t, "after kill -9 of both proxies nothing leaves in plain text, and all comes back")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.blackhole(proxies)
}

func TestKilledAgents(t *testing.T) {
	ctx := claim(t, "kill -9 of both agents fails no request and no connection; they come back, and new pods come into the mesh")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	running := p.traffic("client", "server", 8*time.Second)
	back := p.kill(agents)
	running.whole(t)
	back()
	p.run(pod{name: "later", node: "node1"})
	p.enrolled("later")
	p.meshed("later", "server", "http://server/")
}

func TestKilledBoth(t *testing.T) {
	ctx := claim(t, "after kill -9 of agents and proxies at once nothing leaves in plain text, all comes back, and new pods come into the mesh")
	mesh(t)
	p := newPlace(ctx, t, ambient)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	p.enrolled("client", "server")
	p.blackhole(agents, proxies)
	p.run(pod{name: "later", node: "node1"})
	p.enrolled("later")
	p.meshed("later", "server", "http://server/")
}

// blackhole kills daemons that traffic needs, and wants requests to fail rather
// than to leave in plain text, until the daemons are there again.
func (p *place) blackhole(daemons ...daemon) {
	p.t.Helper()
	p.until("a way to the server", works, "client", "get", "http://server/")
	w, err := world.Nodes[0].Wire()
	if err != nil {
		p.t.Fatal(err)
	}
	running := p.begin("client", "load", "-for=8s", "-rate=10", "-timeout=2s", "http://server/")
	back := p.kill(daemons...)
	var l loaded
	running.end(&l)
	p.t.Logf("%d of %d requests while they were killed: %v", l.OK, l.Sent, l.Errors)
	if l.OK == l.Sent {
		p.t.Error("no request failed: nothing was killed that carried them")
	}
	p.until("the server again", works, "client", "get", "-timeout=2s", "http://server/")
	wantOnlyHBONE(p.t, w.Close(), p.get("client").Status.PodIP, p.get("server").Status.PodIP)
	back()
}

// programs are what runs in a daemon's container, as the kernel names it.
var programs = map[daemon]string{proxies: "ztun-proxy", agents: "ztun-agent"}

// kill ends daemons at once on every node, and returns how to wait until the kubelets have started them again.
func (p *place) kill(daemons ...daemon) (back func()) {
	p.t.Helper()
	before := map[daemon]map[string]int32{}
	for _, d := range daemons {
		var err error
		if before[d], err = starts(p.ctx, d); err != nil {
			p.t.Fatal(err)
		}
	}
	for _, d := range daemons {
		if n := killAll(p.t, programs[d]); n != len(world.Nodes) {
			p.t.Fatalf("%d processes %s, want one on each node", n, programs[d])
		}
	}
	return func() {
		p.t.Helper()
		for _, d := range daemons {
			p.wait(d.name+" to be started again", func() error {
				now, err := starts(p.ctx, d)
				if err != nil {
					return err
				}
				for pod, n := range before[d] {
					if now[pod] <= n {
						return fmt.Errorf("%s has started %d times, as before", pod, now[pod])
					}
				}
				return world.Rolled(p.ctx, system, d.name)
			})
		}
	}
}

// starts counts how often the container of each of a daemon's pods was started.
func starts(ctx context.Context, d daemon) (map[string]int32, error) {
	pods, err := world.PodsOf(ctx, system, d.selector)
	if err != nil {
		return nil, err
	}
	out := map[string]int32{}
	for _, pod := range pods {
		for _, s := range pod.Status.ContainerStatuses {
			if s.State.Running != nil {
				out[pod.Name] = s.RestartCount + 1
			}
		}
	}
	return out, nil
}

// killAll ends at once every process of the cluster with that program's name, and says how many.
func killAll(t *testing.T, program string) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		comm, err := os.ReadFile("/proc/" + e.Name() + "/comm")
		if err == nil && strings.TrimSpace(string(comm)) == program && unix.Kill(pid, unix.SIGKILL) == nil {
			n++
		}
	}
	return n
}
