package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/ztun/ztun/deploy/e2e/cluster"
	"golang.org/x/sys/unix"
)

// The name makes it the last case.
func TestZUninstall(t *testing.T) {
	ctx := claim(t, "uninstalled at once with pods in the mesh: their interfaces, rules, routes and sysctls are as before, nodes keep no files, and pods reach each other in plain text")
	mesh(t)
	p := newPlace(ctx, t)
	p.run(pod{name: "client", node: "node1"}, pod{name: "server", node: "node2"})
	before := map[string]scene{}
	for _, name := range []string{"client", "server"} {
		before[name] = p.settled(name)
	}
	p.apply("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {%s}}}", p.name, ambient)
	p.enrolled("client", "server")
	p.meshed("client", "server", "http://server/")
	text, err := chartText()
	if err != nil {
		t.Fatal(err)
	}
	// Rights first and without waiting, as nobody should but anybody may.
	if _, err := world.RunKubectl(ctx, text, "delete", "--wait=false", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	for name, was := range before {
		p.wait(name+" as it was before the mesh", func() error {
			return p.scene(p.get(name)).sameAs(was)
		})
	}
	for _, n := range world.Nodes {
		p.wait(n.Name+" without a trace", func() error { return clean(n) })
	}
	w, err := world.Nodes[0].Wire()
	if err != nil {
		t.Fatal(err)
	}
	p.until("the server without a mesh", works, "client", "get", "http://server/")
	if n := plainSegments(w.Close(), p.get("client").Status.PodIP, p.get("server").Status.PodIP); n == 0 {
		t.Error("the wire saw no plain text")
	}
	p.run(pod{name: "later", node: "node1"})
	p.untouched("later")
	p.until("the server from a later pod", works, "later", "get", "http://server/")
}

// settled is a pod's scene once the kernel has finished its addresses.
func (p *place) settled(name string) (s scene) {
	p.t.Helper()
	p.wait(name+" to have its addresses", func() error {
		s = p.scene(p.get(name))
		for line := range s {
			if strings.Contains(line, fmt.Sprintf("flags %#x", unix.IFA_F_TENTATIVE|unix.IFA_F_PERMANENT)) {
				return errors.New(line)
			}
		}
		return nil
	})
	return s
}

// plainSegments counts those between two pods that are not HBONE.
func plainSegments(segments []cluster.Segment, a, b string) (n int) {
	one, two := netip.MustParseAddr(a), netip.MustParseAddr(b)
	for _, s := range segments {
		if s.From.Addr() == one && s.To.Addr() == two && s.To.Port() != hbonePort {
			n++
		}
	}
	return n
}

// clean wants a node without anything that the chart put there.
func clean(n *cluster.Node) error {
	var left []error
	for _, dir := range []string{"etc/cni/net.d", "opt/cni/bin", "run/istio-cni", "run/ztunnel", "run/ztun"} {
		_ = filepath.WalkDir(filepath.Join(n.Root(), dir), func(file string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, os.ErrNotExist):
				return nil
			case err != nil:
				left = append(left, err)
			case d.IsDir(), dir == "opt/cni/bin" && !strings.Contains(d.Name(), "ztun"):
			case dir == "etc/cni/net.d":
				text, err := os.ReadFile(file)
				if err != nil || strings.Contains(string(text), "ztun") {
					left = append(left, fmt.Errorf("%s names the plugin: %v", file, err))
				}
			default:
				left = append(left, fmt.Errorf("%s is left", file))
			}
			return nil
		})
	}
	if err := errors.Join(left...); err != nil {
		return err
	}
	return inside(n.NetNS(), func() error {
		s := scene{}
		if err := s.read(); err != nil {
			return err
		}
		for line := range s {
			if strings.Contains(line, device) || strings.HasPrefix(line, "rule ") && !ordinary.MatchString(line) {
				return errors.New("in the node's network: " + line)
			}
		}
		return nil
	})
}

// ordinary are the rules of every network namespace: local, main and default.
var ordinary = regexp.MustCompile(`^rule \d+ ip rule (0|32766|32767): from all to all table (255|254|253)`)
